"""Forward and backward of several layers that read the same x: the functions. (group_plans.py and
group_parts.py have the plans.)

A member is (weight, bias, lora_A, lora_B, scaling, keep), as the arguments of ``linear.forward``: each has a mask of
its own, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from .. import device
from ..launch import DropoutMask, alignments, by_jit, thin_dtype
from . import signature
from .group_parts import GroupGradXPlan, ThinPlan
from .group_plans import Columns, GroupBackwardPlan, GroupForwardPlan, Members, Needs

_strides, _address, _is_contiguous = Tensor.stride, Tensor.data_ptr, Tensor.is_contiguous


def planned(make: Callable, key: list, tensors: Sequence[Tensor], x: Tensor, *arguments):
    """Returns the plan with this key, to which the strides of the tensors, which of them are aligned, and the settings
    are added. ``make`` makes it from the arguments if there is none. The key has the shapes of the tensors, which are
    the strides of those that are contiguous, but for those of single rows and columns, which no address depends on."""
    addresses = reduce(or_, map(_address, tensors))  # if all are multiples of 16, the last four bits are 0
    strides = None if all(map(_is_contiguous, tensors)) else tuple(map(_strides, tensors))
    whole = make, *key, strides, addresses & 15 and alignments(tensors), signature.settings(x)
    plan = signature.plans.get(whole)
    return signature.keep(whole, make(*arguments), x) if plan is None else plan


def _key(x: Tensor, columns: Columns, rounded: bool) -> list:
    """Returns what x and the members add to a key, apart from strides and alignment. A bias has x's dtype, as a weight
    has; the shapes of x and b contain those of weight, bias and a."""
    _, biases, a, b, _, keeps = columns
    key = [len(b), x.shape, x.dtype, device.index(x), rounded]
    for bias, factor, other, keep in zip(biases, a, b, keeps, strict=True):
        key += bias is None, factor.dtype, other.shape, other.dtype, keep is None
    return key


def _forward_plan(x: Tensor, columns: Columns, rounded: bool) -> Callable:
    if x.numel() == 0 or not all([weight.numel() for weight in columns[0]]):  # a grid must not be empty
        return lambda x, columns, _: _forward_of_empty(x, [*zip(*columns, strict=True)], rounded)
    return GroupForwardPlan(x, columns, rounded)


def group_forward(x: Tensor, members: Members, rounded: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Returns every y (..., d_out) in x's dtype and every S (n_tokens, r) for x (..., d_in) and one to four members.
    ``rounded`` rounds the factors to x's dtype. Twin: ``reference.linear.group_forward``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return group_forward(x, members, rounded)
    columns = weights, biases, a, b, _, _ = tuple(zip(*members, strict=True))
    if by_jit():
        return _forward_plan(x, columns, rounded)(x, columns, None)
    tensors = (x, *weights, *a, *b, *[bias for bias in biases if bias is not None])
    plan = planned(_forward_plan, _key(x, columns, rounded), tensors, x, x, columns, rounded)
    return plan(x, columns, device.stream(x))


def _forward_of_empty(x: Tensor, members: Members, rounded: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the results if x or a weight has no elements: zeros and the bias, and those of the other members."""
    others = [member for member in members if x.numel() and member[0].numel()]
    results = zip(*group_forward(x, others, rounded), strict=True) if others else iter(())
    pairs = [
        next(results) if x.numel() and member[0].numel() else signature.empty_forward(x, *member[:3], rounded)
        for member in members
    ]
    return [y for y, _ in pairs], [s for _, s in pairs]


def _backward_plan(dys, x: Tensor, ss, columns: Columns, rounded: bool, needs: Needs) -> Callable:
    if x.numel() == 0 or not all([weight.numel() for weight in columns[0]]):
        return lambda dys, x, ss, columns, _: _backward_of_empty(
            dys, x, ss, [*zip(*columns, strict=True)], rounded, needs
        )
    return GroupBackwardPlan(dys, x, ss, columns, rounded, needs)


