"""Checks an adapter's files against a model, and collects every write in a ``Plan`` before the first one is made."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..checks import CheckpointError
from ..layers.base import AdapterLinear, sizes
from ..layers.find import AdapterLayer, PeftLayer, key_name
from ..layers.lora import LoRALinear
from ..surgery import inject, targets
from ..surgery.weight_reads import weight_reads
from . import base_weights, sidecar
from .peft_format import PREFIX, Adapter, Change, check_tensor
from .sidecar import FreeLayer


@dataclass
class Plan:
    """The writes of one ``load_adapter``, all of them checked.

    Attributes:
        replacements: nn.Linear → the layer that replaces it; empty unless the model is plain.
        factors: a lora_A or lora_B → its value.
        free: a layer with free parameters (what NB-LoRA and SingLoRA layers train in place of a and b, stored in the
            sidecar) → the values of the tensors that its SAVED_STATE names.
        changes: a layer → the change of its frozen weight.
    """

    replacements: dict[nn.Linear, AdapterLinear] = field(default_factory=dict)
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    free: list[tuple[AdapterLinear, Sequence[Tensor]]] = field(default_factory=list)
    changes: list[tuple[AdapterLayer, Change]] = field(default_factory=list)

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Writes into the model. Types, shapes and dtypes have been checked and the new layers exist, so only copies
        are left. A change given as terms needs the most memory: float32 temporaries for one weight at a time."""
        inject.place_(model, self.replacements)
        for parameter, value in self.factors:
            parameter.copy_(value)
        for layer, values in self.free:
            layer.load_free_(*values)
        for layer, change in self.changes:
            base_weights.restore_(layer, change)


def into_peft_layers(model: nn.Module, layers: dict[str, PeftLayer], active: str, adapter: Adapter) -> Plan:
    """Plans to load an adapter into a PEFT model.

    Args:
        layers: the PEFT layers that have the adapter ``active``, by their names in the base model.

    Raises:
        CheckpointError: the adapter does not fit the layers.
    """
    _check_names(layers, adapter)
    plan = Plan(changes=_changes(layers, adapter))
    for name, layer in layers.items():
        a, b = layer.lora_A[active], layer.lora_B[active]
        if active in layer.lora_variant or b.bias is not None:
            raise CheckpointError("model", "a plain LoRA adapter", f"{name} with a variant or a bias on lora_B")
        _check_unmerged(name, layer)
        plan.factors += _factors(name, a.weight, b.weight, layer.scaling[active], adapter)
    base_weights.check(model, layers, adapter)
    return plan


def into_our_layers(
    model: nn.Module, layers: dict[str, AdapterLinear], adapter: Adapter, free: dict[str, FreeLayer]
) -> Plan:
    """Plans to load an adapter into a model with layers of this library.

    Args:
        layers: bare name → layer.
        free: bare name → the layer's entry in the sidecar; empty if there is no sidecar.

    Raises:
        CheckpointError: the adapter does not fit the layers.
    """
    _check_names(layers, adapter)
    for name, layer in layers.items():
        _check_unmerged(name, layer)
    base_weights.check(model, layers, adapter)
    plan = Plan(changes=_changes(layers, adapter))
    for name, layer in layers.items():
        if not layer.SAVED_STATE:
            plan.factors += _factors(name, layer.lora_A, layer.lora_B, layer.scaling, adapter)
        elif name in free:
            _check_free(name, layer, free[name])
            plan.free.append((layer, free[name].tensors))
        else:
            plan.free.append((layer, _free_parameters(name, layer, adapter)))
    return plan


def into_plain_model(model: nn.Module, adapter: Adapter, free: dict[str, FreeLayer]) -> Plan:
    """Plans to replace linear layers of a plain model by the layers of an adapter's files.

    Args:
        free: bare name → the layer's entry in the sidecar; empty if there is no sidecar.

    Raises:
        CheckpointError: the adapter does not fit the model's linear layers.
        ArgumentError: a model that is a single layer.
    """
    inject.check_plain(model)
    # The files have names without wrappers such as torch.compile's. get_submodule needs the model's own names.
    real_names = {key_name(name): name for name, _ in model.named_modules() if name}
    _check_names([name for name in real_names if name in adapter.pairs or adapter.targets(name)], adapter)
    kinds: dict[str, tuple[type[AdapterLinear], dict]] = {}
    linears: dict[str, Any] = {}  # each is an nn.Linear, which ``targets.unsupported`` checks below
    reads = weight_reads(model)
    for name, (a, b) in adapter.pairs.items():
        linear: Any = model.get_submodule(real_names[name])
        linears[name] = linear
        reason = targets.unsupported(linear, reads)
        if reason is not None or not adapter.targets(name):
            expected = "a torch.nn.Linear among the config's target_modules"
            raise CheckpointError(f"keys of {name}", expected, reason or "not among them")
        # The dtype in which ``from_linear`` will create the factors. It must hold the file's without loss.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        d_in, d_out = sizes(linear)
        check_tensor(f"{name}.lora_A", a, (a.shape[0], d_in), dtype)
        check_tensor(f"{name}.lora_B", b, (d_out, a.shape[0]), dtype)
        kinds[real_names[name]] = _kind(adapter.settings(name), free.get(name))
    base_weights.check(model, linears, adapter)
    replacements = inject.build_layers(model, kinds)
    layers = {name: replacements[linear] for name, linear in linears.items()}
    plan = Plan(replacements, changes=_changes(layers, adapter))
    # No checks are needed here, because the layers were built with the class, settings and shapes in the files.
    for name, layer in layers.items():
        if name in free:
            plan.free.append((layer, free[name].tensors))
        else:
            plan.factors += zip((layer.lora_A, layer.lora_B), adapter.pairs[name], strict=True)
    return plan


