"""Public functions of the adapter step: lists of tensors are grouped by shape and each group is one batched call.

No kernel serves these yet: on CUDA, too, the plain-torch twins compute them, batched, without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import checks, step

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
    tensors = _matrices("tensors", tensors)
    product = (lambda x: step.wide(x) @ step.wide(x).mT) if dim == 1 else (lambda x: step.wide(x).mT @ step.wide(x))
    return [result for (result,) in _batched(lambda x: (product(x),), tensors)]


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
    return step.spd_solve(matrices, rhs, checks.nonnegative(damping, "damping"))


def small_inverse(matrices: Tensor) -> Tensor:
    """Inverses of (L, r, r) whose symmetric part is at least I, with one step of refinement.

    Raises:
        ArgumentError: not (L, r, r).
    """
    _stack("matrices", matrices)
    return step.small_inverse(matrices)


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
    checks.choice(solver, "solver", step.SOLVERS)
    single = isinstance(a, Tensor)
    lists = [_matrices(name, [x] if single else x) for name, x in (("a", a), ("b", b), ("da", da), ("db", db))]
    _check_lists(*lists)
    compute = lambda *stacked: step.scalora_scaling(*step.grams(*stacked), kappa, solver)
    return _unpack(_batched(compute, *lists), 3, single)


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
    checks.choice(gauge, "gauge", step.GAUGES)
    single = isinstance(a, Tensor)
    lists = [_matrices(name, [x] if single else x) for name, x in (("a", a), ("b", b))]
    _check_lists(*lists)
    return _unpack(_batched(lambda a, b: _balanced(a, b, gauge), *lists), 2, single)


def _balanced(a: Tensor, b: Tensor, gauge: str) -> tuple[Tensor, Tensor]:
    t, t_inverse = step.hyperbalance(*step.grams(a, b)[:2], gauge)
    return (t_inverse @ step.wide(a)).to(a.dtype), (step.wide(b) @ t).to(b.dtype)


@torch.no_grad()
def merge_(
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
    scale = torch.as_tensor(scale, dtype=step.wide(a).dtype, device=a.device).expand(a.shape[0])
    seed = int(torch.randint(1 << 62, (), dtype=torch.int64)) if seed is None else seed
    step.merge_(weight, a, b, scale, rounding, seed)
    return weight


def _batched(compute: Callable, *lists: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """compute's results for each position of the lists, called once on the stacks of each shape, dtype and device."""
    groups: dict[tuple, list[int]] = {}
    for i, members in enumerate(zip(*lists, strict=True)):
        groups.setdefault(tuple((x.shape, x.dtype, x.device) for x in members), []).append(i)
    results: list[tuple[Tensor, ...]] = [()] * len(lists[0])
    for indices in groups.values():
        stacked = compute(*(torch.stack([tensors[i] for i in indices]) for tensors in lists))
        for i, result in zip(indices, zip(*stacked, strict=True), strict=True):
            results[i] = result
    return results


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
