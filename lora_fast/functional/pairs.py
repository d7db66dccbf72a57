"""Public functions of the adapter step: a list of tensors is one grouped launch for each rank on the Triton backend,
one batched call for each shape on the torch backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import backend, checks
from ..kernels.grouping import map_groups
from ..kernels.limits import LARGEST_RANK, LARGEST_SCALORA_RANK, SOLVERS
from ..kernels.records import StepWork
from ..ops import pairs as pair_ops

Tensors = Tensor | Sequence[Tensor]


def gram(tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Grams of many matrices.

    Args:
        tensors: (r, n) with ``dim=1``, giving x xᵀ, or (n, r) with ``dim=0``, giving xᵀx; any shapes and dtypes.
        dim: the dimension that is summed over.

    Returns:
        (r, r) each, float32, or float64 for a float64 matrix.

    Raises:
        ArgumentError: not matrices, or another dim.
    """
    if dim not in (0, 1):
        raise checks.ArgumentError("dim", "0 or 1", repr(dim))
    is_a = [dim == 1] * len(_matrices("tensors", tensors))
    rank_dim = 1 - dim
    compute = lambda factors, is_a: (_ops(factors[0], factors[0].shape[rank_dim]).factor_grams(factors, is_a),)
    return [result for (result,) in _together(compute, lambda x: x.shape[rank_dim], tensors, is_a)]


