"""Computes the free parameters of a norm-bounded layer that equals a plain low-rank product, by inverting the Cayley
transform.

Math      ΔW = U diag(σ) Vᵀ. With sv ≥ σ of the bound's norm (sorted) and sin 2θ = σ / sv:
          a = diag(cos θ) Vᵀ    b = U diag(sin θ)    so a aᵀ + bᵀb = I and 2 b diag(sv) a = ΔW
          Signs E = diag(±1) change neither (E a, b E); they are chosen one by one, so that elimination on a_1 + E,
          a_1 the first r columns of a, has no pivot below 1 in size. So I + E a_1 is invertible, and, with that a, b:
          M = 2 (I + a_1ᵀ)⁻¹    a1 = (Mᵀ − M)/4    a2 = −(I + a_1)⁻¹ a_2    b̃ = −b (I + a_1ᵀ)⁻¹
          sv's shares q = (σ/δ)^p + an equal part of what the bound leaves; free_scale = √r log q.
Source    the completeness proof of "Norm-Bounded Low-Rank Adaptation". All in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks

TOLERANCE = 1e-5  # relative excess over a bound that float32 rounding of the factors explains
SMALLEST = 1e-30  # smallest share of the bound, whose logarithm is finite
SHOWN = 8  # singular values in a message


@torch.no_grad()
def free_parameters(
    a: Tensor, b: Tensor, scaling: float,
    r: int, bound: float, applied_bound: float, power: float, learn_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns free_a (r, d_in), free_b (d_out, r) and free_scale (r,), in float64, with which ΔW = scaling · b a. Where
    that exceeds applied_bound, but not bound, ΔW is the multiple of it that does not.

    Args:
        a: (k, d_in). b: (d_out, k), any k; the product has rank at most r. r: rank of the layer, at most d_in.
        bound, applied_bound, power, learn_scale: attributes of the NBLoRALinear; power is 1/p of the norm.

    Raises:
        ArgumentError: a norm above the bound (with the singular values), or a rank above r; NaN or Inf.
    """
    u, sigma, v = _svd(a.double(), b.double(), scaling)
    size = _size(sigma, r, bound, power, learn_scale)
    sigma = sigma[:r] * (applied_bound / size).clamp(max=1)
    free_scale = _shares(sigma, r, applied_bound, power, learn_scale)
    sv = applied_bound * torch.softmax(free_scale / r**0.5, 0) ** power
    count = len(sigma)
    theta = torch.zeros(r, dtype=torch.float64, device=a.device)
    theta[:count] = torch.asin((sigma / sv[:count]).clamp(max=1)) / 2
    balanced_a = theta.cos()[:, None] * _complete_basis(v[:, :count], r).mT
    balanced_b = torch.zeros(len(b), r, dtype=torch.float64, device=a.device)
    balanced_b[:, :count] = u[:, :count] * theta[:count].sin()
    signs = _pivot_signs(balanced_a[:, :r])
    return *_inverse_cayley(signs[:, None] * balanced_a, balanced_b * signs), free_scale


def _svd(a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U, σ, V of scaling · b a from two QR decompositions, without forming the (d_out, d_in) product."""
    if not (a.isfinite().all() and b.isfinite().all()):
        raise checks.ArgumentError("adapter", "finite factors", "NaN or Inf")
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    u, sigma, vt = torch.linalg.svd(scaling * r_b @ r_a.mT, full_matrices=False)
    return q_b @ u, sigma, q_a @ vt.mT


def _size(sigma: Tensor, r: int, bound: float, power: float, learn_scale: bool) -> Tensor:
    """Returns the smallest bound that has σ: its norm, or with fixed shares the norm of r times its largest value."""
    if len(sigma) > r:
        _require(sigma[r:] <= TOLERANCE * sigma[0], f"a product of rank at most {r}", sigma[r:])
        sigma = sigma[:r]
    if not learn_scale or power == 0:
        largest = bound * r**-power
        _require(sigma <= largest * (1 + TOLERANCE), f"singular values of at most {largest:g}", sigma)
        return sigma[0] * r**power
    size = (sigma ** (1 / power)).sum() ** power
    name = "nuclear" if power == 1 else "Frobenius"
    _require(size <= bound * (1 + TOLERANCE), f"a {name} norm of at most {bound:g}", sigma)
    return size


def _shares(sigma: Tensor, r: int, bound: float, power: float, learn_scale: bool) -> Tensor:
    """Returns free_scale (r,) with which sv is at least σ; 0 where the shares are fixed."""
    shares = torch.zeros(r, dtype=torch.float64, device=sigma.device)
    if not learn_scale or power == 0:
        return shares
    shares[: len(sigma)] = (sigma / bound) ** (1 / power)
    shares += (1 - shares.sum()).clamp(min=0) / r
    return math.sqrt(r) * shares.clamp(min=SMALLEST).log()


def _require(holds: Tensor, expected: str, sigma: Tensor) -> None:
    """Raises ArgumentError where the condition does not hold, with the singular values concerned (all of them for a
    condition on their sum)."""
    if not holds.all():
        bad = sigma[~holds] if holds.dim() else sigma
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        got = ", ".join(f"{x:g}" for x in bad[:SHOWN].tolist())
        raise checks.ArgumentError("adapter", expected, f"singular values {got}{more}")


def _complete_basis(v: Tensor, r: int) -> Tensor:
    """Returns r orthonormal columns, of which the first ones are v's."""
    eye = torch.eye(len(v), r, dtype=v.dtype, device=v.device)
    # Unit vectors supply the directions that v lacks.
    basis = torch.linalg.qr(torch.cat([v, eye, eye.roll(r, 0)], 1))[0]
    return torch.cat([v, basis[:, v.shape[1] : r]], 1)


def _pivot_signs(square: Tensor) -> Tensor:
    """Returns the signs e with which no pivot of elimination on square + diag(e) is below 1 in size."""
    schur = square.clone()
    signs = torch.ones(len(square), dtype=square.dtype, device=square.device)
    for j in range(len(square)):
        signs[j] = 1 - 2 * (schur[j, j] < 0).to(signs.dtype)
        schur[j, j] += signs[j]
        schur[j + 1 :, j + 1 :] -= torch.outer(schur[j + 1 :, j] / schur[j, j], schur[j, j + 1 :])
    return signs


def _inverse_cayley(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ã and b̃ of a and b, as in the header's Math."""
    r = len(a)
    inverse = torch.linalg.inv(torch.eye(r, dtype=a.dtype, device=a.device) + a[:, :r])
    m = 2 * inverse.mT
    return torch.cat([(m.mT - m) / 4, -inverse @ a[:, r:]], 1), -b @ inverse.mT
