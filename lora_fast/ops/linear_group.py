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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import composite, linear
from .observers import named, not_compiled, sees_ops
from .reference.linear import keep_scale

MOST = 4  # members of a node
_N = 4  # tensors of a member: weight, bias, lora_A, lora_B
_SAVED = 5  # saved tensors of a member: S, weight, lora_A, lora_B, seed

_traced, _any_autocast, _graph_task = (
    torch.compiler.is_compiling,
    torch._C._is_any_autocast_enabled,
    torch._C._current_graph_task_id,
)


class Constants(NamedTuple):
    """What a member has beside its tensors. A seed in a tensor is saved apart."""

    scaling: float
    dropout_p: float
    seed: int | Tensor | None


def forward(ops, x: Tensor, rounded: bool, constants: Sequence[Constants], *tensors) -> tuple[list, list]:
    """Returns y (..., d_out) and S (n_tokens, r) of each member. Weights and biases are cast to x's dtype; with
    ``rounded`` (autocast) the factors are rounded to it, too."""
    with named("lora_fast::lora_linear_group"):
        calls = [
            (_cast(weight, x.dtype), _cast(bias, x.dtype), a, b, *_masked(ops, x, member))
            for (weight, bias, a, b), member in zip(_in_turn(tensors, _N), constants, strict=True)
        ]
        return ops.group_forward(x, calls, rounded)


def backward(ops, dys, x, members: Sequence[tuple], rounded: bool, needs: Sequence[tuple]) -> tuple:
    """Returns dx, and da and db of each member (S, weight, lora_A, lora_B, constants). ``needs``: of x, a and b, of
    each member. Autocast is turned off, as in ``linear.backward``."""
    if _any_autocast():
        with torch.autocast(x.device.type, enabled=False):
            return backward(ops, dys, x, members, rounded, needs)
    with named("lora_fast::lora_linear_group_backward"):
        calls = []
        for dy, (_, weight, a, b, constants), (need_x, need_a, _) in zip(dys, members, needs, strict=True):
            weight = _cast(weight, dy.dtype) if need_x else weight  # only dx reads it
            calls.append((weight, None, a, b, *_masked(ops, x, constants, need_x or need_a)))
        of_x, of_a, of_b = zip(*needs, strict=True)
        return ops.group_backward(dys, x, [s for s, *_ in members], calls, rounded, (any(of_x), of_a, of_b))


def _each(ops, dys, x, members, rounded, needs) -> tuple:
    """Returns what ``backward`` does, by the registered op or by differentiable ops for each member."""
    compute: Any = linear.differentiable_backward if not _traced() and _is_second(dys) else linear.backward_node
    dx, das, dbs = None, [], []
    for dy, (s, weight, a, b, constants), need in zip(dys, members, needs, strict=True):
        part, da, db = compute(ops, dy, x, s, weight, a, b, *constants, rounded, need) if any(need) else (None,) * 3
        dx = part if dx is None else dx if part is None else dx + part
        das.append(da)
        dbs.append(db)
    return dx, das, dbs


def _is_second(dys) -> bool:
    """Returns whether backward itself is differentiated or mapped."""
    return torch.is_grad_enabled() or not all(composite.is_plain(dy) for dy in dys if dy is not None)


def _one_by_one(ops, dys) -> bool:
    """Returns whether each member computes its own gradients, as the module's docstring says."""
    return _traced() or _is_second(dys) or (ops is not linear.reference and sees_ops())


def _in_turn(tensors: Sequence, size: int) -> list[Sequence]:
    return [tensors[i : i + size] for i in range(0, len(tensors), size)]


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def _masked(ops, x: Tensor, member: Constants, needed: bool = True) -> tuple:
    """Returns the scaling with the mask's scale, and the mask; None if there is none or it is not needed."""
    scaling, dropout_p, seed = member
    if not dropout_p:
        return scaling, None
    return scaling * keep_scale(dropout_p), ops.draw_mask(x, dropout_p, seed) if needed else None


