"""Ops on adapter pairs that run in batched torch on every device: torch's AdamW on lists of tensors, and the r×r
algebra of BaLoRA, RefLoRA and LoRA-RITE. The ops that also have kernels are in kernels/pairs and reference/pairs.py.

r×r matrices are (L, r, r). No function waits for the device, except where ``torch.linalg`` does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference.pairs import at_least_float32, cholesky, grams, positive_eigenvalues
from .reference.scalora_solution import lost_terms

__all__ = [
    "GAUGES",
    "adamw_",
    "at_least_float32",
    "float32_copy",
    "grams",
    "hyperbalance",
    "hyperbalance_and_transport",
    "lost_terms",
    "refactor",
    "rite_factor",
    "rite_update",
    "with_strides_of",
]

GAUGES = ("symmetric", "svd", "svd_signed")
BALANCE_FLOOR = 1e-6  # relative to the largest singular value: smaller ones are rescaled as if they were this large
RANK_TOLERANCE = 1e-3  # relative to the largest singular value: smaller ones may be errors of float32 Grams, about √ε


def adamw_(p: list, g: list, m: list, v: list, steps: list, settings: dict) -> None:
    """Applies torch's fused AdamW in place to lists of tensors of one dtype and device.

    Args:
        p, g, m, v: parameters, gradients, first and second moments. m and v have the strides of p; g may have any.
        steps: float32 scalars, one for each tensor, that already count this step.
        settings: lr, betas, eps and weight_decay.
    """
    beta1, beta2 = settings["betas"]
    torch._fused_adamw_(
        p, list(map(with_strides_of, g, p)), m, v, [], steps, lr=settings["lr"], beta1=beta1, beta2=beta2,
        weight_decay=settings["weight_decay"], eps=settings["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip


def with_strides_of(x: Tensor, p: Tensor) -> Tensor:
    """Returns x with the strides of p, as a copy if it has others. On a CPU, torch's fused AdamW ignores strides and
    reads every tensor in memory order."""
    if x.stride() == p.stride():
        return x
    return torch.empty_like(p, dtype=x.dtype, device=x.device).copy_(x)


def float32_copy(x: Tensor) -> Tensor:
    """Returns a contiguous copy of x in float32."""
    return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def hyperbalance(ka: Tensor, kb: Tensor, gauge: str = "symmetric") -> tuple[Tensor, Tensor]:
    """Returns BaLoRA's T and T⁻¹ (L, r, r), for which b T and T⁻¹ a have the same Gram: T Tᵀ = Kb⁻¹ # Ka (geometric
    mean).

    They are the identity where b = 0, where a does not have full rank, or where a Gram is not finite. The algebra runs
    in float64, because it squares condition numbers.
    """
    basis = _balanced_basis(ka, kb)
    return _in_gauge(*_scaled(basis), basis.skip, gauge, ka.dtype)


def hyperbalance_and_transport(ka: Tensor, kb: Tensor, gauge: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns ``hyperbalance``'s T and T⁻¹, the matrices U and U⁻¹ for gradients and their moments, and a mask
    (L, 1, 1) of the pairs whose b lacks full rank.

    U is T for the other pairs. In directions in which b vanishes, T divides by the floor of σ and would amplify moments
    with each step. There, U is the identity, up to the gauge's rotation.
    """
    basis = _balanced_basis(ka, kb)
    t, t_inverse = _scaled(basis)
    # In the QR decomposition of N with its columns reversed, the first columns of Q span those in which b vanishes.
    q, upper = torch.linalg.qr(basis.base.flip(-1))
    q = (q * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]).flip(-1)
    vanishing = torch.where(basis.vanishes, q, 0.0)
    u = torch.where(basis.vanishes, q, t - vanishing @ (vanishing.mT @ t))
    u_inverse = torch.where(basis.vanishes.mT, q.mT, t_inverse)
    matrices = [_in_gauge(*pair, basis.skip, gauge, ka.dtype) for pair in ((t, t_inverse), (u, u_inverse))]
    return *matrices[0], *matrices[1], basis.vanishes.any(-1, keepdim=True)


def _scaled(basis: BalancedBasis) -> tuple[Tensor, Tensor]:
    """Returns N diag(σ)^-½ and its inverse."""
    root = basis.sigma.sqrt()
    return basis.base / root[:, None, :], root[:, :, None] * basis.inverse_base


