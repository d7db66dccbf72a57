"""Forward and backward of several layers that read the same x: the functions. (group_plans.py has the plans.)

A member is (weight, bias, lora_A, lora_B, scaling, keep), as the arguments of ``linear.forward``: each has a mask of
its own, or None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import device
from ..launch import DropoutMask, alignments, by_jit, contiguous_rows, thin_dtype
from . import signature, strategies
from .group_gemm import Part
from .group_plans import GroupBackwardPlan, GroupForwardPlan, Members, Needs, dx_gemm, dx_strategy, tensors_of
from .signature import flat


def _signature(x: Tensor, members: Members, rounded: bool) -> tuple[list, int]:
    """Returns what x and the members add to a key, and their addresses ORed: if all are multiples of 16, the last four
    bits are 0."""
    key = [x.shape, x.stride(), x.dtype, device.index(x), rounded]
    addresses = x.data_ptr()
    for weight, bias, a, b, _, keep in members:
        addresses |= weight.data_ptr() | a.data_ptr() | b.data_ptr()
        key += weight.shape, weight.stride(), a.stride(), a.dtype, b.shape, b.stride(), b.dtype, keep is None
        if bias is None:
            key.append(None)
        else:
            addresses |= bias.data_ptr()
            key.append(bias.stride())
    return key, addresses


def _planned(plan_class: type, key: list, addresses: int, tensors: tuple, x: Tensor, arguments: tuple):
    """Returns the plan with this key, which lacks which of the tensors are aligned and the settings, made from the
    arguments if there is none."""
    whole = *key, addresses & 15 and alignments(tensors), signature.settings(x)
    plan = signature.plans.get(whole)
    return signature.keep(whole, plan_class(*arguments), x) if plan is None else plan


def group_forward(x: Tensor, members: Members, rounded: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Returns every y (..., d_out) in x's dtype and every S (n_tokens, r) for x (..., d_in) and one to four members.
    ``rounded`` rounds the factors to x's dtype. Twin: ``reference.linear.group_forward``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return group_forward(x, members, rounded)
    if x.numel() == 0 or not all([member[0].numel() for member in members]):  # a grid must not be empty
        return _forward_of_empty(x, members, rounded)
    if by_jit():
        return GroupForwardPlan(x, members, rounded)(x, members, None)
    key, addresses = _signature(x, members, rounded)
    tensors = tensors_of(members, x) if addresses & 15 else ()
    plan = _planned(GroupForwardPlan, key, addresses, tensors, x, (x, members, rounded))
    return plan(x, members, device.stream(x))


def _forward_of_empty(x: Tensor, members: Members, rounded: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the results if x or a weight has no elements: zeros and the bias, and those of the other members."""
    others = [member for member in members if x.numel() and member[0].numel()]
    results = zip(*group_forward(x, others, rounded), strict=True) if others else iter(())
    pairs = [
        next(results) if x.numel() and member[0].numel() else signature.empty_forward(x, *member[:3], rounded)
        for member in members
    ]
    return [y for y, _ in pairs], [s for _, s in pairs]


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
    if x.numel() == 0 or not all([member[0].numel() for member in members]):
        return _backward_of_empty(dys, x, ss, members, rounded, needs)
    if by_jit():
        return GroupBackwardPlan(dys, x, ss, members, rounded, needs)(dys, x, ss, members, None)
    key, addresses = _signature(x, members, rounded)
    need_x, need_a, need_b = needs
    key += need_x, *need_a, *need_b
    for dy, s in zip(dys, ss, strict=True):
        if dy is not None:
            addresses |= dy.data_ptr()
        if s is not None:
            addresses |= s.data_ptr()
        key.append(None if dy is None else dy.stride())
        key.append(None if s is None else (s.stride(), s.dtype))
    tensors = tensors_of(members, x, *dys, *ss) if addresses & 15 else ()
    plan = _planned(GroupBackwardPlan, key, addresses, tensors, x, (dys, x, ss, members, rounded, needs))
    return plan(dys, x, ss, members, device.stream(x))


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


def thin_gradients(
    dy: Tensor, x: Tensor, s: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, keep: DropoutMask | None,
    rounded: bool, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dS (n_tokens, r), da and db of one member, each None where ``needs`` (dS, da, db) is False. x is read for
    da, S for db. No plan is kept. Twin: ``reference.linear.thin_gradients``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return thin_gradients(dy, x, s, lora_A, lora_B, scaling, keep, rounded, needs)
    need_s, need_a, need_b = needs
    if dy.numel() == 0 or lora_A.numel() == 0:
        shape, dtype = (math.prod(dy.shape[:-1]), len(lora_A)), thin_dtype(dy, lora_B, rounded)
        ds = dy.new_zeros(shape, dtype=dtype) if need_s else None
        da, db = (torch.zeros_like(t) if needed else None for t, needed in ((lora_A, need_a), (lora_B, need_b)))
        return ds, da, db
    dy, a, b = flat(dy), contiguous_rows(lora_A), contiguous_rows(lora_B)
    s = dy if s is None else s.contiguous()
    factor, dropout = dy.dtype if rounded else signature.wider(a, b), keep is not None
    way = strategies.thin_way(dy, a.shape[1], factor, len(a), dropout)
    ds, db = signature.grad_s_b_by(way, dy, s, b, (need_s or need_a, need_b), rounded)(dy, s, b, float(scaling))
    da = None
    if need_a:
        x = flat(x)
        da = signature.grad_a_by(way, x, thin_dtype(dy, b, rounded), a, dropout)(x, ds, a, keep)
    return ds if need_s else None, da, db


def group_grad_x(x: Tensor, parts: Sequence[tuple]) -> Tensor:
    """Returns dx, in x's shape and dtype, of one to four parts (dy, weight, dS, lora_A, keep). The values of x are not
    read. No plan is kept. Twin: ``reference.linear.group_grad_x``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return group_grad_x(x, parts)
    laid_out = [
        Part(flat(dy), weight, ds.contiguous(), contiguous_rows(a), keep)
        for dy, weight, ds, a, keep in parts
        if weight.numel()
    ]
    if x.numel() == 0 or not laid_out:
        return torch.zeros_like(x)
    strategy = dx_strategy(laid_out, [part.ds.dtype for part in laid_out])
    if strategy != "cublas":
        laid_out = [part._replace(weight=contiguous_rows(part.weight)) for part in laid_out]
    return dx_gemm(laid_out, x.shape, strategy)(laid_out)
