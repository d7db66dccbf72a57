"""Linear layers of one x, with their LoRA adapters, as one differentiable op, and the node by which layers share a dx.

``LoRAGroupFunction`` computes all members (at most ``MOST``) at once: x is read once for all S and once for all da, and
dx is written once. Saved are x, once, and every S.

Where the members are not known before they are called (layers/groups.py), the first one enters by ``enter``, whose node
passes x on, and all of them run on the result by ``JoinedFunction``. In backward each hands its part of dx to the node
and returns no gradient of x. Autograd runs the node after all members that run in this backward, and the node returns
the sum. Both ways call the same functions in the same order, so that all gradients have the same bits.

Where backward itself is differentiated or mapped, in compiled autograd, and while a mode of torch is to see the
registered ops, each member computes its own gradients and dx is their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import composite, linear, quantized
from .observers import named, not_compiled, sees_ops
from .reference.linear import keep_scale

MOST = 4  # members of a node
_N = 4  # tensors of a member: weight, bias, lora_A, lora_B

_traced, _any_autocast, _graph_task, _runs = (
    torch.compiler.is_compiling,
    torch._C._is_any_autocast_enabled,
    torch._C._current_graph_task_id,
    torch._C._will_engine_execute_node,
)


# A layer of a group: weight, bias, lora_A, lora_B, scaling, dropout_p, seed (read where there is dropout). Weight and
# bias may have another dtype than x under autocast.
Member = tuple[Tensor, Tensor | None, Tensor, Tensor, float, float, int | Tensor | None]


def forward(ops, x: Tensor, members: Sequence[Member], rounded: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Returns y (..., d_out) and S (n_tokens, r) of each member. Weights and biases are cast to x's dtype; with
    ``rounded`` (autocast) the factors are rounded to it, too."""
    if _has_quantized(members):
        with named("lora_fast::lora_linear_group"):
            return quantized.forward(ops, x, members)
    calls, dtype = [], x.dtype
    for weight, bias, a, b, scaling, dropout_p, seed in members:
        if weight.dtype is not dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        scaling, keep = _masked(ops, x, scaling, dropout_p, seed) if dropout_p else (scaling, None)
        calls.append((weight, bias, a, b, scaling, keep))
    with named("lora_fast::lora_linear_group"):
        return ops.group_forward(x, calls, rounded)


def backward(ops, dys, x, ss, members: Sequence[Member], rounded: bool, needs: tuple) -> tuple:
    """Returns dx, and da and db of each member. ``needs``: of x, of each a and of each b. A member whose dy is None has
    no gradients. Autocast is turned off, as in ``linear.backward``."""
    if _any_autocast():
        with torch.autocast(x.device.type, enabled=False):
            return backward(ops, dys, x, ss, members, rounded, needs)
    if _has_quantized(members):
        with named("lora_fast::lora_linear_group_backward"):
            return quantized.backward(ops, dys, x, ss, members, needs)
    calls, (need_x, need_a, _), dtype = [], needs, x.dtype
    for i, (weight, _, a, b, scaling, dropout_p, seed) in enumerate(members):
        if need_x and weight.dtype is not dtype:  # only dx reads it
            weight = weight.to(dtype)
        keep = None
        if dropout_p:
            scaling, keep = _masked(ops, x, scaling, dropout_p, seed, dys[i] is not None and (need_x or need_a[i]))
        calls.append((weight, None, a, b, scaling, keep))
    with named("lora_fast::lora_linear_group_backward"):
        return ops.group_backward(dys, x, ss, calls, rounded, needs)


def _each(ops, dys, x, ss, members, rounded, needs) -> tuple:
    """Returns what ``backward`` does, by the registered op or by differentiable ops for each member."""
    compute: Any = linear.differentiable_backward if not _traced() and _is_second(dys) else linear.backward_node
    dx, das, dbs = None, [], []
    for dy, s, member, need_a, need_b in zip(dys, ss, members, *needs[1:], strict=True):
        weight, _, *rest = member
        need = needs[0], need_a, need_b
        used = dy is not None and any(need)
        part, da, db = compute(ops, dy, x, s, weight, *rest, rounded, need) if used else (None,) * 3
        dx = part if dx is None else dx if part is None else dx + part
        das.append(da)
        dbs.append(db)
    return dx, das, dbs


def _is_second(dys) -> bool:
    """Returns whether backward itself is differentiated or mapped."""
    return torch.is_grad_enabled() or not all([dy is None or composite.is_plain(dy) for dy in dys])


def _one_by_one(ops, dys) -> bool:
    """Returns whether each member computes its own gradients, as the module's docstring says."""
    return _traced() or _is_second(dys) or (ops is not linear.reference and sees_ops())


def _has_quantized(members: Sequence[Member]) -> bool:
    return any([weight.dtype is None for weight, *_ in members])


