"""Plain-torch twins of ScaLoRA's ops (arXiv 2510.23818): the scaling from Grams, and the merge into a weight.

Math, with x = [α²; β²] for κ = 1 (x is inversely proportional to κ and does not depend on the scale of the gradients):

    M x = λ      M = [[Kb∘Kp, K∘K], [(K∘K)ᵀ, Kq∘Ka]]      λ = [diag Kp; diag Kq]

Solver "column" solves that system, which is valid if all x ≥ 0 (Theorem 5). "scalar" has one α and one β (Theorem 3).
"nnls" minimises ½xᵀMx − λᵀx over x ≥ 0. Its optimum is the paper's wherever one of the paper's forms is optimal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.limits import COLLINEAR, INACTIVE, RIDGE
from ...kernels.records import Scaled
from .rounding import round_stochastic, scaled_to

RIDGES = (RIDGE, 10 * RIDGE, 100 * RIDGE)  # the first one with which the system factors is used
PIVOTS, ROUNDS = 8, 2  # rounds of block pivoting and of coordinate descent


def scalora_solve(
    ka: Tensor, kb: Tensor, kp: Tensor, kq: Tensor, k: Tensor, solver: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Solves for ScaLoRA's squared scales.

    Args:
        ka, kb, kp, kq, k: the Grams, (L, r, r), with gradients at any common scale.
        solver: "nnls", "paper", "column" or "scalar".

    Returns:
        x (L, 2r) for κ = 1: α² (for b's columns and a's gradient rows), then β². active (L, 2r): which entries of x the
        system determines. x is 0 for the others. info (L,): 0 where the unconstrained optimum is valid, else 1; solver
        "column" then makes all entries inactive. A pair whose Grams are not finite gets NaN, active, with info 1.
    """
    m, lam = _system(ka, kb, kp, kq, k)
    active = _active(m, ka.shape[-1])
    # A pair with a NaN must not pass for an inactive one, whose scales are 1.
    sound = torch.stack([gram.isfinite().flatten(1).all(-1) for gram in (ka, kb, kp, kq, k)]).all(0)
    if solver == "scalar":
        x, info = _scalar(m, lam, ka.shape[-1]), torch.zeros(len(m), dtype=torch.int32, device=m.device)
    else:
        x, info = _columnwise(m, lam, active, solver)
    if solver == "column":
        active = active & (info == 0)[:, None]
    x, active = torch.where(active, x, 0.0), active | ~sound[:, None]
    return x.masked_fill(~sound[:, None], torch.nan), active, info.masked_fill(~sound, 1)


def scales(
    x: Tensor, active: Tensor, kappa: float | Tensor, scaling: Tensor, low: float, high: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the scales that a step applies: √(x/κ) clipped to ``low`` and ``high``, for the x of ``scalora_solve``,
    and 1 for inactive entries, entries that are not finite, or where κ is 0 or less.

    Returns:
        scales of the factors, [α for b; β for a] (2L, r); scales of their gradients, [β; α] (2L, r); and the scale of
        the residual b a that is merged before, scaling (1 − α∘β) (L, r).
    """
    kappa = torch.as_tensor(kappa, dtype=torch.float64, device=x.device)
    chosen = active & (kappa > 0) & x.isfinite()
    scale = torch.where(chosen, (x / kappa.to(x.dtype)).sqrt().clamp(low, high), 1.0)
    alpha, beta = scale.chunk(2, -1)
    return torch.cat([alpha, beta]), torch.cat([beta, alpha]), scaling[:, None] * (1 - alpha * beta)


def _system(ka: Tensor, kb: Tensor, kp: Tensor, kq: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Returns M (L, 2r, 2r) and λ (L, 2r), for gradients divided by a power of two that brings them near 1. Powers of
    two are exact, so that the solution does not depend on the gradients' scale."""
    size = kp.diagonal(dim1=-2, dim2=-1).sum(-1) + kq.diagonal(dim1=-2, dim2=-1).sum(-1)
    exponent = (torch.frexp(size)[1] // 2)[:, None, None]
    # torch 2.10's ldexp returns the process's default dtype if that is wider.
    kp, kq, cross = (
        torch.ldexp(x, n).to(x.dtype) for x, n in ((kp, -2 * exponent), (kq, -2 * exponent), (k, -exponent))
    )
    cross = cross.square()
    top, bottom = torch.cat([kb * kp, cross], -1), torch.cat([cross.mT, kq * ka], -1)
    lam = torch.cat([kp.diagonal(dim1=-2, dim2=-1), kq.diagonal(dim1=-2, dim2=-1)], -1)
    return torch.cat([top, bottom], -2), lam


def _active(m: Tensor, r: int) -> Tensor:
    blocks = m.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, r))
    return ~(blocks <= INACTIVE * blocks.amax(-1, keepdim=True)).flatten(-2)  # not >, so that a NaN is active


