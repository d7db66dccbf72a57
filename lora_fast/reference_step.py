"""Plain-torch twins of the adapter step's operations, batched over pairs of equal shape: the specification, the oracle
of the kernels' tests, and the backend on a CPU.

Pairs come stacked: a (L, r, d_in), b (L, d_out, r) and their gradients. Any floating dtype; r×r results are float32, or
float64 where the inputs are. Nothing here waits for a device: no value is read on the host, no branch depends on one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAUGES = ("symmetric", "svd", "svd_signed")
CACHED = 1 << 18  # elements of a stack that are transformed at a time on a CPU
BALANCE_FLOOR = 1e-6  # of the largest singular value: below, a direction is not rescaled further


class Grams(NamedTuple):
    """Each (L, r, r): Ka = a aᵀ, Kb = bᵀb; with gradients Kp = da daᵀ, Kq = dbᵀdb, K = da aᵀ, else None."""

    ka: Tensor
    kb: Tensor
    kp: Tensor | None = None
    kq: Tensor | None = None
    k: Tensor | None = None


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is if it has at least that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grams(a: Tensor, b: Tensor, da: Tensor | None = None, db: Tensor | None = None) -> Grams:
    """The Grams of the factors and, where gradients are given, of the gradients."""
    a, b = wide(a), wide(b)
    ka, kb = a @ a.mT, b.mT @ b
    if da is None:
        return Grams(ka, kb)
    da, db = wide(da), wide(db)
    return Grams(ka, kb, da @ da.mT, db.mT @ db, da @ a.mT)


def spd_solve(matrices: Tensor, rhs: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """x with (matrices + damping I) x = rhs: (L, r, r), (L, r, k) → (L, r, k), info (L,).

    info is 0, or the order of the leading minor that is not positive definite; that x is NaN, the others are not
    affected.
    """
    factor, info = _cholesky(wide(matrices), damping)
    x = torch.cholesky_solve(wide(rhs), factor)
    return x.masked_fill((info != 0)[:, None, None], torch.nan), info


def spd_inverse(matrices: Tensor, damping: float) -> Tensor:
    """(matrices + damping I)⁻¹ of Grams: (L, r, r). A Gram that rounding left indefinite gets r ε tr more damping."""
    matrices = wide(matrices)
    r = matrices.shape[-1]
    _, info = _cholesky(matrices, damping)
    more = matrices.diagonal(dim1=-2, dim2=-1).sum(-1) * (r * torch.finfo(matrices.dtype).eps)
    ridge = torch.where(info != 0, more, 0.0)[:, None, None] * torch.eye(r, dtype=matrices.dtype, device=more.device)
    factor, info = _cholesky(matrices + ridge, damping)
    return torch.cholesky_inverse(factor).masked_fill((info != 0)[:, None, None], torch.nan)


def _cholesky(matrices: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Factor and info of matrices + damping I; a NaN counts as not positive definite."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    factor, info = torch.linalg.cholesky_ex(matrices + damping * eye)
    bad = ~torch.isfinite(factor).all(-1).all(-1)
    return factor, torch.where(bad & (info == 0), 1, info)


def small_inverse(matrices: Tensor) -> Tensor:
    """Inverses of (L, r, r) whose symmetric part is at least I, with one step of refinement W ← 2W − W M W."""
    matrices = wide(matrices)
    inverse = torch.linalg.inv_ex(matrices)[0]
    return 2 * inverse - inverse @ (matrices @ inverse)


def adamw(p: list, g: list, m: list, v: list, steps: list, lr, betas, eps: float, weight_decay: float) -> None:
    """torch's AdamW (its fused form) in place on lists of tensors of one dtype and device. ``steps``: float32 scalars,
    already counting this step, one a tensor."""
    torch._fused_adamw_(
        p, g, m, v, [], steps, lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def imbalance_step_(a: Tensor, b: Tensor, rho: float, h_a: float | Tensor, h_b: float | Tensor) -> None:
    """iLoRA, in place: a − h D a and b + h ρ b D with D = a aᵀ − ρ bᵀb, each h clipped to
    1 / ((1+ρ) max(σ₁(a)², ρ σ₁(b)²)), σ₁² bounded by the Gram's largest absolute row sum."""
    for a_part, b_part in _in_cache(a, b):
        wide_a, wide_b = wide(a_part), wide(b_part)
        ka, kb, *_ = grams(wide_a, wide_b)
        largest = torch.maximum(_row_sum(ka), rho * _row_sum(kb))
        bound = (1.0 / ((1.0 + rho) * largest))[:, None, None]  # infinite for a pair of zeros, whose D is 0
        d = ka - rho * kb
        a_part.copy_(torch.baddbmm(wide_a, bound.clamp(max=h_a) * d, wide_a, alpha=-1))
        b_part.copy_(torch.baddbmm(wide_b, wide_b, rho * bound.clamp(max=h_b) * d))


