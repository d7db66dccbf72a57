"""The Cayley transform of all pairs as a differentiable op with one autograd node.

``compute`` returns the values and ``attach`` makes an autograd node for them. They are separate so that a layer that
activation checkpointing runs again gets a second node for the values of its first run. The node keeps the parameters,
Wi and the scales as attributes instead of saved tensors. A checkpointed region then saves the same number of tensors in
both runs, whether the transform ran inside the region or before it. Under torch.compile the registered op
``lora_fast::cayley`` runs instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend, regions
from . import composite
from .observers import named, not_compiled, sees_ops
from .reference import cayley as reference


class Free(NamedTuple):
    """The free parameters of many pairs.

    Attributes:
        a: (r, d_in) each. b: (d_out, r) each.
        scale: (r,) each, if the columns of the b's are scaled; else empty, and so are ``bounds`` and ``powers``.
        bounds, powers: arguments of ``reference.cayley.bounded_scales``, one per scale.
    """

    a: list[Tensor]
    b: list[Tensor]
    scale: list[Tensor] = []  # noqa: RUF012  (never changed)
    bounds: list[float] = []  # noqa: RUF012
    powers: list[float] = []  # noqa: RUF012

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.a, *self.b, *self.scale]


class Values(NamedTuple):
    """The results of the transform without a graph, in float32 (float64 for float64 parameters).

    Attributes:
        a: (r, d_in) each. b: (d_out, r) each, with its columns scaled. inverses: Wi (r, r) each, always in float64.
        scales: (r,) each; empty if nothing is scaled.
    """

    a: list[Tensor]
    b: list[Tensor]
    inverses: list[Tensor]
    scales: list[Tensor]


def factors(free: Free) -> tuple[list[Tensor], list[Tensor]]:
    """Returns a and b of every pair, differentiable where gradients are enabled and any parameter requires one."""
    if composite.reason_for_parameters(free.tensors) is not None:
        return by_composite(free)
    if torch.compiler.is_compiling():
        results = cayley_op(*free, backend.uses_triton(free.a[0]))
        n = len(free.a)
        return results[:n], results[n : 2 * n]
    return attach(free, compute(free))


def by_composite(free: Free) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what ``factors`` returns, computed by plain torch ops."""
    parts = free if free.scale else free[:2]
    a, b = zip(*(composite.cayley(*pair) for pair in zip(*parts, strict=True)), strict=True)
    return list(a), list(b)


@not_compiled
def compute(free: Free) -> Values:
    """Returns the values, computed by the backend for the parameters' device."""
    triton, n = backend.uses_triton(free.a[0]), len(free.a)
    # A layer that runs again may take the values from its first run.
    with torch.inference_mode(False), torch.no_grad(), _no_autocast(free.a[0]), regions.unseen():
        if sees_ops():  # these see the registered op
            results = cayley_op(*free, triton)
            return Values(results[:n], results[n : 2 * n], results[2 * n : 3 * n], results[3 * n :])
        with named("lora_fast::cayley"):
            scales = reference.bounded_scales(*free[2:]) if free.scale else []
            a, b, inverses = backend.load_ops("cayley", triton).cayley(free.a, free.b, scales or None)
        return Values(a, b, inverses, scales)


def attach(free: Free, values: Values) -> tuple[list[Tensor], list[Tensor]]:
    """Returns a and b of ``values``, connected to the parameters by an autograd node. To torch, parameters made under
    inference_mode are constants."""
    if not torch.is_grad_enabled() or not any(x.requires_grad and not x.is_inference() for x in free.tensors):
        return values.a, values.b
    results = CayleyFunction.apply(free, values, *free.tensors)
    n = len(free.a)
    return list(results[:n]), list(results[n:])


@contextmanager
def _no_autocast(x: Tensor):
    """Turns autocast off, so that the transform computes in its parameters' precision."""
    if x.is_meta:  # it has no autocast
        yield
        return
    with torch.autocast(x.device.type, enabled=False):
        yield


class CayleyFunction(torch.autograd.Function):
    @staticmethod
    @not_compiled
    def forward(ctx, free, values, *tensors):
        ctx.set_materialize_grads(False)
        ctx.free, ctx.inverses, ctx.scales = free, values.inverses, values.scales
        ctx.ops = backend.ops("cayley", free.a[0])  # kept for backward, which may run in another thread
        ctx.versions = [x._version for x in tensors]  # autograd checks these only for saved tensors
        return tuple(x.detach() for x in (*values.a, *values.b))

    @staticmethod
    @not_compiled
    def backward(ctx, *grads):
        # Compiled autograd traces this method, and it cannot trace the kernels and versions of tensors.
        run = torch.compiler.disable(_node_backward) if torch.compiler.is_compiling() else _node_backward
        return run(ctx, grads)


