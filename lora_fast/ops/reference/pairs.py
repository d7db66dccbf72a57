"""Plain-torch twins of the adapter step's ops, batched over pairs of equal shape. They are the specification of the
kernels, the oracle of their tests, and the backend on a CPU.

Stacked pairs are a (L, r, d_in), b (L, d_out, r) and their gradients, in any floating-point dtype. r×r results are
float32, or float64 for float64 inputs. No function waits for the device: none reads a value from it to branch on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.grouping import group_by
from ...kernels.limits import MUON_DAMPING_ULPS
from ...kernels.records import Grams, StepWork
from . import scalora_solution
from .rounding import round_factors, scaled_to
from .scalora_solution import scales, scalora_solve

__all__ = [
    "adapter_step_",
    "add_low_rank_",
    "factor_grams",
    "imbalance",
    "muon",
    "pair_grams",
    "scale_reg",
    "scales",
    "scalora_solve",
    "small_inverse",
    "spd_inverse",
    "spd_solve",
    "transformed",
]


def at_least_float32(x: Tensor) -> Tensor:
    """Returns x in float32, or x itself if it is float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grams(a: Tensor, b: Tensor, da: Tensor | None = None, db: Tensor | None = None) -> Grams:
    """Returns the Grams of stacked factors: Ka and Kb, and all five where gradients are given."""
    a, b = at_least_float32(a), at_least_float32(b)
    ka, kb = a @ a.mT, b.mT @ b
    if da is None or db is None:
        return Grams(ka, kb)
    da, db = at_least_float32(da), at_least_float32(db)
    return Grams(ka, kb, da @ da.mT, db.mT @ db, da @ a.mT)


def factor_grams(factors: list[Tensor], is_a: list[bool]) -> Tensor:
    """Returns x xᵀ of each a and xᵀx of each b, (n, r, r). The factors have one shape and one value of ``is_a``."""
    x = at_least_float32(torch.stack(factors))
    return x @ x.mT if is_a[0] else x.mT @ x


def pair_grams(
    a: list[Tensor], b: list[Tensor], da: list[Tensor] | None = None, db: list[Tensor] | None = None
) -> Grams:
    """Returns the Grams of a list of pairs of one shape: Ka and Kb, and all five where gradients are given."""
    lists = [a, b] if da is None or db is None else [a, b, da, db]
    return grams(*(torch.stack(members) for members in lists))


def transformed(factors: list[Tensor], is_a: bool, matrices: Tensor) -> list[Tensor]:
    """Returns M x of each a, or x M of each b, rounded to x's dtype."""
    x = torch.stack(factors)
    return list((matrices @ at_least_float32(x) if is_a else at_least_float32(x) @ matrices).to(x.dtype))


def add_low_rank_(
    weights: list[Tensor], a: list[Tensor], b: list[Tensor], scale: Tensor, rounding: str = "nearest", seed: int = 0
) -> None:
    """weights[i] += b[i] diag(scale[i]) a[i] in place; scale is (n, r)."""
    for operands in zip(weights, a, b, scale, strict=True):
        scalora_solution.add_low_rank_(*operands, rounding, seed)