def _columnwise(m: Tensor, lam: Tensor, active: Tensor, solver: str) -> tuple[Tensor, Tensor]:
    """Runs the solvers that give every column its own scale, on the system equilibrated to a unit diagonal."""
    diagonal = m.diagonal(dim1=-2, dim2=-1)
    d = torch.where(active, diagonal, 1.0).rsqrt() * active  # 0 for inactive entries: _factorable gives them 1
    unit = _factorable(d[:, :, None] * m * d[:, None, :], active)
    rhs = d * lam
    z = _solve(unit, rhs)
    valid = (z >= 0).all(-1)
    info = (~valid).to(torch.int32)
    if solver == "nnls":
        z = torch.where(valid[:, None], z, _nonnegative(unit, rhs, z))
    x = d * z
    if solver == "paper":
        x = torch.where(valid[:, None], x, _scalar(m, lam, m.shape[-1] // 2))
    return x, info


def _factorable(unit: Tensor, active: Tensor) -> Tensor:
    """Returns the system with the smallest ridge with which Cholesky succeeds, since rounding can make a singular
    system indefinite. Inactive entries get the identity."""
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    tries = [unit + torch.where(active[:, :, None], ridge * eye, eye) for ridge in RIDGES]
    result = tries[-1]
    for attempt in tries[-2::-1]:  # towards the smallest ridge, so that the smallest one that factors is kept
        fails = torch.linalg.cholesky_ex(attempt)[1] != 0
        result = torch.where(fails[:, None, None], result, attempt)
    return result


def _solve(m: Tensor, rhs: Tensor) -> Tensor:
    factor = torch.linalg.cholesky_ex(m)[0]  # cholesky waits for the device to raise an error
    return torch.cholesky_solve(rhs[:, :, None], factor)[:, :, 0]


def _nonnegative(m: Tensor, rhs: Tensor, start: Tensor) -> Tensor:
    """Minimises ½zᵀMz − rhsᵀz over z ≥ 0, starting at the unconstrained solution.

    Block pivoting comes first: it solves on the free coordinates and exchanges every coordinate whose value or slope
    has the wrong sign (Kim & Park, SIAM J. Sci. Comput. 2011). A few rounds find the zeros of the optimum nearly
    always. Then cyclic sweeps of coordinate descent alternate with steps towards the solution on the free coordinates,
    which end at the bounds. They decrease the objective where pivoting has not found the optimum.
    """
    z = start
    for _ in range(PIVOTS):
        slope = rhs - (m @ z[:, :, None])[:, :, 0]
        z = _solve_free(m, rhs, (z > 0) | ((z == 0) & (slope > 0)))
    z = z.clamp(min=0)
    diagonal = m.diagonal(dim1=-2, dim2=-1)
    for _ in range(ROUNDS):
        for j in range(m.shape[-1]):  # each coordinate's minimum, clipped to the bound
            slope = rhs[:, j] - (m[:, j] * z).sum(-1)
            z[:, j] = (z[:, j] + slope / diagonal[:, j]).clamp(min=0)
        target = _solve_free(m, rhs, z > 0)
        # The largest part of the way to the target on which no coordinate becomes negative.
        reach = torch.where(target < 0, z / (z - target), 1.0).amin(-1, keepdim=True)
        z = torch.lerp(z, target, reach).clamp(min=0)
    return z


def _solve_free(m: Tensor, rhs: Tensor, free: Tensor) -> Tensor:
    """Returns the solution on the free coordinates, with exact zeros on the others."""
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    return _solve(torch.where(free[:, :, None] & free[:, None, :], m, eye), rhs * free)


def _scalar(m: Tensor, lam: Tensor, r: int) -> Tensor:
    """Returns the solution of Theorem 3, (L, 2r) with one value for all α² and one for all β²."""
    pa, pb = lam[:, :r].sum(-1), lam[:, r:].sum(-1)
    maa, mbb, c = m[:, :r, :r].sum((-1, -2)), m[:, r:, r:].sum((-1, -2)), m[:, :r, r:].sum((-1, -2))
    ca, cb, det = pa * mbb - pb * c, pb * maa - pa * c, maa * mbb - c * c
    # Both scalars are positive where Cramer's rule gives positive ones. Otherwise the optimum has one scalar at 0.
    zero = torch.zeros_like(pa)
    only_a, only_b = (ca > 0) & (cb <= 0), (cb > 0) & (ca <= 0)
    both = (ca >= 0) & (cb >= 0) & (det > COLLINEAR * maa * mbb) & ~only_a & ~only_b
    only_a = only_a | (~both & ~only_b & (maa > 0))
    alpha = torch.where(both, ca / det, torch.where(only_a, pa / maa, zero))
    beta = torch.where(both, cb / det, torch.where(only_a, zero, pb / mbb))
    return torch.cat([alpha[:, None].expand(-1, r), beta[:, None].expand(-1, r)], -1)


def add_low_rank_(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rounding: str,
    seed: int | None = 0,
    residual: Tensor | None = None,
    scaled: Scaled | None = None,
) -> None:
    """weight += b diag(scale) a in place: (d_out, d_in), (r, d_in), (d_out, r), (r,). A rank whose scale is 0 adds 0,
    also where a or b is not finite. With ``scaled``, of one pair, factors of 16 bits are rounded when they are
    then scaled; what is added is the product less that of the rounded factors.

    The sum is computed in float32 (float64 for a float64 weight) and rounded once. "compensated" stores the rounding
    error in ``residual``, which has the weight's shape and dtype.
    """
    exact = weight.dtype in (torch.float32, torch.float64)
    total = weight if exact else weight.float()
    if rounding == "compensated" and not exact:
        assert residual is not None, "compensated rounding adds a residual"
        total += residual
    for term_b, term_a in lost_terms(a, b, scale, scaled):
        total.addmm_(term_b.to(total.dtype), term_a.to(total.dtype))
    if exact:
        return
    if rounding == "stochastic":
        # torch's generator is several times faster than ``rounding.noise``. Without a seed it is the device's default
        # one, the only one that a CUDA graph can capture.
        generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
        numbers = torch.randint(1 << 16, total.shape, generator=generator, device=weight.device, dtype=torch.int32)
        weight.copy_(round_stochastic(total, numbers, weight.dtype))
        return
    weight.copy_(total)
    if rounding == "compensated" and residual is not None:
        residual.copy_(total.sub_(weight))


def lost_terms(a: Tensor, b: Tensor, scale: Tensor, scaled: Scaled | None) -> list[tuple[Tensor, Tensor]]:
    """Returns what the product of a pair loses by a scaling, as terms (b', a') of which b' a' is the sum."""
    if scaled is None or a.dtype.itemsize != 2:
        changes = scale != 0
        return [(torch.where(changes, b * scale, 0.0), torch.where(changes[:, None], a, 0.0))]
    changes = (scaled.alpha != 1) | (scaled.beta != 1)
    b, a = torch.where(changes, b, 0.0), torch.where(changes[:, None], a, 0.0)
    new_b, new_a = scaled_to(b, scaled.alpha, b.dtype), scaled_to(a, scaled.beta[:, None], a.dtype)
    return [(b * scaled.scaling, a), (new_b * -scaled.scaling, new_a)]