class LoRAGroupFunction(torch.autograd.Function):
    """Computes y of each member. ``tensors``: weight, bias, lora_A and lora_B of one member after the other.
    ``at_backward`` is called when backward runs."""

    @staticmethod
    @not_compiled
    def forward(ctx, ops, x, rounded, constants, at_backward, *tensors):
        ctx.set_materialize_grads(False)
        need_x, needs = ctx.needs_input_grad[1], _needs(ctx)
        tensors = [
            linear.kept_weight(tensor, x, need_x) if i % _N == 0 else tensor for i, tensor in enumerate(tensors)
        ]  # fmt: skip
        ys, ss = forward(ops, x, rounded, constants, *tensors)
        saved, ctx.unread = [], []
        for (weight, _, a, b), s, member, (_, need_a, _) in zip(
            _in_turn(tensors, _N), ss, constants, needs, strict=True
        ):
            read, unread = linear.read_and_unread(weight, a, b, need_x, need_a)
            saved += s, *read, member.seed if isinstance(member.seed, Tensor) else None
            ctx.unread.append(unread)
        ctx.save_for_backward(x if any(need_a for _, need_a, _ in needs) else None, *saved)
        ctx.ops, ctx.rounded, ctx.at_backward = ops, rounded, at_backward  # ops draw different dropout masks
        ctx.constants = [m._replace(seed=None) if isinstance(m.seed, Tensor) else m for m in constants]
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in tensors[1::_N]]
        return tuple(ys)

    @staticmethod
    @not_compiled
    def backward(ctx, *dys):
        ctx.at_backward()
        need_x, all_needs = ctx.needs_input_grad[1], _needs(ctx)
        used = [i for i, dy in enumerate(dys) if dy is not None]
        needs = [(need_x, all_needs[i][1], all_needs[i][2]) for i in used]
        grads: list = [None] * (_N * len(dys))
        dx = None
        if any(map(any, needs)):
            some, (x, members) = [dys[i] for i in used], _members(ctx, dys, used)
            compute = _each if _one_by_one(ctx.ops, some) else backward
            dx, das, dbs = compute(ctx.ops, some, x, members, ctx.rounded, needs)
            for i, da, db in zip(used, das, dbs, strict=True):
                grads[_N * i + 2], grads[_N * i + 3] = da, db
        for i in used:
            if all_needs[i][0]:
                grads[_N * i + 1] = linear.bias_gradient(dys[i], ctx.bias_dtypes[i])
        return None, dx, None, None, None, *grads


def _needs(ctx) -> list[tuple[bool, bool, bool]]:
    """Returns which gradients of bias, a and b each member needs."""
    return [(need_bias, need_a, need_b) for _, need_bias, need_a, need_b in _in_turn(ctx.needs_input_grad[5:], _N)]


def _members(ctx, dys, used: list[int]) -> tuple[Tensor, list[tuple]]:
    """Returns x and the used members, as ``backward`` takes them."""
    x, *saved = ctx.saved_tensors
    members = []
    for i in used:
        s, weight, a, b, seed = saved[_SAVED * i : _SAVED * (i + 1)]
        constants = ctx.constants[i] if seed is None else ctx.constants[i]._replace(seed=seed)
        members.append((s, *linear.restored((weight, a, b), ctx.unread[i]), constants))
    if x is None:  # no a needs a gradient
        _, _, a, *_ = members[0]
        x = linear.unread_x(
            dys[used[0]], a, is_second=ctx.needs_input_grad[1] and any(need_b for *_, need_b in _needs(ctx))
        )
    return x, members


# ---- Members that are not known before they are called


class Entry:
    """What the members of a group hand to the node in which their x entered. Each backward has parts of its own, by the
    id of its graph task: one that failed half-way leaves nothing to the next one, and two threads may run at once."""

    __slots__ = ("count", "parts")

    def __init__(self) -> None:
        self.count = 0  # members that have joined
        self.parts: dict[int, dict[int, tuple]] = {}

    def hand(self, index: int, ops, x: Tensor, part: tuple) -> None:
        """Takes the part (dy, weight, dS, lora_A, keep) of a member."""
        self.parts.setdefault(_graph_task(), {})[index] = ops, x, part

    def sum(self) -> Tensor | None:
        """Returns the sum of the parts of this backward, in the order of the members' calls, or None without any."""
        parts = self.parts.pop(_graph_task(), None)
        if parts is None:
            return None
        ordered = [part for _, part in sorted(parts.items(), key=lambda item: item[0])]
        ops, x, _ = ordered[0]
        with torch.autocast(x.device.type, enabled=False), named("lora_fast::lora_linear_group_backward"):
            return ops.group_grad_x(x, [part for _, _, part in ordered])


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
        total = ctx.entry.sum()
        return None, total if dx is None else dx if total is None else dx + total


def enter(x: Tensor) -> tuple[Tensor, Entry]:
    """Returns x as its members have to take it, and what they hand their parts of dx to."""
    entry = Entry()
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
        (entry_node, _), *_ = ctx.next_functions
        if not need_x or _one_by_one(ctx.ops, [dy]) or not torch._C._will_engine_execute_node(entry_node):
            return *linear.LoRALinearFunction.backward(ctx, dy), None
        arguments = linear.saved_arguments(ctx, dy, needs)
        da, db = _hand(ctx, dy, *arguments, (True, need_a, need_b))
        dbias = linear.bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return None, None, None, dbias, da, db, None, None, None, None, None


def _hand(ctx, dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, rounded, needs) -> tuple:
    """Hands a member's part of dx to its entry and returns da and db."""
    with torch.autocast(x.device.type, enabled=False), named("lora_fast::lora_linear_backward"):
        scaling, keep = _masked(ctx.ops, x, Constants(scaling, dropout_p, seed))
        ds, da, db = ctx.ops.thin_gradients(dy, x, s, lora_A, lora_B, scaling, keep, rounded, needs)
        ctx.entry.hand(ctx.index, ctx.ops, x, (dy, _cast(weight, dy.dtype), ds, lora_A, keep))
    return da, db
