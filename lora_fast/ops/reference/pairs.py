"""Plain-torch twins of the adapter step's operations, batched over pairs of equal shape: the specification, the oracle
of the kernels' tests, and the backend on a CPU.

Pairs come stacked: a (L, r, d_in), b (L, d_out, r) and their gradients. Any floating dtype; r×r results are float32, or
float64 where the inputs are. Nothing here waits for a device: no value is read from one, no branch depends on one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAUGES = ("symmetric", "svd", "svd_signed")
BALANCE_FLOOR = 1e-6  # of the largest singular value: below, a direction is not rescaled further
LEAST_MUON_DAMPING = 16.0  # of LoRA-Muon's Grams, in units of ε tr: their rounding


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
    factor, info = _cholesky(matrices, damping)
    if not info.is_cuda and not info.any():  # nothing to wait for, and as a rule nothing more to do
        return torch.cholesky_inverse(factor)
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


def adamw(p: list, g: list, m: list, v: list, steps: list, settings: dict) -> None:
    """torch's AdamW (its fused form) in place on lists of tensors of one dtype and device. ``steps`` are float32
    scalars, one a tensor, that already count this step. ``settings`` has lr, betas, eps and weight_decay. A gradient
    may have any strides; m and v have those of p."""
    beta1, beta2 = settings["betas"]
    torch._fused_adamw_(
        p, list(map(with_strides_of, g, p)), m, v, [], steps, lr=settings["lr"], beta1=beta1, beta2=beta2,
        weight_decay=settings["weight_decay"], eps=settings["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip


def with_strides_of(x: Tensor, p: Tensor) -> Tensor:
    """Returns x with the strides of p, copied if it has others: on a CPU torch's fused AdamW reads every tensor in the
    order of its memory."""
    if x.stride() == p.stride():
        return x
    return torch.empty_like(p, dtype=x.dtype, device=x.device).copy_(x)


def adapter_step_(
    factors: list[tuple[Tensor, Tensor, Tensor, Tensor]], is_a: list[bool], hyper: Tensor, steps: Tensor,
    additive: Tensor | None, matrices: Tensor | None, scale_p: Tensor | None, scale_g: Tensor | None, gram: bool,
) -> Tensor | None:  # fmt: skip
    """Pass 2 on (p, g, m, v) of any shapes, in place but for g; ``functional.StepWork`` says what else there is.
    Returns the Grams of the new p, (n, R, R), if asked."""
    steps += 1
    by_shape: dict[tuple, list[int]] = {}
    for i, (tensors, side) in enumerate(zip(factors, is_a, strict=True)):
        by_shape.setdefault((tensors[0].shape, side, *(x.dtype for x in tensors)), []).append(i)
    largest = max((f[0].shape[0 if side else 1] for f, side in zip(factors, is_a, strict=True)), default=1)
    totals = torch.zeros(len(factors), largest, largest, dtype=torch.float32, device=hyper.device) if gram else None
    for (_, side, *_), members in by_shape.items():
        stacks = [torch.stack([factors[i][j] for i in members]) for j in range(4)]
        r = stacks[0].shape[1 if side else 2]
        own = [None if x is None else x[members] for x in (additive, matrices, scale_p, scale_g)]
        own = [x if x is None else x[tuple([slice(None)] + [slice(r)] * (x.dim() - 1))] for x in own]
        moved = _step_of(*map(wide, stacks), side, hyper[members], steps[members], *own)
        for j, new in zip((0, 2, 3), moved, strict=True):
            for i, x in zip(members, new, strict=True):
                factors[i][j].copy_(x)
        if gram:
            p = wide(torch.stack([factors[i][0] for i in members]))
            totals[members, :r, :r] = (p @ p.mT if side else p.mT @ p).float()
    return totals


def _step_of(p, g, m, v, is_a: bool, hyper: Tensor, t: Tensor, additive, matrices, scale_p, scale_g) -> tuple:
    """New p, m, v of stacks (L, …)."""
    if additive is not None:
        g = g + additive[:, None, None] * p
    if matrices is not None:
        g = matrices @ g if is_a else g @ matrices
    if scale_p is not None:
        d, e = ((x[:, :, None] if is_a else x[:, None, :]) for x in (scale_p, scale_g))
        p, g, m, v = d * p, e * g, e * m, e * e * v
    lr, beta1, beta2, eps, decay = hyper[:, :, None, None].unbind(1)
    t = t.double()[:, None, None]
    of = lambda x: x.to(p.dtype)
    m = m + of(1 - beta1) * (g - m)
    v = of(beta2) * v + of(1 - beta2) * g * g
    p = of(1 - lr * decay) * p - of(lr / (1 - beta1**t)) * (m / (v.sqrt() / of((1 - beta2**t).sqrt()) + of(eps)))
    return p, m, v


def imbalance(ka: Tensor, kb: Tensor, rho: Tensor, lr_a: float | Tensor, lr_b: float | Tensor, lam: float) -> Tensor:
    """iLoRA: what is added to b and a, as b M and M a: M = h_b ρ D, then −h_a D, (2L, r, r), with D = Ka − ρ Kb and
    h = lr λ clipped to 1 / ((1+ρ) max(σ₁(a)², ρ σ₁(b)²)), σ₁² at most the largest absolute row sum of its Gram."""
    rho = rho[:, None, None]
    largest = torch.maximum(_row_sum(ka), rho * _row_sum(kb))
    bound = 1.0 / ((1.0 + rho) * largest)  # infinite for a pair of zeros, whose D is 0
    d = ka - rho * kb
    return torch.cat([rho * bound.clamp(max=lr_b * lam) * d, -bound.clamp(max=lr_a * lam) * d])


def scale_reg(ka: Tensor, kb: Tensor, entries_a: Tensor, entries_b: Tensor, lam: float, eps: float) -> Tensor:
    """Scale regularization: the gradient of λ ℓ² is coefficient · factor, (2L,), b's first. 0 where a = 0.
    entries_a, entries_b: (L,), the factors' sizes."""
    size_a, size_b = (k.diagonal(dim1=-2, dim2=-1).sum(-1) for k in (ka, kb))
    tilt = 4 * lam * ((size_a / entries_a).log() - (size_b / entries_b + eps).log())
    coefficients = torch.stack([-tilt / (size_b + eps * entries_b), tilt / size_a])
    return coefficients.masked_fill(size_a == 0, 0.0).flatten()


