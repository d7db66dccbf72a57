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
from ..layers.dora_linear import DoRALinear
from ..layers.find import AdapterLayer, key_name
from ..layers.lora import LoRALinear
from ..quantized import family_of, reason_against
from ..surgery import inject, targets
from ..surgery.weight_reads import weight_reads
from . import base_weights, io, peft_config, sidecar, whole_modules
from .peft_config import CONFIG
from .peft_format import MAGNITUDE, PREFIX, Adapter, Change, check_tensor
from .sidecar import FreeLayer


@dataclass
class Plan:
    """The writes of one ``load_adapter``, all of them checked.

    Attributes:
        replacements: nn.Linear → the layer that replaces it; empty unless the model is plain.
        copies: a tensor of the model → its value.
        changes: a layer → the change of its frozen weight.
        whole: modules that are saved whole with the adapter (PEFT's ``modules_to_save``).
        others: name → what was restored there beside the adapters, for the report.
    """

    replacements: dict[nn.Linear, AdapterLinear] = field(default_factory=dict)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    changes: list[tuple[AdapterLayer, Change]] = field(default_factory=list)
    whole: list[nn.Module] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Writes into the model. Types, shapes and dtypes have been checked and the new layers exist, so only copies
        are left. A change given as terms needs the most memory: float32 temporaries for one weight at a time."""
        inject.place_(model, self.replacements)
        for tensor, value in self.copies:
            tensor.copy_(value)
        for layer, change in self.changes:
            base_weights.restore_(layer, change)
        for module in self.whole:
            setattr(module, whole_modules.MARK, True)
            if self.replacements:
                module.requires_grad_(True)  # it is trained, as the new layers are

    def add_other(self, key: str, tensor: Tensor, value: Tensor) -> None:
        """Adds a tensor beside the pairs. A module has one dtype, so the value may be rounded, which the report tells.

        Raises:
            CheckpointError: another shape.
        """
        if value.shape != tensor.shape:
            resize = " (model.resize_token_embeddings first)" if value.shape[1:] == tensor.shape[1:] else ""
            raise CheckpointError(f"key {PREFIX}{key}", f"shape {tuple(tensor.shape)}{resize}", tuple(value.shape))
        self.copies.append((tensor, value))
        name, _, last = key.replace(".base_layer.", ".").rpartition(".")
        rounded = (
            "" if torch.promote_types(value.dtype, tensor.dtype) == tensor.dtype else f" rounded to {tensor.dtype}"
        )
        before = f"{self.others[name]}, " if name in self.others else ""
        self.others[name] = f"{before}{last} {tuple(value.shape)}{rounded}"


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
    for name, layer in layers.items():
        check_unmerged(name, layer)
    check_our_layers(layers, adapter)
    plan = Plan(changes=changes_of(layers, adapter))
    _add_others(plan, model, adapter)
    base_weights.check(model, layers, adapter, plan.others)
    for name, layer in layers.items():
        if not layer.SAVED_STATE:
            plan.copies += _copies(name, layer, layer.TRAINABLE, _values(name, adapter))
        else:
            destinations = [io.destination(f"{name}.{role}", layer, role) for role in layer.SAVED_STATE]
            if name in free:
                _check_free(name, layer, free[name])
            values = free[name].tensors if name in free else _free_parameters(name, layer, adapter)
            plan.copies += zip(destinations, values, strict=True)
    return plan


def check_our_layers(layers: dict[str, AdapterLinear], adapter: Adapter) -> None:
    """Raises CheckpointError unless the adapter has the kind, the names and the scales of these layers. Saving calls it
    too, so that nothing is written that could not be loaded."""
    peft_config.require_plain(adapter.config)
    check_names(layers, adapter)
    _check_magnitudes(adapter, {isinstance(layer, DoRALinear) for layer in layers.values()})
    for name, layer in layers.items():
        if not layer.SAVED_STATE:
            check_tensor(f"{name}.lora_A", adapter.pairs[name][0], (layer.r, layer.in_features), torch.float64)
            check_scaling(name, float(layer.scaling), adapter.scaling(name))


def into_plain_model(model: nn.Module, adapter: Adapter, free: dict[str, FreeLayer]) -> Plan:
    """Plans to replace linear layers of a plain model by the layers of an adapter's files.

    Args:
        free: bare name → the layer's entry in the sidecar; empty if there is no sidecar.

    Raises:
        CheckpointError: the adapter does not fit the model's linear layers.
        ArgumentError: a model that is a single layer.
    """
    inject.check_plain(model)
    peft_config.require_plain(adapter.config)
    _check_magnitudes(adapter, None)
    # The files have names without wrappers such as torch.compile's. get_submodule needs the model's own names.
    real_names = {key_name(name): name for name, _ in model.named_modules() if name}
    plan = Plan()
    _add_others(plan, model, adapter)
    check_names([name for name in real_names if name in adapter.pairs or adapter.targets(name)], adapter)
    kinds: dict[str, tuple[type[AdapterLinear], dict]] = {}
    linears: dict[str, Any] = {}  # each is an nn.Linear, which ``targets.unsupported`` checks below
    reads = weight_reads(model)
    for name in adapter.pairs:
        linear: Any = model.get_submodule(real_names[name])
        linears[name] = linear
        reason = targets.unsupported(linear, reads)
        if reason is not None or not adapter.targets(name):
            expected = "a torch.nn.Linear among the config's target_modules"
            raise CheckpointError(f"keys of {name}", expected, reason or "not among them")
        _check_pair(name, linear, *_values(name, adapter))
        kinds[real_names[name]] = _kind(adapter, name, free.get(name))
    base_weights.check(model, linears, adapter, plan.others)
    plan.replacements = inject.build_layers(model, kinds)
    layers = {name: plan.replacements[linear] for name, linear in linears.items()}
    plan.changes = changes_of(layers, adapter)
    # No checks are needed here, because the layers were built with the class, settings and shapes in the files.
    for name, layer in layers.items():
        if isinstance(layer, LoRALinear):  # whose constructor takes no alpha of 0 or below
            layer.alpha, layer.scaling = adapter.settings(name)["alpha"], adapter.scaling(name)
        roles = layer.SAVED_STATE if name in free else layer.TRAINABLE
        values = free[name].tensors if name in free else _values(name, adapter)
        plan.copies += zip([getattr(layer, role) for role in roles], values, strict=True)
    return plan


def _values(name: str, adapter: Adapter) -> tuple[Tensor, ...]:
    """Returns the values of the parameters of a LoRALinear, or of a DoRALinear, in the order of its ``TRAINABLE``."""
    pair = adapter.pairs[name]
    return (*pair, adapter.magnitudes[name]) if name in adapter.magnitudes else pair


def _check_magnitudes(adapter: Adapter, in_model: set[bool] | None) -> None:
    """Raises CheckpointError unless the file has magnitudes of all its layers, or, without ``use_dora``, of none.

    Args:
        in_model: whether the model's layers are DoRALinears, of which both kinds do not go together in one config of
            PEFT's; None for a plain model.
    """
    use_dora = bool(adapter.config.get("use_dora"))
    if in_model is not None and in_model != {use_dora}:
        expected = "DoRALinear layers alone, or none" if len(in_model) > 1 else f"{not use_dora}, as in the model"
        raise CheckpointError(f"use_dora in {CONFIG}", expected, "both kinds" if len(in_model) > 1 else use_dora)
    for name in adapter.pairs:
        if use_dora is not (name in adapter.magnitudes):
            expected, got = (
                ("in the file, for use_dora", "missing") if use_dora else ("no key without use_dora", "an extra key")
            )
            raise CheckpointError(f"key {PREFIX}{name}.{MAGNITUDE}", expected, got)
        if use_dora and tuple(adapter.magnitudes[name].shape) != (shape := (len(adapter.pairs[name][1]),)):
            raise CheckpointError(
                f"key {PREFIX}{name}.{MAGNITUDE}", f"shape {shape}", tuple(adapter.magnitudes[name].shape)
            )


def _check_pair(name: str, linear: nn.Linear, a: Tensor, b: Tensor, magnitude: Tensor | None = None) -> None:
    """Raises CheckpointError unless a new layer in place of ``linear`` will hold the pair without loss."""
    dtype = torch.float32  # of the factors that ``from_linear`` creates
    if family_of(linear) is None:
        io.check_destination(f"{name}.weight", linear.weight)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
    elif reason := reason_against(linear):
        raise CheckpointError(name, "a quantised weight that the ops can use", reason)
    d_in, d_out = sizes(linear)
    check_tensor(f"{name}.lora_A", a, (a.shape[0], d_in), dtype)
    check_tensor(f"{name}.lora_B", b, (d_out, a.shape[0]), dtype)
    if magnitude is not None:
        check_tensor(f"{name}.{MAGNITUDE}", magnitude, (d_out,), dtype)


def _kind(adapter: Adapter, name: str, saved: FreeLayer | None) -> tuple[type[AdapterLinear], dict]:
    """Returns the class of a new layer and the arguments of its ``from_linear``."""
    settings = adapter.settings(name)
    if saved is None:
        kind = DoRALinear if name in adapter.magnitudes else LoRALinear
        return kind, settings | {"r": _rank(settings["r"]), "alpha": abs(settings["alpha"]) or 1.0}
    return saved.kind, {"r": settings["r"], "dropout": settings["dropout"], **saved.settings}


def changes_of(layers: Mapping[str, AdapterLayer], adapter: Adapter) -> list[tuple[AdapterLayer, Change]]:
    """Returns the layers whose frozen weight training has changed, each with the change."""
    return [(layers[name], change) for name, change in adapter.changes.items()]


def _rank(r: int) -> int:
    """Returns the rank; raises CheckpointError for one that no layer of this package has."""
    try:
        return checks.rank(r)
    except checks.ArgumentError as error:
        raise CheckpointError(f"r in {CONFIG}", error.expected, error.got) from error


def _add_others(plan: Plan, model: nn.Module, adapter: Adapter) -> None:
    """Adds what the file has beside the pairs, for a model without PEFT's layers."""
    copies, plan.whole = whole_modules.destinations(model, adapter)
    for key, tensor, value in copies:
        plan.add_other(key, tensor, value)


