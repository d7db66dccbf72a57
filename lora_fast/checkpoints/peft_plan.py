"""Checks an adapter's files against a PEFT model, and plans to load every tensor that PEFT saves of an adapter."""

from __future__ import annotations

from ..checks import CheckpointError
from ..layers.find import peft_layers
from . import base_weights, io, peft_config, peft_names, whole_modules
from .load_plan import Plan, changes_of, check_names, check_scaling, check_unmerged
from .peft_format import ORIGINAL, PREFIX, Adapter, check_tensor
from .peft_state import PeftAdapter


def plan(own: PeftAdapter, adapter: Adapter) -> Plan:
    """Plans to load an adapter into a model with PEFT's layers: every tensor that PEFT saves of it.

    Args:
        own: the model's active adapter.

    Raises:
        CheckpointError: the adapter does not fit the layers.
    """
    for name, layer in peft_layers(own.model).items():
        check_unmerged(own.key(name), layer)
    writes = plan_tensors(own, adapter)
    writes.changes = changes_of(own.layers, adapter)
    base_weights.check(own.model, own.layers, adapter, writes.others)
    return writes


def plan_tensors(own: PeftAdapter, adapter: Adapter) -> Plan:
    """Does what ``plan`` does except for frozen weights that merges have changed, in whatever state the
    layers are. Saving calls it too, so that nothing is written that could not be loaded.

    Raises:
        CheckpointError: the adapter does not fit the layers.
    """
    peft_config.require_same_kind(adapter.config, peft_names.config(own))
    check_names(own.layers, adapter)
    writes, of_adapter = Plan(), own.tensors(embeddings=False)
    beside = whole_modules.named_in(own, adapter)
    writes.whole = [*beside.values()]
    base = own.restorable() | whole_modules.states(beside, writable=True)
    missing = sorted(of_adapter.keys() - adapter.tensors().keys())
    if missing:
        raise CheckpointError(
            f"key {PREFIX}{missing[0]}", f"one key for each of the adapter's {len(of_adapter)}", "missing"
        )
    _check_whole_modules(own, adapter)
    for key, value in adapter.tensors().items():
        tensor = of_adapter.get(key, base.get(key.replace(ORIGINAL, ".")))
        if tensor is None and key.removesuffix(".base_layer.weight") in own.layers:
            continue  # ``base_weights.check`` compares it with the model's
        if tensor is None and f"{key}.{own.name}" in base:
            continue  # PEFT repeats the trained tokens of an embedding under a tied one, and does not read them there
        if tensor is None:
            raise CheckpointError(f"key {PREFIX}{key}", "one of the model's adapter", "an extra key")
        io.check_destination(key, tensor)
        if ".lora_" in key:
            check_tensor(key.removesuffix(".weight"), value, tuple(tensor.shape), tensor.dtype)
            writes.copies.append((tensor, value))
        else:
            writes.add_other(key, tensor, value)
    for name, scaling in own.scalings.items():
        check_scaling(name, scaling, adapter.scaling(name))
    return writes


def _check_whole_modules(own: PeftAdapter, adapter: Adapter) -> None:
    """Raises CheckpointError if the file has nothing of a module of the model that its ``modules_to_save`` names."""
    ends = tuple(adapter.config.get("modules_to_save") or ())
    for name, _ in own.model.named_modules() if ends else ():
        if own.key(name).endswith(ends) and not any(key.startswith(f"{own.key(name)}.") for key in adapter.others):
            raise CheckpointError(f"keys {PREFIX}{own.key(name)}.…", "in the file, for modules_to_save", "missing")