def _row_sum(k: Tensor) -> Tensor:
    return k.abs().sum(-1).amax(-1)[:, None, None]


def hyperbalance(ka: Tensor, kb: Tensor, gauge: str = "symmetric") -> tuple[Tensor, Tensor]:
    """BaLoRA: T and T⁻¹ (L, r, r), such that b T and T⁻¹ a have the same Gram: T Tᵀ = Kb⁻¹ # Ka (geometric mean).

    The identity where b = 0 or a has not full rank. The algebra runs in float64: it squares conditions.
    """
    base, inverse_base, sigma, skip = _balanced_basis(ka, kb)
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
    return _where_not(skip, t, t_inverse, ka.dtype)


def refactor(ka: Tensor, kb: Tensor) -> tuple[Tensor, Tensor]:
    """RefLoRA: S = Kb⁻¹ # Ka, the SPD solution of S Kb S = Ka, and S⁻¹, (L, r, r).

    The identity where b = 0 or a has not full rank. The algebra runs in float64, as that of ``hyperbalance``, whose
    T Tᵀ is S; directions in which b vanishes are treated as there.
    """
    base, inverse_base, sigma, skip = _balanced_basis(ka, kb)
    s, s_inverse = base @ (base / sigma[:, None, :]).mT, inverse_base.mT @ (sigma[:, :, None] * inverse_base)
    return _where_not(skip, s, s_inverse, ka.dtype)