def _node_backward(ctx, grads: Sequence[Tensor | None]) -> tuple:
    if ctx.versions != [x._version for x in ctx.free.tensors]:
        raise RuntimeError("cayley: a free parameter has been modified by an inplace operation since the forward")
    if torch.is_grad_enabled() or not all(g is None or composite.is_plain(g) for g in grads):
        return None, None, *differentiable_backward(ctx.free, grads)
    return None, None, *backward(ctx.ops, ctx.free, ctx.inverses, ctx.scales, grads)


def differentiable_backward(free: Free, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns what ``backward`` returns, as functions of the parameters and of grads that are differentiable again."""
    with torch.enable_grad():
        # Hooks of the parameters belong to their own gradients alone, so views of them are differentiated.
        view = lambda tensors: [x.view_as(x) for x in tensors]
        views = Free(view(free.a), view(free.b), view(free.scale), free.bounds, free.powers)
        a, b = by_composite(views)
        results = [(y, g.to(y.dtype)) for y, g in zip((*a, *b), grads, strict=True) if g is not None]
        wanted = [x for x in views.tensors if x.requires_grad]
        gradients = torch.autograd.grad(
            [y for y, _ in results], wanted, [g for _, g in results], create_graph=True, allow_unused=True
        )
    computed = iter(gradients)
    return [next(computed) if x.requires_grad else None for x in views.tensors]


def backward(
    ops, free: Free, inverses: list[Tensor], scales: list[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns the gradients of free.a, free.b and free.scale in one list, None for pairs whose a and b have none."""
    n = len(free.a)
    used = [i for i in range(n) if grads[i] is not None or grads[n + i] is not None]
    results: list[Tensor | None] = [None] * len(free.tensors)
    if not used:
        return results
    pick = lambda tensors: [tensors[i] for i in used]
    a, b = pick(free.a), pick(free.b)
    grad_a = [torch.zeros_like(x) if g is None else g for x, g in zip(a, pick(grads[:n]), strict=True)]
    grad_b = [torch.zeros_like(x) if g is None else g for x, g in zip(b, pick(grads[n:]), strict=True)]
    scale, powers, scales = (pick(x) if scales else [] for x in (free.scale, free.powers, scales))
    arguments = a, b, scale, powers, pick(inverses), scales, [*grad_a, *grad_b]
    if sees_ops():  # these see the registered op
        gradients = cayley_backward_op(*arguments, ops is not reference)
    else:
        with named("lora_fast::cayley_backward"):
            gradients = _gradients(ops, *arguments)
    for k, i in enumerate([part * n + i for part in range(len(free.tensors) // n) for i in used]):
        results[i] = gradients[k]
    return results


def _gradients(ops, free_a, free_b, free_scale, powers, inverses, scales, grads) -> list[Tensor]:
    """Returns the gradients of free_a, free_b and free_scale in one list."""
    n = len(free_a)
    with _no_autocast(free_a[0]):
        da, db, dscale = ops.cayley_backward(free_a, free_b, scales or None, inverses, grads[:n], grads[n:])
        if scales:
            dscale = reference.bounded_scales_backward(free_scale, powers, scales, dscale)
    return [*da, *db, *(dscale if scales else [])]


# The kernels keep tables of addresses between calls, which CUDA graph trees do not allow in a graph's memory.
_outside_graphs = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("lora_fast::cayley", mutates_args=(), tags=_outside_graphs)
def cayley_op(
    free_a: Sequence[Tensor],
    free_b: Sequence[Tensor],
    free_scale: Sequence[Tensor],
    bounds: Sequence[float],
    powers: Sequence[float],
    triton: bool,
) -> list[Tensor]:
    """Returns a, b, Wi and the scales of every pair in one list."""
    values = compute(Free(list(free_a), list(free_b), list(free_scale), list(bounds), list(powers)))
    return [x.clone() for part in values for x in part]  # an op's results may not share memory, as slices of stacks do


@cayley_op.register_fake
def _(free_a, free_b, free_scale, bounds, powers, triton):
    wide = lambda x, *shape: x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    a, b = [wide(x, *x.shape) for x in free_a], [wide(x, *x.shape) for x in free_b]
    inverses = [x.new_empty((len(x), len(x)), dtype=torch.float64) for x in free_a]
    return [*a, *b, *inverses, *(wide(x, len(x)) for x in free_scale)]


@torch.library.custom_op("lora_fast::cayley_backward", mutates_args=(), tags=_outside_graphs)
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
    """Returns the gradients of free_a, free_b and free_scale in one list."""
    ops = backend.load_ops("cayley", triton)
    lists = (list(x) for x in (free_a, free_b, free_scale, powers, inverses, scales, grads))
    return [x.clone() for x in _gradients(ops, *lists)]


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
    results = cayley_backward_op(free_a, free_b, free_scale, ctx.powers, inverses, scales, grads[: 2 * n], ctx.triton)
    none = None if scaled else []  # torch takes an empty list of numbers for one of tensors
    return results[:n], results[n : 2 * n], results[2 * n :], none, none, None


cayley_op.register_autograd(_op_backward, setup_context=_setup_context)