def _masked(ops, x: Tensor, scaling: float, dropout_p: float, seed, needed: bool = True) -> tuple:
    """Returns the scaling with the mask's scale, and the mask, or None if it is not needed."""
    return scaling * keep_scale(dropout_p), ops.draw_mask(x, dropout_p, seed) if needed else None


class LoRAGroupFunction(torch.autograd.Function):
    """Computes y of each member. ``tensors``: the first four fields of one member after the other, for autograd.
    ``at_backward`` is called with the indices of those that take part when backward runs."""

    @staticmethod
    @not_compiled
    def forward(ctx, ops, x, rounded, members, at_backward, *tensors):
        ctx.set_materialize_grads(False)
        _, need_x, _, _, _, *needs = ctx.needs_input_grad
        ys, ss = forward(ops, x, members, rounded)
        weights, biases, lora_As, lora_Bs = (tensors[i::_N] for i in range(_N))
        ctx.unread = None
        dtypes = {weight.dtype for weight in weights}
        if dtypes != {x.dtype}:
            weights = [linear.kept_weight(weight, x, need_x) for weight in weights]
        if None in dtypes or not (need_x and all(needs[2::_N])):
            both = map(linear.read_and_unread, weights, lora_As, lora_Bs, [need_x] * len(members), needs[2::_N])
            read, ctx.unread = zip(*both, strict=True)
            weights, lora_As, lora_Bs = zip(*read, strict=True)
        numbers, seeds = [member[4:] for member in members], ()
        if any([isinstance(seed, Tensor) for _, _, seed in numbers]):
            seeds = [seed if isinstance(seed, Tensor) else None for _, _, seed in numbers]
            numbers = [(*rest, None if isinstance(seed, Tensor) else seed) for *rest, seed in numbers]
        ctx.save_for_backward(x if any(needs[2::_N]) else None, *ss, *weights, *lora_As, *lora_Bs, *seeds)
        ctx.ops, ctx.rounded, ctx.at_backward = ops, rounded, at_backward  # ops draw different dropout masks
        ctx.numbers = numbers
        ctx.bias_dtypes = [None if b is None else b.dtype for b in biases] if any(needs[1::_N]) else None
        return tuple(ys)

    @staticmethod
    @not_compiled
    def backward(ctx, *dys):
        ctx.at_backward([i for i, dy in enumerate(dys) if dy is not None])
        _, need_x, _, _, _, *flat = ctx.needs_input_grad
        needs = need_x, flat[2::_N], flat[3::_N]
        grads: list = [None] * len(flat)
        dx = None
        if need_x or any(needs[1]) or any(needs[2]):
            x, ss, members = _restored(ctx, dys)
            if x is None:  # no a needs a gradient
                dy, a = next((dy, member[2]) for dy, member in zip(dys, members, strict=True) if dy is not None)
                x = linear.unread_x(dy, a, need_x and any(needs[2]))
            compute = _each if _one_by_one(ctx.ops, dys) else backward
            dx, grads[2::_N], grads[3::_N] = compute(ctx.ops, dys, x, ss, members, ctx.rounded, needs)
        if ctx.bias_dtypes is not None:
            for i, (dy, dtype, needed) in enumerate(zip(dys, ctx.bias_dtypes, flat[1::_N], strict=True)):
                grads[_N * i + 1] = linear.bias_gradient(dy, dtype) if needed and dy is not None else None
        return None, dx, None, None, None, *grads


def _restored(ctx, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, Sequence[Tensor], list[Member]]:
    """Returns x, S of each member, and the members without their biases, from what LoRAGroupFunction has saved.

    A backward in which only some members take part frees what has been saved. What the others need is kept for a later
    one, as autograd keeps it for layers with nodes of their own.
    """
    count, used = len(dys), {i for i, dy in enumerate(dys) if dy is not None}
    try:
        tensors, left = ctx.saved_tensors, {*range(count)} - used
    except RuntimeError:  # freed, or a tensor of some member has been changed in place
        kept: _Kept | None = getattr(ctx, "kept", None)
        if kept is None or not used <= kept.left:
            raise
        tensors, left = kept.of(used), kept.left - used
    ctx.kept = _Kept(tensors, left, count) if left else None
    x, *saved = tensors
    ss, *factors, seeds = (saved[i : i + count] for i in range(0, 5 * count, count))
    triples: Any = zip(*factors, strict=True)
    if ctx.unread is not None:
        triples = map(linear.restored, triples, ctx.unread)
    numbers = ctx.numbers
    if seeds:
        numbers = [(*n[:2], n[2] if seed is None else seed) for n, seed in zip(numbers, seeds, strict=True)]
    return x, ss, [(weight, None, a, b, *n) for (weight, a, b), n in zip(triples, numbers, strict=True)]