def _balanced_basis(ka: Tensor, kb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """N = L V, N⁻¹ and σ in float64, with Ka = L Lᵀ and Lᵀ Kb L = V diag(σ²) Vᵀ, so that N Nᵀ = Ka and
    Nᵀ Kb N = diag(σ²); and where b = 0 or a has not full rank, (L, 1, 1): L is the identity there, σ is 1."""
    ka, kb = ka.double(), kb.double()
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
    return base, inverse_base, sigma, skip


def _where_not(skip: Tensor, matrices: Tensor, inverses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in ``dtype``, the identity where ``skip``."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(skip, eye, matrices).to(dtype), torch.where(skip, eye, inverses).to(dtype)


def muon(
    ka: Tensor, kb: Tensor, kp: Tensor, kq: Tensor, lr_a: float | Tensor, lr_b: float | Tensor, damping: float
) -> Tensor:
    """LoRA-Muon: what m_b is multiplied by from the right and m_a from the left, (2L, r, r), b's first: −(η/2) T with
    T = (Ka # Kq)⁻¹ for b and (Kb # Kp)⁻¹ for a, where Kp = m_a m_aᵀ and Kq = m_bᵀ m_b. For ``damping``, see
    ``inverse_mean``."""
    return torch.cat([-0.5 * lr_b * inverse_mean(ka, kq, damping), -0.5 * lr_a * inverse_mean(kb, kp, damping)])


def inverse_mean(x: Tensor, y: Tensor, damping: float) -> Tensor:
    """(X # Y)⁻¹ of Grams (L, r, r), the inverse of their geometric mean: with R = X^-½ it is R (R Y R)^-½ R, the SPD
    solution of T X T = Y⁻¹ and T Y T = X⁻¹.

    To each Gram, ``damping`` times its trace times I is added, with ``damping`` at least 16 ε of its dtype. The result
    is 0 where a Gram is 0, and NaN where one is not finite. The algebra runs in float64.
    """
    dtype, size = x.dtype, x.shape[-1]
    eye = torch.eye(size, dtype=torch.float64, device=x.device)
    traces = [k.double().diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] for k in (x, y)]
    zero = (traces[0] == 0) | (traces[1] == 0)
    bad = ~torch.isfinite(x.double().sum((-2, -1)) + y.double().sum((-2, -1)))[:, None, None]
    damping = max(damping, LEAST_MUON_DAMPING * torch.finfo(dtype).eps)
    x, y = (
        torch.where(zero | bad, eye, k.double() + damping * trace * eye)
        for k, trace in zip((x, y), traces, strict=True)
    )
    q, values = _positive_eigenvalues(x)
    root = (q * values.rsqrt()[:, None, :]) @ q.mT
    q, values = _positive_eigenvalues(root @ y @ root)
    half = root @ (q * values.pow(-0.25)[:, None, :])
    return (half @ half.mT).masked_fill(bad, torch.nan).masked_fill(zero, 0.0).to(dtype)


def _positive_eigenvalues(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (L, r, r) and eigenvalues (L, r) of symmetric positive matrices; below ε of the largest, which is
    rounding, an eigenvalue counts as that."""
    values, q = torch.linalg.eigh(0.5 * (matrices + matrices.mT))
    return q, torch.maximum(values, torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True))


def _symmetric_root(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (L, r, r), and square roots (L, r) of the eigenvalues, of symmetric positive matrices."""
    values, q = torch.linalg.eigh(0.5 * (matrices + matrices.mT))
    return q, values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()


def rite_factor(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LoRA-RITE: U, R and the pseudo-inverse of R with x = U R, of b (L, d_out, r) or aᵀ (L, d_in, r)."""
    u, upper = torch.linalg.qr(wide(x))
    return u, upper, torch.linalg.pinv(upper)


def rite_update(
    g: Tensor, m: Tensor, v: Tensor, u: Tensor, u_old: Tensor, beta1: Tensor, beta2: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """LoRA-RITE: the next moments (m, v) for unmagnified gradients g (L, r, d): moments are carried into the new basis,
    V is the average of g gᵀ/d, m that of (V^½ + ε)⁻¹ g; the betas are bias-corrected, float64 (L, 1, 1)."""
    keep_m, new_m, keep_v, new_v = (x.to(g.dtype) for x in (beta1, 1 - beta1, beta2, 1 - beta2))
    carry = u.mT @ u_old
    v = carry @ v @ carry.mT
    v = keep_v * v + new_v * (g @ g.mT / g.shape[-1])
    values, q = torch.linalg.eigh(0.5 * (v + v.mT))
    whitened = q @ ((q.mT @ g) / (values.clamp(min=0).sqrt() + eps)[:, :, None])
    return keep_m * (carry @ m) + new_m * whitened, v