def spd_solve(matrices: Tensor, rhs: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """Returns x with (matrices + damping I) x = rhs: (L, r, r), (L, r, k) → (L, r, k), info (L,).

    info is 0, or the order of the leading minor that is not positive definite. The x of that matrix is NaN; those of
    the others are not affected.
    """
    factor, info = cholesky(at_least_float32(matrices), damping)
    x = torch.cholesky_solve(at_least_float32(rhs), factor)
    return x.masked_fill((info != 0)[:, None, None], torch.nan), info


def spd_inverse(matrices: Tensor, damping: float) -> Tensor:
    """Returns (matrices + damping I)⁻¹ of Grams: (L, r, r). A Gram that rounding made indefinite gets r ε tr more
    damping."""
    matrices = at_least_float32(matrices)
    r = matrices.shape[-1]
    factor, info = cholesky(matrices, damping)
    if info.device.type == "cpu" and not info.any():  # reading info of a CPU tensor waits for nothing
        return torch.cholesky_inverse(factor)
    more = matrices.diagonal(dim1=-2, dim2=-1).sum(-1) * (r * torch.finfo(matrices.dtype).eps)
    ridge = torch.where(info != 0, more, 0.0)[:, None, None] * torch.eye(r, dtype=matrices.dtype, device=more.device)
    factor, info = cholesky(matrices + ridge, damping)
    return torch.cholesky_inverse(factor).masked_fill((info != 0)[:, None, None], torch.nan)


def cholesky(matrices: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns the Cholesky factor and info of matrices + damping I. A matrix with a NaN counts as not positive
    definite."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    factor, info = torch.linalg.cholesky_ex(matrices + damping * eye)
    bad = ~torch.isfinite(factor).all(-1).all(-1)
    return factor, torch.where(bad & (info == 0), 1, info)


def small_inverse(matrices: Tensor) -> Tensor:
    """Returns inverses of (L, r, r) whose symmetric part is at least I, after one refinement W ← 2W − W M W."""
    matrices = at_least_float32(matrices)
    inverse = torch.linalg.inv_ex(matrices)[0]  # inv waits for the device to raise an error
    return 2 * inverse - inverse @ (matrices @ inverse)


def adapter_step_(
    factors: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    is_a: list[bool],
    hyper: Tensor,
    steps: Tensor,
    work: StepWork,
) -> Tensor | None:
    """Performs an optimizer step on factors (p, g, m, v) of any shapes, in place except for g. Returns the Grams of the
    new p, float32 (n, R, R), if ``work.gram``."""
    steps += 1
    largest = max((f[0].shape[0 if side else 1] for f, side in zip(factors, is_a, strict=True)), default=1)
    totals = None
    if work.gram:
        totals = torch.zeros(len(factors), largest, largest, dtype=torch.float32, device=hyper.device)
    kind = lambda i: (is_a[i], factors[i][0].shape, *(x.dtype for x in factors[i]))
    for indices in group_by(range(len(factors)), kind).values():
        side = is_a[indices[0]]
        stacks = [at_least_float32(torch.stack([factors[i][j] for i in indices])) for j in range(4)]
        r = stacks[0].shape[1 if side else 2]
        parts = [None if x is None else x[indices] for x in work[:4]]
        # Rows of ``work`` are padded to the largest rank in every dimension but the first.
        parts = [x if x is None else x[(slice(None), *[slice(r)] * (x.dim() - 1))] for x in parts]
        dtype, t = factors[indices[0]][0].dtype, steps[indices]
        new_p, *moments = _step_stacks(stacks, dtype, side, hyper[indices], t, *parts)
        keys = None if work.keys is None else work.keys[indices]
        is_flat = not work.gram and all(part is None for part in parts)
        new_p = round_factors(new_p, dtype, keys, t, None if is_flat else side)
        for j, stack in zip((0, 2, 3), (new_p, *moments), strict=True):  # p, m and v
            for i, x in zip(indices, stack, strict=True):
                factors[i][j].copy_(x)
        if totals is not None:
            p = at_least_float32(torch.stack([factors[i][0] for i in indices]))
            totals[indices, :r, :r] = (p @ p.mT if side else p.mT @ p).float()
    return totals


def _step_stacks(
    stacks: list[Tensor], dtype: torch.dtype, is_a: bool, hyper: Tensor, t: Tensor, additive, matrices, scale_p, scale_g
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the new p, m and v of the stacks p, g, m and v, (L, …) each. Scaled factors are rounded to ``dtype``, as
    the merge rounds them."""
    p, g, m, v = stacks
    if additive is not None:
        g = g + additive[:, None, None] * p
    if matrices is not None:
        g = matrices @ g if is_a else g @ matrices
    if scale_p is not None:
        d, e = ((x[:, :, None] if is_a else x[:, None, :]) for x in (scale_p, scale_g))
        p, g, m, v = scaled_to(p, d, dtype).to(p.dtype), e * g, e * m, e * e * v
    lr, beta1, beta2, eps, decay = hyper[:, :, None, None].unbind(1)
    t = t.double()[:, None, None]
    cast = lambda x: x.to(p.dtype)  # scalars are computed in float64, since 1 − β₂ has few digits in float32
    m = m + cast(1 - beta1) * (g - m)
    v = cast(beta2) * v + cast(1 - beta2) * g * g
    p = cast(1 - lr * decay) * p - cast(lr / (1 - beta1**t)) * (
        m / (v.sqrt() / cast((1 - beta2**t).sqrt()) + cast(eps))
    )
    return p, m, v


def imbalance(ka: Tensor, kb: Tensor, rho: Tensor, lr_a: float | Tensor, lr_b: float | Tensor, lam: float) -> Tensor:
    """Returns iLoRA's matrices M (2L, r, r), for b += b M and a += M a: M = h_b ρ D for b and −h_a D for a, with
    D = Ka − ρ Kb and h = lr λ clipped to 1 / ((1+ρ) max(σ₁(a)², ρ σ₁(b)²)). σ₁² is bounded by the largest absolute row
    sum of the Gram."""
    rho = rho[:, None, None]
    largest = torch.maximum(_row_sum(ka), rho * _row_sum(kb))
    bound = 1.0 / ((1.0 + rho) * largest)  # infinite for a pair of zeros, whose D is 0
    d = ka - rho * kb
    return torch.cat([rho * bound.clamp(max=lr_b * lam) * d, -bound.clamp(max=lr_a * lam) * d])


def scale_reg(ka: Tensor, kb: Tensor, entries_a: Tensor, entries_b: Tensor, lam: float, eps: float) -> Tensor:
    """Returns scale regularization's coefficients (2L,), for which the gradient of λ ℓ² is coefficient · factor. They
    are 0 where a = 0. ``entries_a`` and ``entries_b`` (L,) are the numbers of entries of the factors."""
    size_a, size_b = (k.diagonal(dim1=-2, dim2=-1).sum(-1) for k in (ka, kb))  # ‖a‖² and ‖b‖²
    tilt = 4 * lam * ((size_a / entries_a).log() - (size_b / entries_b + eps).log())
    coefficients = torch.stack([-tilt / (size_b + eps * entries_b), tilt / size_a])
    return coefficients.masked_fill(size_a == 0, 0.0).flatten()


def _row_sum(k: Tensor) -> Tensor:
    """Returns the largest absolute row sum, (L, 1, 1)."""
    return k.abs().sum(-1).amax(-1)[:, None, None]


def muon(
    ka: Tensor, kb: Tensor, kp: Tensor, kq: Tensor, lr_a: float | Tensor, lr_b: float | Tensor, damping: float
) -> Tensor:
    """Returns LoRA-Muon's matrices −(η/2) T (2L, r, r), by which m_b is multiplied from the right and m_a from the
    left. T is (Ka # Kq)⁻¹ for b and (Kb # Kp)⁻¹ for a, where Kp = m_a m_aᵀ and Kq = m_bᵀ m_b. ``inverse_mean`` defines
    ``damping``."""
    return torch.cat([-0.5 * lr_b * inverse_mean(ka, kq, damping), -0.5 * lr_a * inverse_mean(kb, kp, damping)])


def inverse_mean(x: Tensor, y: Tensor, damping: float) -> Tensor:
    """Returns (X # Y)⁻¹ of Grams (L, r, r), the inverse of their geometric mean. With R = X^-½ it is R (R Y R)^-½ R,
    the SPD solution of T X T = Y⁻¹ and T Y T = X⁻¹.

    ``damping`` times its trace times I is added to each Gram; a damping below 16 ε of the Grams' dtype counts as 16 ε.
    The result is 0 where a Gram is 0, and NaN where one is not finite. The algebra runs in float64.
    """
    dtype, size = x.dtype, x.shape[-1]
    eye = torch.eye(size, dtype=torch.float64, device=x.device)
    traces = [k.double().diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] for k in (x, y)]
    zero = (traces[0] == 0) | (traces[1] == 0)
    bad = ~torch.isfinite(x.double().sum((-2, -1)) + y.double().sum((-2, -1)))[:, None, None]
    damping = max(damping, MUON_DAMPING_ULPS * torch.finfo(dtype).eps)
    x, y = (
        torch.where(zero | bad, eye, k.double() + damping * trace * eye)
        for k, trace in zip((x, y), traces, strict=True)
    )
    q, values = positive_eigenvalues(x)
    root = (q * values.rsqrt()[:, None, :]) @ q.mT
    q, values = positive_eigenvalues(root @ y @ root)
    half = root @ (q * values.pow(-0.25)[:, None, :])
    return (half @ half.mT).masked_fill(bad, torch.nan).masked_fill(zero, 0.0).to(dtype)


def positive_eigenvalues(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvectors (L, r, r) and eigenvalues (L, r) of symmetric positive matrices. Eigenvalues below ε times
    the largest are rounding errors and are raised to it."""
    values, q = torch.linalg.eigh(0.5 * (matrices + matrices.mT))
    return q, torch.maximum(values, torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True))