class _Kept:
    """This object keeps what LoRAGroupFunction has saved, for the members that are left after a backward in which only
    others took part."""

    def __init__(self, tensors: Sequence[Tensor | None], left: set[int], count: int):
        self.tensors, self.left, self.count = tensors, left, count
        self.versions = [None if tensor is None else tensor._version for tensor in tensors]

    def of(self, used: set[int]) -> Sequence[Tensor | None]:
        """Returns the tensors, as ``ctx.saved_tensors``.

        Raises:
            RuntimeError: what these members need has been changed in place.
        """
        for i, (tensor, version) in enumerate(zip(self.tensors, self.versions, strict=True)):
            if tensor is not None and tensor._version != version and (i == 0 or (i - 1) % self.count in used):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation "
                    f"between backwards of layers that read one x: {checks.shown(tensor)}, version {version} needed"
                )
        return self.tensors


# ---- Members that are not known before they are called


class Entry:
    """The parts of dx that members of a group hand to the node in which their x entered. Each backward has parts of its
    own, by the id of its graph task: one that failed half-way leaves nothing to the next one, and two threads may run
    at once."""

    __slots__ = ("count", "parts", "ran")

    def __init__(self, ran: Callable) -> None:
        self.count, self.ran = 0, ran  # count: of the members that have joined
        self.parts: dict[int, dict[int, tuple]] = {}

    def hand(self, index: int, ops, x: Tensor, part: tuple) -> None:
        """Takes the part (dy, weight, dS, lora_A, keep) of a member."""
        self.parts.setdefault(_graph_task(), {})[index] = ops, x, part

    def sum(self) -> Tensor | None:
        """Returns the sum of the parts of this backward, in the order of the members' calls, or None without any."""
        parts = self.parts.pop(_graph_task(), None)
        if parts is None:
            return None
        self.ran(sorted(parts))
        ordered = [parts[i] for i in sorted(parts)]
        ops, x, _ = ordered[0]
        members = [part for _, _, part in ordered]
        with torch.autocast(x.device.type, enabled=False), named("lora_fast::lora_linear_group_backward"):
            if any([weight.dtype is None for _, weight, *_ in members]):
                return quantized.grad_x(ops, x, members)
            return ops.group_grad_x(x, members)


class _EntryFunction(torch.autograd.Function):
    @staticmethod
    @not_compiled
    def forward(ctx, entry, x):
        ctx.set_materialize_grads(False)
        ctx.entry = entry
        return x.detach()  # not a view of x for autograd, which would keep x itself alive

    @staticmethod
    @not_compiled
    def backward(ctx, dx):
        total = None if _traced() else ctx.entry.sum()  # compiled autograd: each member has computed its own gradients
        return None, total if dx is None else dx if total is None else dx + total


def enter(x: Tensor, ran: Callable[[list[int]], object]) -> tuple[Tensor, Entry]:
    """Returns x as its members have to take it, and what they hand their parts of dx to. ``ran`` is called in each
    backward with the indices of those that did, in the order of their calls."""
    entry = Entry(ran)
    return _EntryFunction.apply(entry, x), entry


class JoinedFunction(linear.LoRALinearFunction):
    """The layer's op on an x that has entered. Its arguments are those of LoRALinearFunction and the entry."""

    @staticmethod
    @not_compiled
    def forward(ctx, *arguments):
        *arguments, entry = arguments
        ctx.entry, ctx.index = entry, entry.count
        entry.count += 1
        return linear.LoRALinearFunction.forward(ctx, *arguments)

    @staticmethod
    @not_compiled
    def backward(ctx, dy):
        need_x, need_a, need_b = needs = linear.needs_of(ctx)
        if not need_x or _one_by_one(ctx.ops, [dy]) or not _runs(ctx.next_functions[0][0]):
            return *linear.LoRALinearFunction.backward(ctx, dy), None
        arguments = linear.saved_arguments(ctx, dy, needs)
        da, db = _hand(ctx, dy, *arguments, (True, need_a, need_b))
        dbias = linear.bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return None, None, None, dbias, da, db, None, None, None, None, None


def _hand(ctx, dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, rounded, needs) -> tuple:
    """Hands a member's part of dx to its entry and returns da and db."""
    with torch.autocast(x.device.type, enabled=False), named("lora_fast::lora_linear_backward"):
        scaling, keep = _masked(ctx.ops, x, scaling, dropout_p, seed) if dropout_p else (scaling, None)
        ds, da, db = ctx.ops.thin_gradients(dy, x, s, lora_A, lora_B, scaling, keep, rounded, needs)
        # A copy of lora_A: an optimizer in backward may change it before the entry's node reads it.
        weight = weight if weight.dtype is None else weight.to(dy.dtype)
        ctx.entry.hand(ctx.index, ctx.ops, x, (dy, weight, ds, lora_A.clone(), keep))
    return da, db
