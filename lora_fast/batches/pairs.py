"""Finds the (lora_A, lora_B) pairs of a model, those of this library and of PEFT, and checks that a set of pairs
fits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..kernels.limits import LARGEST_RANK
from ..layers.find import PeftLayer, bare_name, expert_count, peft_layers
from ..layers.lora import LoRALinear
from ..quantized import family_of, reason_against_merge
from ..surgery.merge import weight_owners

WHOLE = "a plain tensor"
BEYOND_PRODUCT = "more than scaling · b a on the base weight"
FORM = "(lora_A, lora_B[, scaling[, weight]])"
DEFAULTS: tuple[Any, ...] = (1.0, None)  # of scaling and weight
Entry = tuple[dict, str, object]  # a module's dictionary of parameters or of children, a key, what it holds


@dataclass(eq=False)
class Pair:
    """An adapter: one product b a, or the products of E experts, which PEFT's ``target_parameters`` keep in one pair.

    Attributes:
        name: name of the layer, for error messages.
        a: lora_A (r, d_in). b: lora_B (d_out, r). With experts, lora_A is (E·r, d_in) with expert-major rows, and
            lora_B is (d_out, r·E) with rank-major columns: column k·E + e is column k of expert e.
        scaling: alpha / r.
        given_weight: the frozen weight of a pair that has no layer, or None.
        unmergeable: the reason why nothing may be merged into the weight, or None.
        layer: the LoRALinear or PEFT layer, or None. The merges into its weight are recorded on it
            (layers/merge_log.py).
        adapter: the adapter's name in a PEFT layer.
        experts: E; 1 for an ordinary pair.
        transposed: whether the experts' weight is stored as (E, d_in, d_out).
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float = 1.0
    given_weight: Tensor | None = None
    unmergeable: str | None = None
    layer: PeftLayer | LoRALinear | None = None
    adapter: str | None = None
    experts: int = 1
    transposed: bool = False

    @property
    def weight(self) -> Tensor | None:
        """Returns the frozen (d_out, d_in) weight that the pair adapts, or None. With experts it is (E, d_out, d_in).
        It is read from the layer each time and not held, so that a wrapper that shards the weight frees the whole
        one."""
        if self.layer is None:
            return self.given_weight
        return self.layer.weight if self.adapter is None else _base_weight(self.layer, self.adapter)[0]

    @property
    def entries(self) -> list[Entry]:
        """Returns the entries of the layer's dictionaries under which it holds a and b, with what they hold now. There
        are none for a pair without a layer. PEFT keeps each factor in a module, which it may replace, too."""
        entries: list[Entry] = []
        for module, key, name in self._holders():
            holder: nn.Module | None = module
            if key is not None:
                holder = module._modules.get(key)
                entries.append((module._modules, key, holder))
            if holder is not None:
                entries.append((holder._parameters, name, holder._parameters.get(name)))
        return entries

    def _holders(self) -> list[tuple[nn.Module, str | None, str]]:
        """Returns for a and b a module of the layer, the name of its child if that holds the factor, and the factor's
        name there."""
        if self.layer is None:
            return []
        if self.adapter is None:
            return [(self.layer, None, "lora_A"), (self.layer, None, "lora_B")]
        return [(getattr(self.layer, name), self.adapter, "weight") for name in ("lora_A", "lora_B")]

    def found_anew(self) -> Pair | None:
        """Returns the pair with the factors that the layer holds now, or None if it holds none. A pair without a layer
        is returned itself.

        Raises:
            ArgumentError: the layer's factors are no parameters any more.
        """
        if self.layer is None:
            return self
        factors = []
        for module, key, name in self._holders():
            holder = module if key is None else module._modules.get(key)
            if holder is None:  # the adapter was removed
                return None
            factors.append(getattr(holder, name, None))
            if isinstance(factors[-1], Tensor) and name not in holder._parameters:
                expected = "a parameter, in an optimizer that is made after the model is wrapped"
                got = "a view of another tensor, as FSDP1 makes with use_orig_params=False"
                raise checks.ArgumentError(f"{self.name}.{name}", expected, got)
        present = [p for p in factors if p is not None]
        return replace(self, a=present[0], b=present[1]) if len(present) == 2 else None

    @property
    def is_whole(self) -> bool:
        """Returns whether both factors are plain matrices: not sharded, and no views of a wrapper's flat parameter."""
        return all(type(p) in checks.PLAIN and p.dim() == 2 and p.is_leaf for p in (self.a, self.b))

    @property
    def named_factors(self) -> list[tuple[str, Tensor]]:
        """Returns a and b with the names that they have in an optimizer's groups, whatever wrappers the model is in."""
        name = bare_name(self.name)
        return [(f"{name}.lora_A", self.a), (f"{name}.lora_B", self.b)]

    @property
    def trained_factors(self) -> list[tuple[str, Tensor]]:
        """Returns those of ``named_factors`` that are trained."""
        return [(name, p) for name, p in self.named_factors if p.requires_grad]

    @property
    def mergeable_weight(self) -> Tensor:
        """Returns the weight of a pair that ``check_mergeable`` has accepted."""
        assert self.weight is not None, f"{self.name}: a pair of a checked method has a weight"
        return self.weight

    @property
    def rank(self) -> int:
        """Returns r, which for experts is the rank of each."""
        return self.a.shape[0] // self.experts

    @property
    def product_names(self) -> list[str]:
        """Returns a name for each product: the pair's own, or with experts "<name>.<number of the expert>"."""
        return [self.name] if self.experts == 1 else [f"{self.name}.{e}" for e in range(self.experts)]

    def whole(self) -> Pair:
        """Returns the same parameters as one product, for operations that work entry by entry."""
        return self if self.experts == 1 else replace(self, experts=1)

    def split_a(self, x: Tensor) -> Tensor:
        """Returns a view (E, r, d_in) of a tensor of a's shape: a itself, its gradient or its state."""
        return x.unflatten(0, (self.experts, -1))

    def split_b(self, x: Tensor) -> Tensor:
        """Returns a view (E, d_out, r) of a tensor of b's shape."""
        return x.unflatten(1, (-1, self.experts)).permute(2, 0, 1)

    def split_weight(self, x: Tensor) -> Tensor:
        """Returns a view (E, d_out, d_in) of a tensor of the weight's shape."""
        x = x[None] if self.experts == 1 else x
        return x.mT if self.transposed else x


