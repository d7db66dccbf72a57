"""The Cayley transform of all pairs as one autograd node: what it keeps, which implementation runs.

Values come first (``compute``), a node for them second (``attach``), so that one forward's values can serve another
node: a layer that activation checkpointing runs again. The node keeps its parameters, Wi and the scales by itself, not
as saved tensors: a checkpointed region then saves as many tensors in its second run as in its first, whether the
transform ran inside it or before it. Under torch.compile the registered op ``lora_fast::cayley`` runs instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend
from .reference import cayley as reference


class Free(NamedTuple):
    """The free parameters of many pairs: a (r, d_in), b (d_out, r) and, for pairs whose b is scaled, scale (r,), with
    the bound and power of each scale (``reference.cayley.bounded_scales``); else these three are empty."""

    a: list[Tensor]
    b: list[Tensor]
    scale: list[Tensor] = []  # noqa: RUF012  (never changed)
    bounds: list[float] = []  # noqa: RUF012
    powers: list[float] = []  # noqa: RUF012

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.a, *self.b, *self.scale]


class Values(NamedTuple):
    """What the transform gives for each pair, without a graph: a (r, d_in), b (d_out, r) with its columns scaled, Wi
    (r, r), scale (r,) (none: empty). Float32, or float64 for float64 parameters."""

    a: list[Tensor]
    b: list[Tensor]
    inverses: list[Tensor]
    scales: list[Tensor]


def factors(free: Free) -> tuple[list[Tensor], list[Tensor]]:
    """a and b of every pair, differentiable where gradients are enabled and any parameter asks for one."""
    if torch.compiler.is_compiling():
        made = cayley_op(*free, backend.uses_triton(free.a[0]))
        n = len(free.a)
        return made[:n], made[n : 2 * n]
    return attach(free, compute(free))


def compute(free: Free) -> Values:
    """The values, by whatever backend serves the parameters."""
    ops = backend.ops("cayley", free.a[0])
    with torch.inference_mode(False), torch.no_grad(), _no_autocast(free.a[0]):
        scales = reference.bounded_scales(*free[2:]) if free.scale else []
        return Values(*ops.cayley(free.a, free.b, scales or None), scales)


def attach(free: Free, values: Values) -> tuple[list[Tensor], list[Tensor]]:
    """a and b of ``values`` with the graph that leads to the parameters."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in free.tensors):
        return values.a, values.b
    made = CayleyFunction.apply(free, values, *free.tensors)
    n = len(free.a)
    return list(made[:n]), list(made[n:])


@contextmanager
def _no_autocast(x: Tensor):
    """The transform computes in its parameters' precision also where the layers around it do not."""
    with torch.autocast(x.device.type, enabled=False):
        yield


class CayleyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, free, values, *tensors):
        ctx.set_materialize_grads(False)
        ctx.free, ctx.inverses, ctx.scales = free, values.inverses, values.scales
        ctx.versions = [x._version for x in tensors]
        return tuple(x.detach() for x in (*values.a, *values.b))

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("cayley has no second derivative: call backward without create_graph=True")
        if ctx.versions != [x._version for x in ctx.free.tensors]:
            raise RuntimeError("cayley: a free parameter has been modified by an inplace operation since the forward")
        return None, None, *backward(ctx.free, ctx.inverses, ctx.scales, grads)


def backward(free: Free, inverses: list[Tensor], scales: list[Tensor], grads: Sequence[Tensor | None]) -> list:
    """The gradients of free.a, free.b and free.scale, in one list; None for a pair that had none."""
    n = len(free.a)
    used = [i for i in range(n) if grads[i] is not None or grads[n + i] is not None]
    results: list[Tensor | None] = [None] * len(free.tensors)
    if not used:
        return results
    pick = lambda tensors: [tensors[i] for i in used]
    a, b = pick(free.a), pick(free.b)
    grad_a = [torch.zeros_like(x) if g is None else g for x, g in zip(a, pick(grads[:n]), strict=True)]
    grad_b = [torch.zeros_like(x) if g is None else g for x, g in zip(b, pick(grads[n:]), strict=True)]
    ops = backend.ops("cayley", a[0])
    with _no_autocast(a[0]):
        lists = ops.cayley_backward(a, b, pick(scales) if scales else None, pick(inverses), grad_a, grad_b)
        if scales:
            scale = reference.bounded_scales_backward(pick(free.scale), pick(free.powers), pick(scales), lists[2])
            lists = *lists[:2], scale
    for k, made in enumerate(lists[: len(free.tensors) // n]):
        for i, gradient in zip(used, made, strict=True):
            results[k * n + i] = gradient
    return results


@torch.library.custom_op("lora_fast::cayley", mutates_args=())
def cayley_op(
    free_a: Sequence[Tensor],
    free_b: Sequence[Tensor],
    free_scale: Sequence[Tensor],
    bounds: Sequence[float],
    powers: Sequence[float],
    triton: bool,
) -> list[Tensor]:
    """a, b, Wi and the scales of every pair, in one list."""
    values = compute(Free(list(free_a), list(free_b), list(free_scale), list(bounds), list(powers)))
    return [x.clone() for part in values for x in part]  # an op's results may not share memory, as slices of stacks do


@cayley_op.register_fake
def _(free_a, free_b, free_scale, bounds, powers, triton):
    wide = lambda x, *shape: x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    a, b = [wide(x, *x.shape) for x in free_a], [wide(x, *x.shape) for x in free_b]
    return [*a, *b, *(wide(x, len(x), len(x)) for x in free_a), *(wide(x, len(x)) for x in free_scale)]


@torch.library.custom_op("lora_fast::cayley_backward", mutates_args=())
def cayley_backward_op(
    free_a: Sequence[Tensor],
    free_b: Sequence[Tensor],
    free_scale: Sequence[Tensor],
    powers: Sequence[float],
    inverses: Sequence[Tensor],
    scales: Sequence[Tensor],
    grads: Sequence[Tensor],
    triton: bool,
) -> list[Tensor]:
    """The gradients of free_a, free_b and free_scale, in one list."""
    free = Free(list(free_a), list(free_b), list(free_scale), [], list(powers))
    return [x.clone() for x in backward(free, list(inverses), list(scales), grads)]


@cayley_backward_op.register_fake
def _(free_a, free_b, free_scale, powers, inverses, scales, grads, triton):
    return [torch.empty_like(x) for x in (*free_a, *free_b, *free_scale)]


def _setup_context(ctx, inputs, output):
    free_a, free_b, free_scale, _, powers, triton = inputs
    n = len(free_a)
    ctx.save_for_backward(*free_a, *free_b, *free_scale, *output[2 * n :])
    ctx.n, ctx.powers, ctx.triton = n, powers, triton


def _op_backward(ctx, grads):
    n, scaled = ctx.n, len(ctx.powers)
    parts, saved = [], list(ctx.saved_tensors)
    for size in (n, n, scaled, n, scaled):
        parts.append(saved[:size])
        del saved[:size]
    free_a, free_b, free_scale, inverses, scales = parts
    made = cayley_backward_op(free_a, free_b, free_scale, ctx.powers, inverses, scales, grads[: 2 * n], ctx.triton)
    none = None if scaled else []  # torch takes an empty list of numbers for one of tensors
    return made[:n], made[n : 2 * n], made[2 * n :], none, none, None


cayley_op.register_autograd(_op_backward, setup_context=_setup_context)
