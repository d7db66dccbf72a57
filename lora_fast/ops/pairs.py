"""Ops on adapter pairs that are batched torch on every device: torch's AdamW on lists of tensors, and the r×r algebra
of BaLoRA, RefLoRA and LoRA-RITE. The ops that have kernels are in kernels/pairs and reference/pairs.py.

r×r matrices are (L, r, r). Nothing here waits for a device, except where ``torch.linalg`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference.pairs import at_least_float32, cholesky, grams

__all__ = [
    "GAUGES",
    "adamw_",
    "at_least_float32",
    "grams",
    "hyperbalance",
    "refactor",
    "rite_factor",
    "rite_update",
    "with_strides_of",
]

GAUGES = ("symmetric", "svd", "svd_signed")
BALANCE_FLOOR = 1e-6  # of the largest singular value: below, a direction is not rescaled further


def adamw_(p: list, g: list, m: list, v: list, steps: list, settings: dict) -> None:
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
    lower, info = cholesky(ka, 0.0)
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


def _symmetric_root(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (L, r, r), and square roots (L, r) of the eigenvalues, of symmetric positive matrices."""
    values, q = torch.linalg.eigh(0.5 * (matrices + matrices.mT))
    return q, values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()


def rite_factor(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LoRA-RITE: U, R and the pseudo-inverse of R with x = U R, of b (L, d_out, r) or aᵀ (L, d_in, r)."""
    u, upper = torch.linalg.qr(at_least_float32(x))
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
