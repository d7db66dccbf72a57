"""Public functions of the adapter step. A list of tensors takes one grouped launch for each rank on the Triton backend
and one batched call for each shape on the torch backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import backend, checks
from ..kernels.grouping import map_groups
from ..kernels.limits import LARGEST_RANK, LARGEST_SCALORA_RANK, SOLVERS
from ..kernels.records import StepWork
from ..ops import pairs, seeds

Tensors = Tensor | Sequence[Tensor]


def gram(tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Computes the Grams of many matrices.

    Args:
        tensors: matrices of any shapes and dtypes: (r, n) with ``dim=1``, giving x xᵀ, or (n, r) with ``dim=0``, giving
            xᵀx.
        dim: the dimension that is summed over.

    Returns:
        a Gram (r, r) of each, in float32, or float64 for a float64 matrix.

    Raises:
        ArgumentError: tensors that are not matrices, or another dim.
    """
    if not isinstance(checks.python_number(dim), int) or dim not in (0, 1):
        raise checks.ArgumentError("dim", "0 or 1", checks.shown(dim))
    is_a = [dim == 1] * len(_matrices("tensors", tensors))
    rank_dim = 1 - dim
    compute = lambda factors, is_a: (_ops(factors[0], factors[0].shape[rank_dim]).factor_grams(factors, is_a),)
    return [result for (result,) in _together(compute, lambda x: x.shape[rank_dim], tensors, is_a)]


