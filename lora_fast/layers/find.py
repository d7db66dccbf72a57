"""Which adapter layers a model has, ours and PEFT's. PEFT is imported only where it is needed."""

from __future__ import annotations

import sys

from torch import nn

from .. import checks
from .lora import LoRALinear
from .nb_lora import NBLoRALinear
from .sing_lora import SingLoRALinear

ADAPTER_LAYERS = (LoRALinear, NBLoRALinear, SingLoRALinear)


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name → layer of every layer of ours and of PEFT's."""
    theirs = peft_layers(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, ADAPTER_LAYERS)} | theirs


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name → layer of every PEFT layer; none, and no import, where PEFT has not been imported."""
    if not isinstance(model, nn.Module):
        raise checks.ArgumentError("model", "a torch.nn.Module", type(model).__name__)
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def expert_count(layer: nn.Module) -> int:
    """Returns how many products each adapter of a PEFT layer holds: the number of experts of the parameter that
    ``target_parameters`` names, and 1 for every other layer."""
    return layer.num_experts if hasattr(layer, "parameter_name") else 1


def fused_class() -> type[nn.Module]:
    """FusedLoraLinear; MissingPackageError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise checks.MissingPackageError("this needs PEFT: pip install peft transformers accelerate") from error
    from .fused_peft import FusedLoraLinear

    return FusedLoraLinear
