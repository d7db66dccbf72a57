"""Which (lora_A, lora_B) pairs a model has, ours and PEFT's, and whether a set of pairs makes sense."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from . import checks
from .layers import peft_layers
from .linear import LoRALinear
from .merging import weight_owners


@dataclass(eq=False)
class Pair:
    """One adapter.

    Attributes:
        name: of its layer, for messages.
        a: lora_A (r, d_in). b: lora_B (d_out, r).
        scaling: alpha / r.
        weight: the frozen (d_out, d_in) weight that it adapts, or None.
        unmergeable: why nothing may be merged into that weight, or None.
        layer: the LoRALinear or PEFT layer, or None; what is merged into its weight is noted there (changed_base.py).
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float = 1.0
    weight: Tensor | None = None
    unmergeable: str | None = None
    layer: nn.Module | None = None


def of_model(model: nn.Module) -> list[Pair]:
    """The pairs of every LoRALinear and of the active adapters of every PEFT layer that has lora_A and lora_B matrices.
    A pair without a trainable factor is left out."""
    owners = weight_owners(model)
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            reason = "already merged" if layer.merged else _shared(layer.weight, owners)
            found.append(Pair(name, layer.lora_A, layer.lora_B, layer.scaling, layer.weight, reason, layer))
    for name, layer in peft_layers(model).items():
        factors_a, factors_b = getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})
        for adapter in layer.active_adapters:
            a, b = (_weight(factors, adapter) for factors in (factors_a, factors_b))
            if a is None or b is None or a.dim() != 2 or b.dim() != 2:
                continue
            weight, reason = _base_weight(layer, adapter, owners)
            found.append(Pair(f"{name}.{adapter}", a, b, float(layer.scaling[adapter]), weight, reason, layer))
    return [pair for pair in found if pair.a.requires_grad or pair.b.requires_grad]


def of_tensors(entries: Iterable, argument: str = "model") -> list[Pair]:
    """Pairs from (lora_A, lora_B[, scaling[, weight]]) tuples."""
    found = []
    for i, entry in enumerate(entries):
        if isinstance(entry, Pair):
            found.append(entry)
            continue
        if not isinstance(entry, (tuple, list)) or not 2 <= len(entry) <= 4:
            size = f" of {len(entry)}" if isinstance(entry, (tuple, list)) else ""
            got = type(entry).__name__ + size
            raise checks.ArgumentError(f"{argument}[{i}]", "a pair (lora_A, lora_B[, scaling[, weight]])", got)
        if entry[0] is None or entry[1] is None:
            raise checks.ArgumentError(f"{argument}[{i}]", "both factors", "an unpaired factor (the other is None)")
        found.append(Pair(f"{argument}[{i}]", *entry))
    return found


def check(pairs: list[Pair], trained: set[int]) -> None:
    """Raises ArgumentError unless every pair fits and no two share a tensor, nor one with ``trained``, the ids of the
    parameters that the optimizer already has."""
    seen: dict[int, str] = {}
    for pair in pairs:
        for factor, tensor in (("lora_A", pair.a), ("lora_B", pair.b)):
            argument = f"{pair.name}.{factor}"
            if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.dtype not in checks.FLOATS:
                got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise checks.ArgumentError(argument, "a floating-point matrix", got)
            if type(tensor) not in (Tensor, nn.Parameter):
                raise checks.ArgumentError(argument, "a plain tensor (not sharded)", type(tensor).__name__)
            if id(tensor) in seen or id(tensor) in trained:
                other = seen.get(id(tensor), "another group")
                raise checks.ArgumentError(argument, "a tensor of its own", f"the tensor that {other} also holds")
            seen[id(tensor)] = argument
        _check_pair(pair)


def _check_pair(pair: Pair) -> None:
    a, b = pair.a, pair.b
    if b.shape[1] != a.shape[0] or not 1 <= a.shape[0] <= checks.MAX_RANK:
        expected = f"shape (d_out, {a.shape[0]}) to fit lora_A {tuple(a.shape)}, rank 1 to {checks.MAX_RANK}"
        raise checks.ArgumentError(f"{pair.name}.lora_B", expected, tuple(b.shape))
    if a.dtype != b.dtype or a.device != b.device:
        expected = f"{a.dtype} on {a.device}, as lora_A"
        raise checks.ArgumentError(f"{pair.name}.lora_B", expected, f"{b.dtype} on {b.device}")
    if not isinstance(pair.scaling, checks.NUMBERS) or not math.isfinite(pair.scaling):
        raise checks.ArgumentError(f"{pair.name}.scaling", "a finite number", repr(pair.scaling))
    expected_shape = (b.shape[0], a.shape[1])
    if pair.weight is not None and tuple(pair.weight.shape) != expected_shape and pair.unmergeable is None:
        raise checks.ArgumentError(f"{pair.name}.weight", f"shape {expected_shape}", tuple(pair.weight.shape))


def _weight(factors, adapter: str) -> Tensor | None:
    return getattr(factors[adapter], "weight", None) if adapter in factors else None


def _base_weight(layer: nn.Module, adapter: str, owners: dict[int, list[str]]) -> tuple[Tensor | None, str | None]:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if type(base) is not nn.Linear or type(weight) is not nn.Parameter or weight.dtype not in checks.FLOATS:
        return None, f"base layer {type(base).__name__} with a weight of {getattr(weight, 'dtype', None)}"
    if layer.fan_in_fan_out or adapter in layer.lora_variant:
        return None, "more than scaling · b a on the base weight"
    return weight, "already merged" if layer.merged else _shared(weight, owners)


def _shared(weight: Tensor, owners: dict[int, list[str]]) -> str | None:
    names = owners[id(weight)]
    return f"one weight held by {' and '.join(names)}: both would change" if len(names) > 1 else None


def check_mergeable(pairs: list[Pair]) -> None:
    """Raises ArgumentError unless something may be merged into every pair's weight, and no two share one."""
    seen: dict[int, str] = {}
    for pair in pairs:
        weight, argument = pair.weight, f"{pair.name}.weight"
        if weight is None or pair.unmergeable:
            raise checks.ArgumentError(argument, "a weight that ScaLoRA can merge into", pair.unmergeable or "none")
        if weight.dtype not in checks.FLOATS or weight.requires_grad:
            got = "a trained weight" if weight.requires_grad else f"{weight.dtype} (quantised)"
            raise checks.ArgumentError(argument, "a frozen floating-point weight", got)
        place = weight.data_ptr() if weight.device.type != "meta" else id(weight)
        if place in seen:
            raise checks.ArgumentError(argument, "a weight of its own", f"the weight that {seen[place]} also has")
        seen[place] = argument
