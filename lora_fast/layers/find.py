"""Finds a model's adapter layers, ours and PEFT's, and their names. PEFT is imported only where it is needed."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import checks
from .lora import LoRALinear
from .nb_lora import NBLoRALinear
from .sing_lora import SingLoRALinear

if TYPE_CHECKING:
    from .fused_experts import FusedParamWrapper
    from .fused_peft import FusedForward, FusedLoraLinear

PeftLayer = Any  # a torch module and at once a mixin of PEFT, which has no types for the two together
AdapterLayer = Any  # an AdapterLinear or a PeftLayer
ADAPTER_LAYERS = (LoRALinear, NBLoRALinear, SingLoRALinear)
WRAPPERS = (  # attributes under which wrappers hold the module that they wrap
    "module",  # DistributedDataParallel, DataParallel
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FSDP1
    "_checkpoint_wrapped_module",  # torch's checkpoint_wrapper
)


def bare_name(name: str) -> str:
    """Returns the name of a module or parameter without the parts that wrappers add to it, so that it is the same
    whether or not the model is compiled, sharded or under activation checkpointing."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def key_name(name: str) -> str:
    """Returns the name of a module as an adapter file has it: without wrappers, but with a child called ``module``. The
    model is out of its data-parallel wrapper when it is saved, so such a child is the model's own, and PEFT keeps its
    name."""
    return ".".join(part for part in name.split(".") if part == "module" or part not in WRAPPERS)


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Returns name → layer of every adapter layer, ours and PEFT's."""
    theirs = peft_layers(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, ADAPTER_LAYERS)} | theirs


def peft_layers(model: nn.Module) -> dict[str, PeftLayer]:
    """Returns name → layer of every PEFT layer; none, and no import, where PEFT has not been imported."""
    if not isinstance(model, nn.Module):
        raise checks.ArgumentError("model", "a torch.nn.Module", type(model).__name__)
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def holders_of(model: nn.Module, modules: Container[nn.Module]) -> dict[Any, list[tuple[nn.Module, str]]]:
    """Returns each of the modules → the modules of the model that hold it, each with its name there."""
    holders: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():  # named_children() would skip a module that is held twice
            if child is not None and child in modules:
                holders.setdefault(child, []).append((parent, key))
    return holders


def expert_count(layer: PeftLayer) -> int:
    """Returns how many products each adapter of a PEFT layer holds: the number of experts of the parameter that
    ``target_parameters`` names, and 1 for every other layer."""
    return layer.num_experts if is_of_parameter(layer) else 1


def is_of_parameter(layer: PeftLayer) -> bool:
    """Returns whether a PEFT layer adapts a parameter that ``target_parameters`` names."""
    return hasattr(layer, "parameter_name")


def is_exact(layer: PeftLayer) -> bool:
    """Returns whether a PEFT layer has ``ExactMerge``, so that its merges are taken out bit for bit."""
    return hasattr(type(layer), "merge_exactly")


def is_fused(layer: PeftLayer) -> bool:
    """Returns whether a PEFT layer has the fused forward."""
    return hasattr(type(layer), "PEFT_CLASS")


def fused_class_for(layer: PeftLayer) -> type[FusedForward] | type[FusedParamWrapper] | None:
    """Returns the fused class for a layer that is not fused, None where there is none."""
    from peft.tuners import lora

    from .fused_experts import FusedParamWrapper
    from .fused_quantized import fused_class_of

    kind: Any = type(layer)
    if kind is lora.ParamWrapper:
        return FusedParamWrapper
    return fused_class() if kind is lora.Linear else fused_class_of(kind)


def fused_class() -> type[FusedLoraLinear]:
    """Returns FusedLoraLinear; raises MissingPackageError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise checks.MissingPackageError("this needs PEFT: pip install peft transformers accelerate") from error
    from .fused_peft import FusedLoraLinear

    return FusedLoraLinear