def find_pairs(model: nn.Module) -> list[Pair]:
    """Returns the pairs of every LoRALinear, and of the active adapters of every PEFT layer that has lora_A and lora_B
    matrices. The experts of one parameter (``target_parameters``) are one pair. Pairs without a trainable factor are
    omitted."""
    owners = weight_owners(checks.module(model))
    pairs = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            reason = "already merged" if layer.merged else _shared(layer.weight, owners)
            if layer.fan_in_fan_out:
                reason = "weight of a Conv1D, stored as (d_in, d_out)"
            if layer.scales_weight:
                reason = BEYOND_PRODUCT
            if layer.base is not None:
                reason = reason_against_merge(layer.base)
            pairs.append(Pair(name, layer.lora_A, layer.lora_B, float(layer.scaling), None, reason, layer))
    for name, layer in peft_layers(model).items():
        factors_a, factors_b = getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})
        for adapter in layer.active_adapters:
            a, b = (_weight(factors, adapter) for factors in (factors_a, factors_b))
            if a is None or b is None or not all(_is_matrix(factors[adapter]) for factors in (factors_a, factors_b)):
                continue
            weight, reason = _base_weight(layer, adapter)
            if reason is None and weight is not None:
                reason = "already merged" if layer.merged else _shared(weight, owners)
            experts = expert_count(layer)
            # PEFT sets this attribute for weights stored as (E, d_out, d_in); older versions have the other layout
            # only.
            transposed = experts > 1 and not getattr(layer, "_did_swap_in_out_features", False)
            settings = float(layer.scaling[adapter]), None, reason, layer, adapter, experts, transposed
            pairs.append(Pair(f"{name}.{adapter}", a, b, *settings))
    return [pair for pair in pairs if pair.a.requires_grad or pair.b.requires_grad]