def group_backward(
    dys: Sequence[Tensor | None], x: Tensor, ss: Sequence[Tensor | None], members: Members, rounded: bool, needs: Needs
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Returns dx (..., d_in), every da (r, d_in) and every db (d_out, r), each in its operand's dtype, for dy
    (..., d_out) and S (n_tokens, r) of each member. Nothing is computed for a member whose dy is None. S is read where
    db is needed, x where da is. ``needs`` has x, each a and each b: a gradient that is not needed is None. Twin:
    ``reference.linear.group_backward``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return group_backward(dys, x, ss, members, rounded, needs)
    columns = weights, _, a, b, _, _ = tuple(zip(*members, strict=True))
    if by_jit():
        return _backward_plan(dys, x, ss, columns, rounded, needs)(dys, x, ss, columns, None)
    key = _key(x, columns, rounded)
    key += needs[0], *needs[1], *needs[2]
    key += [dy is None for dy in dys]
    key += [None if s is None else s.dtype for s in ss]
    tensors = [tensor for tensor in (x, *weights, *a, *b, *dys, *ss) if tensor is not None]
    plan = planned(_backward_plan, key, tensors, x, dys, x, ss, columns, rounded, needs)
    return plan(dys, x, ss, columns, device.stream(x))


def _backward_of_empty(dys, x: Tensor, ss, members: Members, rounded: bool, needs: Needs) -> tuple:
    """Returns the results if x or a weight has no elements: zeros, and those of the other members."""
    need_x, need_a, need_b = needs
    empty = [x.numel() == 0 or member[0].numel() == 0 for member in members]
    others = [i for i in range(len(members)) if not empty[i]]
    zeros = lambda i, which: torch.zeros_like(members[i][which]) if empty[i] and dys[i] is not None else None
    das, dbs = ([zeros(i, which) if n[i] else None for i in range(len(n))] for which, n in ((2, need_a), (3, need_b)))
    dx = torch.zeros_like(x) if need_x and any(dy is not None for dy in dys) else None
    if any(dys[i] is not None for i in others):
        chosen = ([values[i] for i in others] for values in (dys, ss, members, need_a, need_b))
        dys, ss, members, need_a, need_b = chosen
        dx, *gradients = group_backward(dys, x, ss, members, rounded, (need_x, need_a, need_b))
        for into, computed in zip((das, dbs), gradients, strict=True):
            for i, gradient in zip(others, computed, strict=True):
                into[i] = gradient
    return dx, das, dbs


def group_thin_gradients(
    dys: Sequence[Tensor | None], x: Tensor, ss: Sequence[Tensor | None], members: Members, rounded: bool, needs: Needs
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Returns every dS (n_tokens, r), da and db, as ``group_backward``; dS where x or a needs it. The members' weights
    are not read. Twin: ``reference.linear.group_thin_gradients``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return group_thin_gradients(dys, x, ss, members, rounded, needs)
    if any([dy is not None and dy.numel() == 0 for dy in dys]) or x.numel() == 0:
        return _thin_of_empties(dys, x, ss, members, rounded, needs)
    columns = _, _, a, b, _, _ = tuple(zip(*[(None, None, *member[2:]) for member in members], strict=True))
    if by_jit():
        return GroupBackwardPlan(dys, x, ss, columns, rounded, needs, thin=True)(dys, x, ss, columns, None)
    key = _key(x, columns, rounded)
    key += "thin", needs[0], *needs[1], *needs[2]
    key += [None if dy is None else (dy.shape, dy.dtype) for dy in dys]
    key += [None if s is None else s.dtype for s in ss]
    tensors = [tensor for tensor in (x, *a, *b, *dys, *ss) if tensor is not None]
    plan = planned(GroupBackwardPlan, key, tensors, x, dys, x, ss, columns, rounded, needs, True)
    return plan(dys, x, ss, columns, device.stream(x))


def _thin_of_empties(dys, x: Tensor, ss, members: Members, rounded: bool, needs: Needs) -> tuple:
    """Returns the gradients member by member, where a member, or x, has no elements."""
    results = []
    for dy, s, (_, _, a, b, scaling, keep), need_a, need_b in zip(dys, ss, members, *needs[1:], strict=True):
        needed = needs[0] or need_a, need_a, need_b
        used = dy is not None and any(needed)
        results.append(thin_gradients(dy, x, s, a, b, scaling, keep, rounded, needed) if used else (None, None, None))
    return tuple(map(list, zip(*results, strict=True)))


def _thin_plan(dy, x, s, lora_A, lora_B, keep, rounded: bool, needs: tuple[bool, bool, bool]) -> Callable:
    if dy.numel() == 0 or lora_A.numel() == 0:
        return lambda dy, x, s, a, b, *_: _thin_of_empty(dy, a, b, rounded, needs)
    return ThinPlan(dy, x, s, lora_A, lora_B, keep is not None, rounded, needs)


def thin_gradients(
    dy: Tensor, x: Tensor, s: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, keep: DropoutMask | None,
    rounded: bool, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dS (n_tokens, r), da and db of one member, each None where ``needs`` (dS, da, db) is False. x is read for
    da, S for db. Twin: ``reference.linear.thin_gradients``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return thin_gradients(dy, x, s, lora_A, lora_B, scaling, keep, rounded, needs)
    arguments = dy, x, s, lora_A, lora_B, keep, rounded, needs
    if by_jit():
        return _thin_plan(*arguments)(dy, x, s, lora_A, lora_B, float(scaling), keep, None)
    key = [dy.shape, dy.dtype, x.shape, x.dtype, device.index(x), lora_A.shape, lora_A.dtype, lora_B.dtype]
    key += s if s is None else s.dtype, keep is None, rounded, *needs
    tensors = (dy, x, lora_A, lora_B) if s is None else (dy, x, lora_A, lora_B, s)
    plan = planned(_thin_plan, key, tensors, x, *arguments)
    return plan(dy, x, s, lora_A, lora_B, float(scaling), keep, device.stream(x))


def _thin_of_empty(dy: Tensor, lora_A: Tensor, lora_B: Tensor, rounded: bool, needs: tuple[bool, bool, bool]) -> tuple:
    """Returns zeros if dy or a has no elements."""
    shape, dtype = (math.prod(dy.shape[:-1]), len(lora_A)), thin_dtype(dy, lora_B, rounded)
    ds = dy.new_zeros(shape, dtype=dtype) if needs[0] else None
    return ds, *[torch.zeros_like(t) if needed else None for t, needed in zip((lora_A, lora_B), needs[1:], strict=True)]


def _grad_x_plan(x: Tensor, columns: tuple) -> Callable:
    if x.numel() and all([weight.numel() for weight in columns[1]]):
        return GroupGradXPlan(x, columns)
    return lambda x, columns, _: _grad_x_of_empty(x, [*zip(*columns, strict=True)])


def group_grad_x(x: Tensor, parts: Sequence[tuple]) -> Tensor:
    """Returns dx, in x's shape and dtype, of one to four parts (dy, weight, dS, lora_A, keep). The values of x are not
    read. Twin: ``reference.linear.group_grad_x``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return group_grad_x(x, parts)
    columns = dys, weights, dss, factors, keeps = tuple(zip(*parts, strict=True))
    if by_jit():
        return _grad_x_plan(x, columns)(x, columns, None)
    key = [len(parts), x.shape, x.dtype, device.index(x)]
    for weight, ds, a, keep in zip(weights, dss, factors, keeps, strict=True):
        key += weight.shape, ds.dtype, a.shape, a.dtype, keep is None
    plan = planned(_grad_x_plan, key, (*dys, *weights, *dss, *factors), x, x, columns)
    return plan(x, columns, device.stream(x))


def _grad_x_of_empty(x: Tensor, parts: Sequence[tuple]) -> Tensor:
    """Returns dx if x or a weight has no elements: zeros, or that of the other parts."""
    others = [part for part in parts if x.numel() and part[1].numel()]
    return group_grad_x(x, others) if others else torch.zeros_like(x)