def _copies(
    name: str, layer: AdapterLinear, roles: Sequence[str], values: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Returns the layer's parameters, each with the value that will be copied into it."""
    copies = []
    for role, value in zip(roles, values, strict=True):
        parameter = io.destination(f"{name}.{role}", layer, role)
        check_tensor(f"{name}.{role}", value, tuple(parameter.shape), parameter.dtype)
        copies.append((parameter, value))
    return copies


def check_scaling(name: str, in_model: float, in_file: float) -> None:
    """Raises CheckpointError unless the scales are equal."""
    if not math.isclose(in_model, in_file, rel_tol=1e-9):
        expected = f"scale {in_model:g}, as in the model (a plain model takes the file's)"
        raise CheckpointError(f"lora_alpha of {name}", expected, f"{in_file:g}")


def _free_parameters(name: str, layer: AdapterLinear, adapter: Adapter) -> Sequence[Tensor]:
    """Returns values of the layer's free parameters that give the same product as the plain adapter of this name."""
    a, b = adapter.pairs[name]
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
            raise CheckpointError(f"{key} of {name}", expected, checks.shown(in_file[key]))
    for role, value in zip(layer.SAVED_STATE, saved.tensors, strict=True):
        tensor = getattr(layer, role)
        sidecar.check_tensor(f"{name}.{role}", value, tensor.shape, tensor.dtype)


def check_names(names: Collection[str], adapter: Adapter) -> None:
    """Raises CheckpointError unless the file has a pair for each of these layers, and no other."""
    missing, extra = sorted(set(names) - set(adapter.pairs)), sorted(set(adapter.pairs) - set(names))
    for unmatched, got in ((missing, "missing"), (extra, "an extra key: the model has no such layer")):
        if unmatched:
            more = f" and those of {len(unmatched) - 1} more layers" if len(unmatched) > 1 else ""
            key = f"keys {PREFIX}{unmatched[0]}.lora_A.weight and .lora_B.weight{more}"
            raise CheckpointError(key, f"one pair for each of the model's {len(names)} layers", got)


def check_unmerged(name: str, layer: AdapterLayer) -> None:
    """Raises CheckpointError for a merged layer."""
    if layer.merged:
        raise CheckpointError("model", "unmerged layers (lf.unmerge_)", f"{name} merged")
