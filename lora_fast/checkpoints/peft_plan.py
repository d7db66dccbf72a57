"""Checks an adapter's files against a PEFT model, and plans to load every tensor that PEFT saves of an adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..checks import CheckpointError
from ..layers.find import PeftLayer, key_name, peft_layers
from . import base_weights, io, peft_config, peft_state
from .load_plan import Plan, changes_of, check_names, check_scaling, check_unmerged
from .peft_format import ORIGINAL, PREFIX, Adapter, check_tensor


def plan(model: Any, layers: dict[str, PeftLayer], active: str, adapter: Adapter) -> Plan:
    """Plans to load an adapter into a PEFT model: every tensor that PEFT saves of it.

    Args:
        layers: the PEFT layers that have a pair of the adapter ``active``, by their names in the base model.

    Raises:
        CheckpointError: the adapter does not fit the layers.
    """
    for name, layer in peft_layers(model).items():
        check_unmerged(key_name(name).removeprefix(PREFIX), layer)
    writes = plan_tensors(model, peft_state.state(model, writable=True), layers, active, adapter)
    writes.changes = changes_of(layers, adapter)
    base_weights.check(model, layers, adapter, writes.others)
    return writes


def plan_tensors(
    model: Any, state: dict[str, Tensor], layers: dict[str, PeftLayer], active: str, adapter: Adapter
) -> Plan:
    """Does what ``plan`` does except for frozen weights that merges have changed, in whatever state the
    layers are. Saving calls it too, so that nothing is written that could not be loaded.

    Args:
        state: ``peft_state.state`` of the model.

    Raises:
        CheckpointError: the adapter does not fit the layers.
    """
    if active not in getattr(model, "peft_config", ()):
        raise CheckpointError("model", "a PeftModel, or a model after add_adapter", type(model).__name__)
    peft_config.require_same_kind(adapter.config, peft_state.config_fields(model.peft_config[active]))
    check_names(layers, adapter)
    writes, of_adapter = Plan(), peft_state.tensors(model, state, active, embeddings=False)
    base = peft_state.restorable(model, state)
    missing = sorted(of_adapter.keys() - adapter.tensors().keys())
    if missing:
        raise CheckpointError(
            f"key {PREFIX}{missing[0]}", f"one key for each of the adapter's {len(of_adapter)}", "missing"
        )
    _check_whole_modules(model, adapter)
    for key, value in adapter.tensors().items():
        tensor = of_adapter.get(key, base.get(key.replace(ORIGINAL, ".")))
        if tensor is None and key.removesuffix(".base_layer.weight") in layers:
            continue  # ``base_weights.check`` compares it with the model's
        if tensor is None and f"{key}.{active}" in base:
            continue  # PEFT repeats the trained tokens of an embedding under a tied one, and does not read them there
        if tensor is None:
            raise CheckpointError(f"key {PREFIX}{key}", "one of the model's adapter", "an extra key")
        io.check_destination(key, tensor)
        if ".lora_" in key:
            check_tensor(key.removesuffix(".weight"), value, tuple(tensor.shape), tensor.dtype)
            writes.copies.append((tensor, value))
        else:
            writes.add_other(key, tensor, value)
    for name, scaling in peft_state.scalings(model, active).items():
        check_scaling(name, scaling, adapter.scaling(name))
    return writes


def _check_whole_modules(model: nn.Module, adapter: Adapter) -> None:
    """Raises CheckpointError if the file has nothing of a module of the model that its ``modules_to_save`` names."""
    ends = tuple(adapter.config.get("modules_to_save") or ())
    names = [key_name(name).removeprefix(PREFIX) for name, _ in model.named_modules()]
    for name in names if ends else ():
        if name.endswith(ends) and not any(key.startswith(f"{name}.") for key in adapter.others):
            raise CheckpointError(f"keys {PREFIX}{name}.…", "in the file, for modules_to_save", "missing")