def make_pairs(entries: object, argument: str = "model") -> list[Pair]:
    """Returns pairs made from (lora_A, lora_B[, scaling[, weight]]) tuples; entries that are pairs already are kept.

    Raises:
        ArgumentError: an entry of another form, or without one of its factors.
    """
    if not isinstance(entries, Iterable) or isinstance(entries, (str, bytes, dict, Tensor)):
        raise checks.ArgumentError(argument, f"a torch.nn.Module or a list of pairs {FORM}", checks.shown(entries))
    pairs = []
    for i, entry in enumerate(entries):
        if isinstance(entry, Pair):
            pairs.append(entry)
            continue
        is_sequence = isinstance(entry, (tuple, list))
        if isinstance(entry, (Tensor, dict)) or (is_sequence and entry and isinstance(entry[0], str)):
            expected = f"a pair {FORM}, or the model itself in place of its parameters"
            got = f"a parameter group, {checks.shown(entry)} (LoRAAdamW(model, groups=…) takes such groups)"
            got = got if isinstance(entry, dict) else f"a parameter, {checks.shown(entry)}"
            raise checks.ArgumentError(f"{argument}[{i}]", expected, got)
        if not is_sequence or not 2 <= len(entry) <= 4:
            got = type(entry).__name__ + (f" of {len(entry)}" if is_sequence else "")
            raise checks.ArgumentError(f"{argument}[{i}]", f"a pair {FORM}", got)
        if entry[0] is None or entry[1] is None:
            raise checks.ArgumentError(f"{argument}[{i}]", "both factors", "an unpaired factor (the other is None)")
        a, b, scaling, weight = list(entry) + list(DEFAULTS[len(entry) - 2 :])
        pairs.append(Pair(f"{argument}[{i}]", a, b, checks.plain_number(scaling), weight))
    return pairs


def check(pairs: list[Pair], trained: set[int], whole: bool) -> None:
    """Raises ArgumentError unless every pair fits and no tensor occurs twice, neither among the pairs nor in
    ``trained``, the ids of the parameters that the optimizer already has. With ``whole``, no factor may be sharded."""
    seen: dict[int, str] = {}
    for pair in pairs:
        for factor, tensor in (("lora_A", pair.a), ("lora_B", pair.b)):
            argument = f"{pair.name}.{factor}"
            if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.dtype not in checks.FLOATS:
                got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise checks.ArgumentError(argument, "a floating-point matrix (not flattened by a wrapper)", got)
            if whole and type(tensor) not in checks.PLAIN:
                raise checks.ArgumentError(argument, f"{WHOLE} (not sharded)", type(tensor).__name__)
            if not tensor.is_leaf:
                raise checks.ArgumentError(
                    argument, f"{WHOLE} (not flattened by a wrapper)", "a view of another tensor"
                )
            if id(tensor) in seen or id(tensor) in trained:
                other = seen.get(id(tensor), "another group")
                raise checks.ArgumentError(argument, "a tensor of its own", f"the tensor that {other} also holds")
            seen[id(tensor)] = argument
        _check_pair(pair)


def check_memory(pairs: list[Pair]) -> None:
    """Raises ArgumentError if two factors are views of one memory, which one of their steps would overwrite."""
    places: dict[tuple[torch.device, int], str] = {}
    for pair in pairs:
        for factor, tensor in (("lora_A", pair.a), ("lora_B", pair.b)):
            argument = f"{pair.name}.{factor}"
            if type(tensor) in checks.PLAIN and (address := tensor.data_ptr()):  # 0 on meta, or released by a wrapper
                other = places.setdefault((tensor.device, address), argument)
                if other != argument:
                    got = f"a view of the memory of {other}"
                    raise checks.ArgumentError(argument, "a tensor of its own", got)