def precondition_(da: Tensor, db: Tensor, a: Tensor, b: Tensor, damping: float) -> None:
    """Scaled AdamW, in place: da ← (bᵀb + δI)⁻¹ da, db ← db (a aᵀ + δI)⁻¹."""
    ka, kb, *_ = grams(a, b)
    inverse_a, inverse_b = spd_inverse(torch.cat([ka, kb]), damping).chunk(2)
    for da_part, inverse in _in_cache(da, inverse_b):
        da_part.copy_(inverse @ wide(da_part))
    for db_part, inverse in _in_cache(db, inverse_a):
        db_part.copy_(wide(db_part) @ inverse)


def _in_cache(*stacks: Tensor):
    """Parts of the stacks that a CPU's cache holds; elsewhere the stacks as they are."""
    size = max(1, CACHED // stacks[0][0].numel()) if stacks[0].device.type == "cpu" else len(stacks[0])
    return zip(*(stack.split(size) for stack in stacks), strict=True)


def _row_sum(k: Tensor) -> Tensor:
    return k.abs().sum(-1).amax(-1)


def hyperbalance(ka: Tensor, kb: Tensor, gauge: str = "symmetric") -> tuple[Tensor, Tensor]:
    """BaLoRA: T and T⁻¹ (L, r, r), such that b T and T⁻¹ a have the same Gram: T Tᵀ = Kb⁻¹ # Ka (geometric mean).

    The identity where b = 0 or a has not full rank. The algebra runs in float64: it squares conditions.
    """
    ka, kb, dtype = ka.double(), kb.double(), ka.dtype
    eye = torch.eye(ka.shape[-1], dtype=ka.dtype, device=ka.device)
    lower, info = _cholesky(ka, 0.0)
    skip = ((info != 0) | (kb.diagonal(dim1=-2, dim2=-1).sum(-1) == 0))[:, None, None]
    lower = torch.where(skip, eye, lower)
    core = torch.where(skip, eye, lower.mT @ kb @ lower)
    v = torch.linalg.eigh(0.5 * (core + core.mT))[1].flip(-1)
    base = lower @ v
    sigma = (base * (kb @ base)).sum(-2).clamp(min=0).sqrt()  # re-measured: ‖b base_j‖
    sigma = torch.where(skip[:, 0], 1.0, torch.maximum(sigma, BALANCE_FLOOR * sigma.amax(-1, keepdim=True)))
    inverse_base = v.mT @ torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    if gauge == "symmetric":
        squared = base @ (base / sigma[:, None, :]).mT
        q, d = _symmetric_root(squared)
        t, t_inverse = (q * d[:, None, :]) @ q.mT, (q / d[:, None, :]) @ q.mT
    else:
        root = sigma.sqrt()
        t, t_inverse = base / root[:, None, :], root[:, :, None] * inverse_base
        if gauge == "svd_signed":
            sign = torch.where(t.gather(-2, t.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0)
            t, t_inverse = t * sign, t_inverse * sign.mT
    return torch.where(skip, eye, t).to(dtype), torch.where(skip, eye, t_inverse).to(dtype)


def _symmetric_root(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (L, r, r), and square roots (L, r) of the eigenvalues, of symmetric positive matrices."""
    values, q = torch.linalg.eigh(0.5 * (matrices + matrices.mT))
    return q, values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()


def rite_factor(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LoRA-RITE: U, R and the pseudo-inverse of R with x = U R, of b (L, d_out, r) or aᵀ (L, d_in, r)."""
    u, upper = torch.linalg.qr(wide(x))
    return u, upper, torch.linalg.pinv(upper)


def rite_update(
    g: Tensor, m: Tensor, v: Tensor, u: Tensor, u_old: Tensor, beta1: float, beta2: float, eps: float
) -> tuple[Tensor, Tensor]:
    """LoRA-RITE: the next moments (m, v) for unmagnified gradients g (L, r, d): moments are carried into the new basis,
    V is the average of g gᵀ/d, m that of (V^½ + ε)⁻¹ g; the betas are bias-corrected."""
    carry = u.mT @ u_old
    v = carry @ v @ carry.mT
    v = beta2 * v + (1 - beta2) * (g @ g.mT / g.shape[-1])
    values, q = torch.linalg.eigh(0.5 * (v + v.mT))
    whitened = q @ ((q.mT @ g) / (values.clamp(min=0).sqrt() + eps)[:, :, None])
    return beta1 * (carry @ m) + (1 - beta1) * whitened, v