def _in_gauge(t: Tensor, t_inverse: Tensor, skip: Tensor, gauge: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns T Q and (T Q)⁻¹ with the orthogonal Q of one of ``GAUGES``, in ``dtype``; the identity where ``skip``."""
    if gauge == "symmetric":
        q, values = positive_eigenvalues(t @ t.mT)
        d = values.sqrt()
        t, t_inverse = (q * d[:, None, :]) @ q.mT, (q / d[:, None, :]) @ q.mT
    elif gauge == "svd_signed":
        sign = 1 - 2 * (t.gather(-2, t.abs().argmax(-2, keepdim=True)) < 0).to(t.dtype)
        t, t_inverse = t * sign, t_inverse * sign.mT
    return _where_not(skip, t, t_inverse, dtype)


def refactor(ka: Tensor, kb: Tensor) -> tuple[Tensor, Tensor]:
    """Returns RefLoRA's S = Kb⁻¹ # Ka, the SPD solution of S Kb S = Ka, and S⁻¹, (L, r, r).

    They are the identity where b = 0 or where a does not have full rank. S is the T Tᵀ of ``hyperbalance``: the algebra
    runs in float64 too, and directions in which b vanishes are treated alike.
    """
    basis = _balanced_basis(ka, kb)
    t, t_inverse = _scaled(basis)
    return _where_not(basis.skip, t @ t.mT, t_inverse.mT @ t_inverse, ka.dtype)


class BalancedBasis(NamedTuple):
    """A basis in which both Grams are diagonal, in float64.

    Attributes:
        base, inverse_base: N and N⁻¹ (L, r, r), with N Nᵀ = Ka and Nᵀ Kb N = diag(σ²).
        sigma: σ (L, r), raised to the floor.
        vanishes: a mask (L, 1, r) of the columns of N in which b vanishes, up to errors of float32 Grams.
        skip: a mask (L, 1, 1) of the pairs where b = 0, a does not have full rank, or a Gram is not finite. Their N is
            the identity and their σ is 1.
    """

    base: Tensor
    inverse_base: Tensor
    sigma: Tensor
    vanishes: Tensor
    skip: Tensor


def _balanced_basis(ka: Tensor, kb: Tensor) -> BalancedBasis:
    """Returns N = L V, with Ka = L Lᵀ and Lᵀ Kb L = V diag(σ²) Vᵀ."""
    rounding = ka.shape[-1] * torch.finfo(ka.dtype).eps
    ka, kb = ka.double(), kb.double()
    eye = torch.eye(ka.shape[-1], dtype=ka.dtype, device=ka.device)
    lower, info = cholesky(ka, 0.0)
    pivots, sizes, sizes_b = (x.diagonal(dim1=-2, dim2=-1) for x in (lower, ka, kb))
    dependent = (pivots.square() <= rounding * sizes).any(-1)  # a row of a is a combination of others
    skip = ((info != 0) | dependent | (sizes_b.sum(-1) == 0))[:, None, None] | ~_finite(kb)
    lower, kb = torch.where(skip, eye, lower), torch.where(skip, eye, kb)
    core = lower.mT @ kb @ lower
    v = torch.linalg.eigh(0.5 * (core + core.mT))[1].flip(-1)
    base = lower @ v
    sigma = (base * (kb @ base)).sum(-2).clamp(min=0).sqrt()  # ‖b base_j‖; eigh's own values have larger errors
    largest = sigma.amax(-1, keepdim=True)
    vanishes = (sigma <= RANK_TOLERANCE * largest)[:, None, :]
    inverse_base = v.mT @ torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return BalancedBasis(base, inverse_base, torch.maximum(sigma, BALANCE_FLOOR * largest), vanishes, skip)


def _where_not(skip: Tensor, matrices: Tensor, inverses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns matrices and inverses in ``dtype``, replaced by the identity where ``skip``."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(skip, eye, matrices).to(dtype), torch.where(skip, eye, inverses).to(dtype)


def rite_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns LoRA-RITE's U (L, d, k) and the pseudo-inverse (L, r, k) of R, with x = U R and k = min(r, d). x is b
    (L, d_out, r) or aᵀ (L, d_in, r).

    Singular values of R below 1e-3 of the largest count as 0, or below the ε of x's dtype if that is more: they may be
    rounding errors. The inverse of an x that is not finite is NaN.
    """
    u, upper = torch.linalg.qr(at_least_float32(x))
    finite = _finite(upper)
    tolerance = max(RANK_TOLERANCE, torch.finfo(x.dtype).eps)
    inverse = torch.linalg.pinv(torch.where(finite, upper, 0.0), rtol=tolerance)
    return u, torch.where(finite, inverse, torch.nan)


def rite_update(
    g: Tensor, m: Tensor, v: Tensor, u: Tensor, u_old: Tensor, beta1: Tensor, beta2: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns LoRA-RITE's next moments (m, v) for unmagnified gradients g (L, k, d).

    The old moments are transformed from the basis ``u_old`` to ``u``. V is the average of g gᵀ/d, and m that of
    (V^½ + ε)⁻¹ g, in which eigenvalues of V below its rounding errors are raised to them. The betas are bias-corrected,
    in float64 (L, 1, 1). The m of a V that is not finite is NaN, and other pairs are not affected.
    """
    keep_m, new_m, keep_v, new_v = (x.to(g.dtype) for x in (beta1, 1 - beta1, beta2, 1 - beta2))
    carry = u.mT @ u_old
    v = carry @ v @ carry.mT
    v = keep_v * v + new_v * (g @ g.mT / g.shape[-1])
    finite = _finite(v)
    q, values = positive_eigenvalues(torch.where(finite, v, 0.0))
    whitened = q @ ((q.mT @ g) / (values.sqrt() + eps)[:, :, None])
    return keep_m * (carry @ m) + new_m * torch.where(finite, whitened, torch.nan), v


def _finite(matrices: Tensor) -> Tensor:
    """Returns a mask (L, 1, 1) of the matrices whose entries are all finite. torch.linalg raises an error for a batch
    that contains another one."""
    return matrices.isfinite().all(-1).all(-1)[:, None, None]