def _check_pair(pair: Pair) -> None:
    a, b = pair.a, pair.b
    if b.shape[1] != a.shape[0] or a.shape[0] % pair.experts or not 1 <= pair.rank <= LARGEST_RANK:
        each = f" for each of {pair.experts} experts" if pair.experts > 1 else ""
        expected = f"shape (d_out, {a.shape[0]}) to fit lora_A {tuple(a.shape)}, rank 1 to {LARGEST_RANK}{each}"
        raise checks.ArgumentError(f"{pair.name}.lora_B", expected, tuple(b.shape))
    if a.dtype != b.dtype or a.device != b.device:
        expected = f"{a.dtype} on {a.device}, as lora_A"
        raise checks.ArgumentError(f"{pair.name}.lora_B", expected, f"{b.dtype} on {b.device}")
    if not isinstance(pair.scaling, checks.NUMBERS) or not math.isfinite(pair.scaling):
        raise checks.ArgumentError(f"{pair.name}.scaling", "a finite number", checks.shown(pair.scaling))
    expected_shape: tuple[int, ...] = (a.shape[1], b.shape[0]) if pair.transposed else (b.shape[0], a.shape[1])
    if pair.experts > 1:
        expected_shape = (pair.experts, *expected_shape)
    if pair.weight is not None and not isinstance(pair.weight, Tensor):
        raise checks.ArgumentError(f"{pair.name}.weight", "a torch.Tensor or None", checks.shown(pair.weight))
    if pair.weight is not None and tuple(pair.weight.shape) != expected_shape and pair.unmergeable is None:
        raise checks.ArgumentError(f"{pair.name}.weight", f"shape {expected_shape}", tuple(pair.weight.shape))


def _weight(factors, adapter: str) -> Tensor | None:
    return getattr(factors[adapter], "weight", None) if adapter in factors else None


def _is_matrix(holder: Any) -> bool:
    """Returns whether PEFT's module of a factor holds a matrix, which a wrapper may have flattened."""
    return isinstance(holder, nn.Linear) or holder.weight.dim() == 2


def _base_weight(layer: PeftLayer, adapter: str) -> tuple[Tensor | None, str | None]:
    """Returns the weight that an adapter of a PEFT layer adapts, or None and the reason why nothing can be merged into
    it."""
    base = layer.get_base_layer()
    has_experts = expert_count(layer) > 1
    weight: Any = layer.get_param() if has_experts else getattr(base, "weight", None)
    plain = type(weight) is nn.Parameter and weight.dtype in checks.FLOATS  # quantised weights are of other types
    if not has_experts and family_of(base) is not None:
        return None, reason_against_merge(base)
    if not plain or not (has_experts or type(base) is nn.Linear):
        return None, f"base layer {type(base).__name__} with a weight of {getattr(weight, 'dtype', None)}"
    if layer.fan_in_fan_out or adapter in layer.lora_variant:
        return None, BEYOND_PRODUCT
    return weight, None


def _shared(weight: Tensor, owners: dict[int, list[str]]) -> str | None:
    names = owners.get(id(weight))
    if names is None:
        return "weight that a parametrization computes"
    return f"one weight held by {' and '.join(names)}: both would change" if len(names) > 1 else None


def check_unmerged(pairs: Iterable[Pair]) -> None:
    """Raises ArgumentError if a pair with a gradient is merged into its weight."""
    for pair in pairs:
        if (pair.a.grad is not None or pair.b.grad is not None) and getattr(pair.layer, "merged", False):
            expected = "a weight without a merged adapter at a step that changes it (lf.unmerge_)"
            raise checks.ArgumentError(f"{pair.name}.weight", expected, "already merged")


def check_mergeable(pairs: list[Pair]) -> None:
    """Raises ArgumentError unless every pair's weight can take a merge and no two pairs share a weight."""
    seen: dict[int, str] = {}
    for pair in pairs:
        weight, argument = pair.weight, f"{pair.name}.weight"
        if weight is None or pair.unmergeable:
            raise checks.ArgumentError(argument, "a weight that ScaLoRA can merge into", pair.unmergeable or "none")
        if weight.is_meta:
            raise checks.ArgumentError(argument, "a weight with its data", "one on the meta device (offloaded)")
        if weight.dtype not in checks.FLOATS or weight.requires_grad:
            got = "a trained weight" if weight.requires_grad else f"{weight.dtype} (quantised)"
            raise checks.ArgumentError(argument, "a frozen floating-point weight", got)
        place = weight.data_ptr()
        if place in seen:
            raise checks.ArgumentError(argument, "a weight of its own", f"the weight that {seen[place]} also has")
        seen[place] = argument