def spd_solve(matrices: Tensor, rhs: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """Solves (matrices + damping I) x = rhs by Cholesky: (L, r, r), (L, r, k) → (L, r, k), info (L,).

    info is 0 where the matrix is positive definite. Elsewhere info is positive and x is NaN; the other matrices of the
    batch are not affected.

    Raises:
        ArgumentError: shapes that do not fit, or a damping below 0.
    """
    _check_square("matrices", matrices)
    if checks.tensor(rhs, "rhs").dim() != 3 or rhs.shape[:2] != matrices.shape[:2]:
        raise checks.ArgumentError("rhs", f"shape {(*matrices.shape[:2], 'k')}", tuple(rhs.shape))
    if rhs.dtype != matrices.dtype or rhs.device != matrices.device or rhs.layout is not torch.strided:
        expected = f"a dense tensor of {matrices.dtype} on {matrices.device}, as matrices"
        raise checks.ArgumentError("rhs", expected, f"{rhs.dtype} on {rhs.device}")
    damping = checks.nonnegative(damping, "damping")
    if damping > torch.finfo(torch.float32).max:
        raise checks.ArgumentError("damping", "a number that float32 can hold", damping)
    return _ops(matrices, matrices.shape[-1]).spd_solve(matrices, rhs, damping)


def small_inverse(matrices: Tensor) -> Tensor:
    """Computes the inverses of (L, r, r) whose symmetric part is at least I, with one step of refinement.

    Raises:
        ArgumentError: a tensor that is not (L, r, r).
    """
    _check_square("matrices", matrices)
    return _ops(matrices, matrices.shape[-1]).small_inverse(matrices)


def scalora_scaling(
    a: Tensors, b: Tensors, da: Tensors, db: Tensors, scaling: float, kappa: float, solver: str = "nnls"
) -> tuple[Tensors, Tensors, Tensors]:
    """Computes ScaLoRA's optimal scales (arXiv 2510.23818) of one pair or of lists of pairs.

    Args:
        a: (r, d_in). b: (d_out, r). da, db: their gradients, at any common scale.
        scaling: the adapter's alpha / r. The result depends on it only through kappa.
        kappa: L · lr · scaling², where L is the smoothness of the loss.
        solver: "nnls" (the optimum), "paper" (a scale for each column where valid, else one for all), "column", or
            "scalar".

    Returns:
        alpha (r,) for b's columns, beta (r,) for a's rows, and info, which is 0 where the unconstrained optimum is
        valid; lists of them for lists. The scale of an inactive column (b = 0, for example) is 1, and the scales of a
        pair that is not finite are NaN.

    Raises:
        ArgumentError: shapes that do not fit, kappa or scaling not above 0, or an unknown solver.
    """
    checks.positive(scaling, "scaling")
    kappa = checks.positive(kappa, "kappa")
    checks.choice(solver, "solver", SOLVERS)
    single = isinstance(a, Tensor)
    lists = [_matrices(name, [x] if single else x) for name, x in (("a", a), ("b", b), ("da", da), ("db", db))]
    _check_lists(*lists)

    def compute(*members: list[Tensor]) -> tuple[Tensor, ...]:
        ops = _ops(members[0][0], members[0][0].shape[0], LARGEST_SCALORA_RANK)
        x, active, info = ops.scalora_solve(*ops.pair_grams(*members), solver)
        # Without limits. The last two results, scales of gradients and of the merge, are not needed.
        factors, *_ = ops.scales(x, active, kappa, torch.ones_like(x[:, 0]), 0.0, None)
        # A step scales a pair that is not finite by 1. Here that would pass for a result.
        factors = factors.masked_fill(torch.cat(x.chunk(2, -1)).isnan(), torch.nan)
        return (*factors.chunk(2), info)

    return _unpack(_together(compute, lambda a: a.shape[0], *lists), 3, single)


def hyperbalance(a: Tensors, b: Tensors, gauge: str = "symmetric") -> tuple[Tensors, Tensors]:
    """Computes the balanced factors of the same product (BaLoRA, arXiv 2605.31484), of one pair or of lists of pairs.

    Args:
        a: (r, d_in). b: (d_out, r). A pair whose b is 0 is returned unchanged.
        gauge: "symmetric", "svd" or "svd_signed", as in ``lf.methods.BaLoRA``.

    Returns:
        (a', b') with b' a' = b a and a'a'ᵀ = b'ᵀb'.

    Raises:
        ArgumentError: shapes that do not fit, or an unknown gauge.
    """
    checks.choice(gauge, "gauge", pairs.GAUGES)
    single = isinstance(a, Tensor)
    lists = [_matrices(name, [x] if single else x) for name, x in (("a", a), ("b", b))]
    _check_lists(*lists)
    return _unpack(_together(lambda a, b: _balanced(a, b, gauge), lambda a: a.shape[0], *lists), 2, single)


def _balanced(a: list[Tensor], b: list[Tensor], gauge: str) -> tuple[list[Tensor], list[Tensor]]:
    ops = _ops(a[0], a[0].shape[0])
    ka, kb = ops.pair_grams(a, b)[:2]
    t, t_inverse = pairs.hyperbalance(ka, kb, gauge)
    return ops.transformed(a, True, t_inverse), ops.transformed(b, False, t)


@torch.no_grad()
def add_low_rank_(
    weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, rounding: str = "nearest", seed: int | None = None
) -> Tensor:
    """weight += b diag(scale) a in place. The sum is computed in float32 (float64 for a float64 weight) and rounded
    once.

    Args:
        weight: (d_out, d_in), frozen. a: (r, d_in). b: (d_out, r).
        scale: a number or (r,).
        rounding: the rounding of a 16-bit weight, "nearest" or "stochastic" (whose expectation is exact).
        seed: the seed of stochastic rounding. None draws one from the default generator of weight's device.

    Returns:
        weight.

    Raises:
        ArgumentError: shapes or dtypes that do not fit, a trained weight, or an unknown rounding.
    """
    checks.choice(rounding, "rounding", ("nearest", "stochastic"))
    if seed is not None:
        seeds.check(seed)
    for name, x in (("weight", weight), ("a", a), ("b", b)):
        if _matrix(name, x).device != weight.device:
            raise checks.ArgumentError(name, f"a tensor on weight's device {weight.device}", x.device)
    _check_lists([a], [b])
    if tuple(weight.shape) != (b.shape[0], a.shape[1]):
        raise checks.ArgumentError("weight", f"shape {(b.shape[0], a.shape[1])}", tuple(weight.shape))
    if weight.requires_grad or _overlaps(weight):
        got = "requires_grad=True" if weight.requires_grad else "elements that share memory"
        raise checks.ArgumentError("weight", "a frozen tensor that can be changed in place", got)
    _check_contiguous_for_triton("weight", weight)
    scale = _scales(scale, a)
    if seed is None:
        seed = seeds.draw(weight.device) if rounding == "stochastic" else 0
    _ops(weight, 1).add_low_rank_([weight], [a], [b], scale[None], rounding, int(seed))
    return weight


@torch.no_grad()
def adapter_step_(
    factors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    is_a: Sequence[bool],
    hyper: Tensor,
    steps: Tensor,
    work: StepWork | None = None,
) -> Tensor | None:
    """Performs the second pass of the adapter step in place: a method's changes of gradients, factors and moments, then
    torch's AdamW. On the Triton backend it is one launch for all factors.

    Args:
        factors: parameter, gradient (only read), exp_avg and exp_avg_sq of each factor, of one shape.
        is_a: whether the rank is a factor's first dimension, (r, d_in), or its last, (d_out, r).
        hyper: learning rate, beta1, beta2, eps and weight decay of each factor, float64 (n, 5).
        steps: number of steps that each factor has taken, float32 (n,). It is advanced in place.
        work: the changes besides AdamW.

    Returns:
        with ``work.gram``, the Grams of the new factors, p pᵀ of an a and pᵀp of a b: float32 (n, R, R), zero beyond a
        factor's rank. Otherwise None.

    Raises:
        ArgumentError: shapes or dtypes that do not fit. Nothing has changed then.
    """
    work = StepWork() if work is None else work
    if not isinstance(work, StepWork):
        raise checks.ArgumentError("work", "a StepWork or None", checks.shown(work))
    _check_factors(factors, is_a)
    r = max((f[0].shape[0 if side else 1] for f, side in zip(factors, is_a, strict=True)), default=1)
    n = len(factors)
    # The twins keep float64 for float64 factors; the kernels compute in float32.
    dtype = torch.float64 if n and factors[0][0].dtype == torch.float64 else torch.float32
    device = factors[0][0].device if factors else checks.tensor(steps, "steps").device
    _check_rows("hyper", hyper, (n, 5), torch.float64, device)
    _check_rows("steps", steps, (n,), torch.float32, device)
    _check_contiguous_for_triton("steps", steps)
    if _overlaps(steps):
        raise checks.ArgumentError("steps", "a tensor that can be changed in place", "elements that share memory")
    for name, shape in (("additive", (n,)), ("matrices", (n, r, r)), ("scale_p", (n, r)), ("scale_g", (n, r))):
        if getattr(work, name) is not None:
            _check_rows(name, getattr(work, name), shape, dtype, device)
    if work.keys is not None:
        _check_rows("keys", work.keys, (n,), torch.int64, device)
        _check_contiguous_for_triton("keys", work.keys)
    # Scaled factors with unscaled gradients, or the reverse, would be those of another product.
    if (work.scale_p is None) != (work.scale_g is None):
        raise checks.ArgumentError("scale_p, scale_g", "both or neither", "one of them")
    ops = _ops(factors[0][0], r) if factors else _ops(steps, 1)
    return ops.adapter_step_(list(factors), list(is_a), hyper, steps, work)


def _check_factors(factors: Sequence, is_a: Sequence[bool]) -> None:
    for name, value in (("factors", factors), ("is_a", is_a)):
        checks.sequence(value, name)
    for i, side in enumerate(is_a):
        checks.flag(side, f"is_a[{i}]")
    if len(is_a) != len(factors):
        raise checks.ArgumentError("is_a", f"{len(factors)} values, as factors", len(is_a))
    for i, tensors in enumerate(factors):
        if len(_matrices(f"factors[{i}]", tensors)) != 4:
            raise checks.ArgumentError(f"factors[{i}]", "parameter, gradient, exp_avg and exp_avg_sq", len(tensors))
        for j, x in enumerate(tensors):
            if x.shape != tensors[0].shape or x.device != factors[0][0].device:
                expected = f"shape {tuple(tensors[0].shape)} on {factors[0][0].device}"
                raise checks.ArgumentError(f"factors[{i}][{j}]", expected, f"{tuple(x.shape)} on {x.device}")
            if _overlaps(x) and j != 1:  # the gradient is only read
                expected = "a tensor that can be changed in place"
                raise checks.ArgumentError(f"factors[{i}][{j}]", expected, "elements that share memory")
            _check_contiguous_for_triton(f"factors[{i}][{j}]", x)


def _check_rows(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    is_dense = checks.tensor(x, name).layout is torch.strided
    if not is_dense or tuple(x.shape) != shape or x.dtype != dtype or x.device != device:
        expected = f"a dense tensor of {dtype} {shape} on {device}"
        raise checks.ArgumentError(name, expected, f"{x.dtype} {tuple(x.shape)} on {x.device}, {x.layout}")


def _check_contiguous_for_triton(name: str, tensor: Tensor) -> None:
    """Raises ArgumentError for a tensor that the kernels cannot change in place."""
    if backend.uses_triton(tensor) and not tensor.is_contiguous():
        raise checks.ArgumentError(name, "a contiguous tensor on the Triton backend", f"strides {tensor.stride()}")


def _ops(tensor: Tensor, rank: int, largest_rank: int = LARGEST_RANK) -> ModuleType:
    """Returns the ops on this tensor. Raises ArgumentError for a rank that is too large for the kernels."""
    if backend.uses_triton(tensor) and rank > largest_rank:
        raise checks.ArgumentError("rank", f"at most {largest_rank} on the Triton backend", rank)
    return backend.ops("pairs", tensor)


def _together(compute: Callable, rank: Callable, *lists: Sequence) -> list[tuple[Tensor, ...]]:
    """Calls ``compute`` once for all positions of the lists that have one rank (Triton) or one shape (torch), one
    device and one dtype. Returns its results for each position. ``rank`` returns the rank from a position's first
    tensor."""

    def kind(*members: object) -> tuple:
        tensors = [x for x in members if isinstance(x, Tensor)]
        # A kernel takes factors of any sizes as long as their rank is one; torch needs equal shapes to stack them.
        sizes = rank(tensors[0]) if backend.uses_triton(tensors[0]) else tuple(x.shape for x in tensors)
        return sizes, *((x.dtype, x.device) for x in tensors)

    return map_groups(compute, kind, *lists)


def _unpack(results: list[tuple[Tensor, ...]], width: int, single: bool) -> tuple:
    """Returns the results of a single pair, or a list of each of the ``width`` results for lists."""
    return results[0] if single else tuple([result[i] for result in results] for i in range(width))


def _matrices(name: str, tensors: object) -> list[Tensor]:
    """Returns the tensors as a list. Raises ArgumentError unless they are floating-point matrices."""
    return [_matrix(f"{name}[{i}]", x) for i, x in enumerate(checks.sequence(tensors, name))]


def _matrix(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in checks.FLOATS or x.layout is not torch.strided:
        raise checks.ArgumentError(name, "a floating-point matrix", checks.shown(x))
    return x


def _overlaps(x: Tensor) -> bool:
    """Returns whether elements of a tensor share memory, as those of an expanded one do."""
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def _scales(scale: object, a: Tensor) -> Tensor:
    """Returns the scales of a product's r terms, (r,), from a number or (r,)."""
    value = scale if isinstance(scale, Tensor) else checks.python_number(scale)
    fits = isinstance(value, Tensor) and value.numel() in (1, len(a)) and value.dim() <= 1 and not value.is_complex()
    if not (fits or isinstance(value, checks.NUMBERS)) or (isinstance(value, Tensor) and value.is_meta != a.is_meta):
        raise checks.ArgumentError("scale", f"a number or a tensor of shape ({len(a)},)", checks.shown(scale))
    try:
        return torch.as_tensor(value, dtype=pairs.at_least_float32(a).dtype, device=a.device).expand(len(a))
    except (OverflowError, RuntimeError) as error:  # an int that no float can hold
        raise checks.ArgumentError("scale", "a number that a float can hold", checks.shown(scale)) from error


def _check_lists(*lists: Sequence[Tensor]) -> None:
    """Raises ArgumentError unless the lists a, b and, where given, da, db have one length, each b fits its a, and each
    gradient has the shape of its factor."""
    names = ("a", "b", "da", "db")
    for name, tensors in zip(names, lists, strict=False):
        if len(tensors) != len(lists[0]):
            raise checks.ArgumentError(name, f"{len(lists[0])} matrices, as a", len(tensors))
    for i, (a, b, *grads) in enumerate(zip(*lists, strict=True)):
        for name, x in zip(("b", "da", "db"), (b, *grads), strict=False):
            if x.device != a.device or (x.dtype == torch.float64) != (a.dtype == torch.float64):
                expected = f"a tensor on {a.device}, and float64 together with a's float64 only"
                raise checks.ArgumentError(f"{name}[{i}]", expected, f"{x.dtype} on {x.device}")
        if b.shape[1] != a.shape[0]:
            raise checks.ArgumentError(f"b[{i}]", f"shape (d_out, {a.shape[0]}) to fit a", tuple(b.shape))
        for name, factor, grad in zip(("da", "db"), (a, b), grads, strict=False):
            if grad.shape != factor.shape:
                raise checks.ArgumentError(f"{name}[{i}]", f"shape {tuple(factor.shape)}", tuple(grad.shape))


def _check_square(name: str, matrices: Tensor) -> None:
    is_square = checks.tensor(matrices, name).dim() == 3 and matrices.shape[1] == matrices.shape[2]
    if not is_square or matrices.dtype not in checks.FLOATS or matrices.layout is not torch.strided:
        raise checks.ArgumentError(name, "a floating-point (L, r, r)", checks.shown(matrices))