def _kind(settings: dict, saved: FreeLayer | None) -> tuple[type[AdapterLinear], dict]:
    """Returns the class of a new layer and the arguments of its ``from_linear``."""
    if saved is None:
        return LoRALinear, settings
    return saved.kind, {"r": settings["r"], "dropout": settings["dropout"], **saved.settings}


def _changes(layers: Mapping[str, AdapterLayer], adapter: Adapter) -> list[tuple[AdapterLayer, Change]]:
    return [(layers[name], change) for name, change in adapter.changes.items()]


def _factors(
    name: str, lora_A: Tensor, lora_B: Tensor, scaling: float, adapter: Adapter
) -> list[tuple[Tensor, Tensor]]:
    """Returns lora_A and lora_B, each with the value that will be copied into it."""
    pairs = list(zip((lora_A, lora_B), adapter.pairs[name], strict=True))
    for role, (parameter, value) in zip(("lora_A", "lora_B"), pairs, strict=True):
        _check_whole(f"{name}.{role}", parameter)
        check_tensor(f"{name}.{role}", value, tuple(parameter.shape), parameter.dtype)
    if not math.isclose(scaling, adapter.scaling(name), rel_tol=1e-9):
        expected = f"scale {scaling:g}, as in the model (a plain model takes the file's)"
        raise CheckpointError(f"lora_alpha of {name}", expected, f"{adapter.scaling(name):g}")
    return pairs


def _free_parameters(name: str, layer: AdapterLinear, adapter: Adapter) -> Sequence[Tensor]:
    """Returns values of the layer's free parameters that give the same product as the plain adapter of this name."""
    a, b = adapter.pairs[name]
    _check_whole_state(name, layer)
    check_tensor(f"{name}.lora_A", a, (a.shape[0], layer.in_features), torch.float64)
    check_tensor(f"{name}.lora_B", b, (layer.out_features, a.shape[0]), torch.float64)
    try:
        return layer.free_parameters_for(a, b, adapter.scaling(name))
    except checks.ArgumentError as error:
        raise CheckpointError(f"adapter of {name}", error.expected, error.got) from error


def _check_free(name: str, layer: AdapterLinear, saved: FreeLayer) -> None:
    """Raises CheckpointError unless the layer has the class, settings and shapes of its entry in the sidecar."""
    in_model = {"kind": sidecar.kind_of(layer).__name__} | {key: getattr(layer, key) for key in layer.INIT_ARGUMENTS}
    in_file = {"kind": saved.kind.__name__} | saved.settings
    for key, value in in_model.items():
        if in_file[key] != value:
            expected = f"{value!r}, as in the model (a plain model takes the file's)"
            raise CheckpointError(f"{key} of {name}", expected, repr(in_file[key]))
    _check_whole_state(name, layer)
    for role, value in zip(layer.SAVED_STATE, saved.tensors, strict=True):
        tensor = getattr(layer, role)
        sidecar.check_tensor(f"{name}.{role}", value, tensor.shape, tensor.dtype)


def _check_names(names: Collection[str], adapter: Adapter) -> None:
    """Raises CheckpointError unless the file has a pair for each of these layers, and no other."""
    missing, extra = sorted(set(names) - set(adapter.pairs)), sorted(set(adapter.pairs) - set(names))
    for unmatched, got in ((missing, "missing"), (extra, "an extra key: the model has no such layer")):
        if unmatched:
            more = f" and those of {len(unmatched) - 1} more layers" if len(unmatched) > 1 else ""
            key = f"keys {PREFIX}{unmatched[0]}.lora_A.weight and .lora_B.weight{more}"
            raise CheckpointError(key, f"one pair for each of the model's {len(names)} layers", got)


def _check_unmerged(name: str, layer: AdapterLayer) -> None:
    if layer.merged:
        raise CheckpointError("model", "unmerged layers (lf.unmerge_)", f"{name} merged")


def _check_whole_state(name: str, layer: AdapterLinear) -> None:
    for role in layer.SAVED_STATE:
        _check_whole(f"{name}.{role}", getattr(layer, role))


def _check_whole(name: str, parameter: Tensor) -> None:
    """Raises CheckpointError for a sharded or subclassed parameter, such as a DTensor."""
    if type(parameter) not in (Tensor, nn.Parameter):
        raise CheckpointError(name, "a plain parameter, not sharded", type(parameter).__name__)
