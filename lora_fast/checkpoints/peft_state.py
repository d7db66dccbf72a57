"""The tensors and the config of an adapter in a PEFT model, under the keys and fields that PEFT writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from .. import checks
from ..checks import CheckpointError
from ..layers.find import key_name, peft_layers
from ..layers.hooks import stored_tensor
from ..surgery import tasks
from .peft_format import ORIGINAL, PREFIX

Embeddings = bool | Literal["auto"]


def tensors(model: nn.Module, state: dict[str, Tensor], adapter: str, embeddings: Embeddings) -> dict[str, Tensor]:
    """Returns the adapter's tensors out of a ``state``, by their keys in the file without the prefix.

    Args:
        embeddings: PEFT's ``save_embedding_layers``: "auto" adds the embeddings where they are adapted or resized.
    """
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, state, adapter, save_embedding_layers=embeddings)
    return {key_name(key).removeprefix(PREFIX): tensor for key, tensor in saved.items()}


def state(model: nn.Module, writable: bool = False) -> dict[str, Tensor]:
    """Returns the model's ``state_dict``, with the tensors that accelerate has offloaded, all in the model's memory.

    Args:
        writable: leave out what accelerate has offloaded to the disk (``hooks.stored_tensor``).
    """
    state: dict[str, Any] = dict(model.state_dict())
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            path, _, name = key.rpartition(".")
            state[key] = stored_tensor(model.get_submodule(path), name, writable)
    return state


def check_complete(model: Any, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a trained parameter, of no other adapter, is not among the tensors that PEFT saves."""
    saved = {tensor.data_ptr() for tensor in tensors.values()}
    others = tuple(f".{name}." for name in model.peft_config if name != adapter)
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad and type(parameter) is nn.Parameter and not parameter.is_meta
        if trained and parameter.data_ptr() not in saved and not any(other in f"{name}." for other in others):
            expected = "no trained parameters but those that PEFT saves with the adapter (modules_to_save adds modules)"
            raise CheckpointError("model", expected, key_name(name).removeprefix(PREFIX))


def restorable(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the state that PEFT restores in the base model from an adapter's file, by their keys
    without the prefix and ``original_module``: of embeddings, which may have been resized, and of heads of
    classification tasks."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = tuple(f"{key_name(name)}." for name in [*tasks.embeddings(base), *tasks.heads(base)])
    short = {key_name(key).removeprefix(PREFIX): tensor for key, tensor in state.items()}
    chosen = {key: tensor for key, tensor in short.items() if names and key.startswith(names) and ".lora_" not in key}
    return {key.replace(ORIGINAL, "."): tensor for key, tensor in chosen.items()}


def config_fields(config: Any) -> dict:
    """Returns the fields of a PEFT config as JSON has them. Patterns keep their order, because PEFT takes the first one
    that matches."""
    plain = lambda value: sorted(value) if isinstance(value, (set, frozenset)) else checks.plain_number(value)
    return json.loads(json.dumps(config.to_dict(), default=plain))


def config(model: Any, adapter: str) -> dict:
    """Returns the config that PEFT writes for an adapter of a PeftModel."""
    base = model.get_base_model()
    fields = config_fields(model.peft_config[adapter])
    fields["base_model_name_or_path"] = fields["base_model_name_or_path"] or base.__dict__.get("name_or_path") or None
    fields["inference_mode"] = True
    if fields["task_type"] is None:
        fields["auto_mapping"] = auto_mapping(base)
    return fields


def auto_mapping(model: nn.Module) -> dict[str, str]:
    """Returns the names by which PEFT's ``AutoPeftModel`` finds the class of a model without a task type."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def scalings(model: nn.Module, adapter: str) -> dict[str, float]:
    """Returns the scaling of each layer that has the adapter, by the name that PEFT's patterns are matched with: the
    layer's or, for a layer of ``target_parameters``, the parameter's."""
    scalings: dict[str, float] = {}
    for name, layer in peft_layers(model).items():
        scaling: Mapping = getattr(layer, "scaling", {})
        if adapter in scaling:
            short, parameter = key_name(name).removeprefix(PREFIX), getattr(layer, "parameter_name", None)
            scalings[short if parameter is None else f"{_unwrapped(short)}.{parameter}"] = float(scaling[adapter])
    return scalings


def _unwrapped(name: str) -> str:
    """Returns a module's name without those of the wrappers of its other parameters."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name