def spd_solve(matrices: Tensor, rhs: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """Solve (matrices + damping I) x = rhs by Cholesky: (L, r, r), (L, r, k) → (L, r, k), info (L,).

    info is 0 where the matrix is positive definite; elsewhere it is positive and that x is NaN. Other matrices of the
    batch are not affected.

    Raises:
        ArgumentError: shapes that do not fit, a damping below 0.
    """
    _stack("matrices", matrices)
    if rhs.dim() != 3 or rhs.shape[:2] != matrices.shape[:2]:
        raise checks.ArgumentError("rhs", f"shape {(*matrices.shape[:2], 'k')}", tuple(rhs.shape))
    return _ops(matrices, matrices.shape[-1]).spd_solve(matrices, rhs, checks.nonnegative(damping, "damping"))


def small_inverse(matrices: Tensor) -> Tensor:
    """Inverses of (L, r, r) whose symmetric part is at least I, with one step of refinement.

    Raises:
        ArgumentError: not (L, r, r).
    """
    _stack("matrices", matrices)
    return _ops(matrices, matrices.shape[-1]).small_inverse(matrices)


def scalora_scaling(
    a: Tensors, b: Tensors, da: Tensors, db: Tensors, scaling: float, kappa: float, solver: str = "nnls"
) -> tuple[Tensors, Tensors, Tensors]:
    """ScaLoRA's optimal scales (arXiv 2510.23818) of one pair or of lists of pairs.

    Args:
        a: (r, d_in). b: (d_out, r). da, db: their gradients, at any common scale.
        scaling: of the adapter; the result does not depend on it but through kappa.
        kappa: L · lr · scaling², L the smoothness of the loss.
        solver: "nnls" (the optimum), "paper" (a scale per column where valid, else one for all), "column", "scalar".

    Returns:
        alpha (r,) for b's columns, beta (r,) for a's rows, info (0 where the unconstrained optimum is valid); lists of
        them for lists. Where a column has no say (b = 0), its scale is 1.

    Raises:
        ArgumentError: shapes that do not fit, kappa or scaling not above 0, an unknown solver.
    """
    checks.positive(scaling, "scaling")
    checks.positive(kappa, "kappa")
    checks.choice(solver, "solver", SOLVERS)
    single = isinstance(a, Tensor)
    lists = [_matrices(name, [x] if single else x) for name, x in (("a", a), ("b", b), ("da", da), ("db", db))]
    _check_lists(*lists)

    def compute(*members: list[Tensor]) -> tuple[Tensor, ...]:
        ops = _ops(members[0][0], members[0][0].shape[0], LARGEST_SCALORA_RANK)
        x, active, info = ops.scalora_solve(*ops.pair_grams(*members), solver)
        factors, *_ = ops.scales(x, active, kappa, torch.ones_like(x[:, 0]), 0.0, None)
        return (*factors.chunk(2), info)

    return _unpack(_together(compute, lambda a: a.shape[0], *lists), 3, single)


def hyperbalance(a: Tensors, b: Tensors, gauge: str = "symmetric") -> tuple[Tensors, Tensors]:
    """The balanced factors of the same product (BaLoRA, arXiv 2605.31484), of one pair or of lists of pairs.

    Args:
        a: (r, d_in). b: (d_out, r). A pair whose b is 0 comes back as it is.
        gauge: "symmetric", "svd" or "svd_signed".

    Returns:
        (a', b') with b' a' = b a and a'a'ᵀ = b'ᵀb'.

    Raises:
        ArgumentError: shapes that do not fit, an unknown gauge.
    """
    checks.choice(gauge, "gauge", pair_ops.GAUGES)
    single = isinstance(a, Tensor)
    lists = [_matrices(name, [x] if single else x) for name, x in (("a", a), ("b", b))]
    _check_lists(*lists)
    return _unpack(_together(lambda a, b: _balanced(a, b, gauge), lambda a: a.shape[0], *lists), 2, single)


def _balanced(a: list[Tensor], b: list[Tensor], gauge: str) -> tuple[list[Tensor], list[Tensor]]:
    ops = _ops(a[0], a[0].shape[0])
    t, t_inverse = pair_ops.hyperbalance(*ops.pair_grams(a, b)[:2], gauge)
    return ops.transformed(a, True, t_inverse), ops.transformed(b, False, t)


@torch.no_grad()
def add_low_rank_(
    weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, rounding: str = "nearest", seed: int | None = None
) -> Tensor:
    """weight += b diag(scale) a in place, summed in float32 (float64 for a float64 weight) and rounded once.

    Args:
        weight: (d_out, d_in), frozen. a: (r, d_in). b: (d_out, r).
        scale: a number or (r,).
        rounding: of a 16-bit weight, "nearest" or "stochastic" (its expectation is exact).
        seed: of the stochastic rounding; None draws one from torch's CPU generator.

    Returns:
        weight.

    Raises:
        ArgumentError: shapes or dtypes that do not fit, a trained weight, an unknown rounding.
    """
    checks.choice(rounding, "rounding", ("nearest", "stochastic"))
    _check_lists([a], [b])
    if tuple(weight.shape) != (b.shape[0], a.shape[1]):
        raise checks.ArgumentError("weight", f"shape {(b.shape[0], a.shape[1])}", tuple(weight.shape))
    if weight.dtype not in checks.FLOATS or weight.requires_grad:
        got = f"{weight.dtype}, requires_grad={weight.requires_grad}"
        raise checks.ArgumentError("weight", "a frozen floating-point tensor", got)
    _check_contiguous_for_triton("weight", weight)
    scale = torch.as_tensor(scale, dtype=pair_ops.at_least_float32(a).dtype, device=a.device).expand(a.shape[0])
    seed = int(torch.randint(1 << 62, (), dtype=torch.int64)) if seed is None else seed
    _ops(weight, 1).add_low_rank_([weight], [a], [b], scale[None], rounding, seed)
    return weight


@torch.no_grad()
def adapter_step_(
    factors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    is_a: Sequence[bool],
    hyper: Tensor,
    steps: Tensor,
    work: StepWork | None = None,
) -> Tensor | None:
    """Pass 2 of the adapter step, in place: what a method does to gradients, factors and moments, then torch's AdamW;
    one launch for all factors on the Triton backend.

    Args:
        factors: parameter, gradient (only read), exp_avg, exp_avg_sq of each, of one shape.
        is_a: whether rank is its first dimension, (r, d_in), or its last, (d_out, r).
        hyper: float64 (n, 5): learning rate, beta1, beta2, eps, weight decay of each.
        steps: float32 (n,): steps taken by each, counted up here.
        work: what there is to do besides AdamW.

    Returns:
        float32 (n, R, R) with ``work.gram``: p pᵀ of an a, pᵀp of a b, as they are afterwards, zero beyond the rank.

    Raises:
        ArgumentError: shapes or dtypes that do not fit. Nothing has changed.
    """
    work = work or StepWork()
    _check_factors(factors, is_a)
    r = max((f[0].shape[0 if side else 1] for f, side in zip(factors, is_a, strict=True)), default=1)
    n = len(factors)
    wide = torch.float64 if n and factors[0][0].dtype == torch.float64 else torch.float32
    _check_rows("hyper", hyper, (n, 5), torch.float64)
    _check_rows("steps", steps, (n,), torch.float32)
    _check_contiguous_for_triton("steps", steps)
    for name, shape in (("additive", (n,)), ("matrices", (n, r, r)), ("scale_p", (n, r)), ("scale_g", (n, r))):
        if getattr(work, name) is not None:
            _check_rows(name, getattr(work, name), shape, wide)
    if (work.scale_p is None) != (work.scale_g is None):
        raise checks.ArgumentError("scale_p, scale_g", "both or neither", "one of them")
    ops = _ops(factors[0][0], r) if factors else _ops(steps, 1)
    return ops.adapter_step_(list(factors), list(is_a), hyper, steps, work)


def _check_factors(factors: Sequence, is_a: Sequence[bool]) -> None:
    if len(is_a) != len(factors):
        raise checks.ArgumentError("is_a", f"{len(factors)} values, as factors", len(is_a))
    for i, tensors in enumerate(factors):
        _matrices(f"factors[{i}]", tensors)
        for j, x in enumerate(tensors):
            if x.shape != tensors[0].shape or x.device != factors[0][0].device:
                expected = f"shape {tuple(tensors[0].shape)} on {factors[0][0].device}"
                raise checks.ArgumentError(f"factors[{i}][{j}]", expected, f"{tuple(x.shape)} on {x.device}")
            _check_contiguous_for_triton(f"factors[{i}][{j}]", x)


def _check_rows(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise checks.ArgumentError(name, f"{dtype} {shape}", f"{x.dtype} {tuple(x.shape)}")


def _check_contiguous_for_triton(name: str, tensor: Tensor) -> None:
    """Raises an error for a tensor that the kernels cannot change in place."""
    if backend.uses_triton(tensor) and not tensor.is_contiguous():
        raise checks.ArgumentError(name, "a contiguous tensor on the Triton backend", f"strides {tensor.stride()}")


def _ops(tensor: Tensor, rank: int, largest_rank: int = LARGEST_RANK) -> ModuleType:
    """Returns the ops on this tensor. Raises an error for a rank that the kernels cannot take."""
    if backend.uses_triton(tensor) and rank > largest_rank:
        raise checks.ArgumentError("rank", f"at most {largest_rank} on the Triton backend", rank)
    return backend.ops("pairs", tensor)


def _together(compute: Callable, rank: Callable, *lists: Sequence) -> list[tuple[Tensor, ...]]:
    """Returns compute's results for each position of the lists. ``compute`` is called once for all positions of one
    rank (Triton) or one shape (torch), on one device, of one dtype. ``rank`` takes a position's first tensor."""

    def kind(*members: object) -> tuple:
        tensors = [x for x in members if isinstance(x, Tensor)]
        sizes = rank(tensors[0]) if backend.uses_triton(tensors[0]) else tuple(x.shape for x in tensors)
        return sizes, *((x.dtype, x.device) for x in tensors)

    return map_groups(compute, kind, *lists)


def _unpack(results: list[tuple[Tensor, ...]], width: int, single: bool) -> tuple:
    return results[0] if single else tuple([result[i] for result in results] for i in range(width))


def _matrices(name: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in checks.FLOATS:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise checks.ArgumentError(f"{name}[{i}]", "a floating-point matrix", got)
    return tensors


def _check_lists(*lists: Sequence[Tensor]) -> None:
    """a, b and, where given, da, db: as many of each, and each b and gradient fits its a and factor."""
    names = ("a", "b", "da", "db")
    for name, tensors in zip(names, lists, strict=False):
        if len(tensors) != len(lists[0]):
            raise checks.ArgumentError(name, f"{len(lists[0])} matrices, as a", len(tensors))
    for i, (a, b, *grads) in enumerate(zip(*lists, strict=True)):
        if b.shape[1] != a.shape[0]:
            raise checks.ArgumentError(f"b[{i}]", f"shape (d_out, {a.shape[0]}) to fit a", tuple(b.shape))
        for name, factor, grad in zip(("da", "db"), (a, b), grads, strict=False):
            if grad.shape != factor.shape:
                raise checks.ArgumentError(f"{name}[{i}]", f"shape {tuple(factor.shape)}", tuple(grad.shape))


def _stack(name: str, matrices: Tensor) -> None:
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2] or matrices.dtype not in checks.FLOATS:
        raise checks.ArgumentError(name, "a floating-point (L, r, r)", f"{matrices.dtype} {tuple(matrices.shape)}")
