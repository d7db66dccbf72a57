"""ScaLoRA's scales of every adapter pair, from the solution of its equations (scalora_system.py).

Math      scale = √(x / κ), clamped, 1 where the coordinate is not active, where x is not finite, or where κ ≤ 0. The
          factors' part that is merged into W is b diag(residual_scale) a with residual_scale = scaling (1 − α∘β).
Grid      One program per BLOCK scales.
Shapes    x float32 (n, 2r), active bool (n, 2r) → scale_p, scale_g float32 (2n, r), residual_scale float32 (n, r).
Roofline  10 bytes read and 20 written per rank and pair: launch bound.
"""

import torch
import triton
import triton.language as tl

from ..launch import check_tensor, on_device

BLOCK = 256  # scales of one program


@triton.jit
def clamped_scale(x, active, i, b_kappa, low, high, mask):
    """Returns √(x / κ) between low and high, 1 where not active or where x is not finite: float32 [BLOCK]."""
    b_x = tl.load(x + i, mask=mask, other=0.0)
    b_scale = tl.sqrt_rn(tl.div_rn(b_x, b_kappa))
    b_scale = tl.minimum(tl.maximum(b_scale, low), high)
    b_active = tl.load(active + i, mask=mask, other=0) != 0
    return tl.where(b_active & (b_kappa > 0.0) & (tl.abs(b_x) < float("inf")), b_scale, 1.0)  # a NaN is not < inf


@triton.jit(do_not_specialize=["size", "r"])
def lora_scales_kernel(
    x, active, kappa, scaling, scale_p, scale_g, residual_scale,
    low, high, size, r,
    KAPPA_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b_kappa = tl.zeros([BLOCK], dtype=tl.float32)
    if KAPPA_IN_MEMORY:
        b_kappa += tl.load(kappa).to(tl.float32)
    else:
        b_kappa += kappa
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_pair, mask = i // r, i < size
    o_alpha = i + i_pair * r
    b_alpha = clamped_scale(x, active, o_alpha, b_kappa, low, high, mask)
    b_beta = clamped_scale(x, active, o_alpha + r, b_kappa, low, high, mask)
    tl.store(scale_p + i, b_alpha, mask=mask)
    tl.store(scale_p + size + i, b_beta, mask=mask)
    tl.store(scale_g + i, b_beta, mask=mask)
    tl.store(scale_g + size + i, b_alpha, mask=mask)
    b_scaling = tl.load(scaling + i_pair, mask=mask, other=0.0)
    tl.store(residual_scale + i, b_scaling * (1.0 - b_alpha * b_beta), mask=mask)


def scales(
    x: torch.Tensor,
    active: torch.Tensor,
    kappa: float | torch.Tensor,
    scaling: torch.Tensor,
    low: float,
    high: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the scales of the step and of the merge. Twin: ``reference.scalora_solution.scales``.

    Args:
        x, active: (n, 2r), from ``scalora_solve``.
        kappa: κ, a number or a 0-d float64 tensor on the device.
        scaling: float32 (n,), α / r of each adapter.
        low, high: limits of a scale; None: no upper limit.

    Returns:
        scale_p: float32 (2n, r), the scales of the factors, n rows [α] for b, then n rows [β] for a.
        scale_g: float32 (2n, r), the scales of their gradients and moments, [β], then [α].
        residual_scale: float32 (n, r), scaling (1 − αβ), for the merge of the factors as they were into W.
        A pair whose x is not finite keeps its factors and adds nothing to W.
    """
    n, r = x.shape[0], x.shape[1] // 2
    check_tensor("x", x, (n, 2 * r), torch.float32)
    check_tensor("active", active, (n, 2 * r), torch.bool)
    check_tensor("scaling", scaling, (n,), torch.float32)
    in_memory = isinstance(kappa, torch.Tensor)
    if isinstance(kappa, torch.Tensor):
        check_tensor("kappa", kappa, (), torch.float64)
    scale_p = torch.empty((2 * n, r), dtype=torch.float32, device=x.device)
    scale_g, residual_scale = torch.empty_like(scale_p), torch.empty_like(scale_p[:n])
    if x.numel():
        with on_device(x):
            lora_scales_kernel[(triton.cdiv(n * r, BLOCK),)](
                x, active, kappa if in_memory else float(kappa), scaling, scale_p, scale_g, residual_scale,
                float(low), float("inf") if high is None else float(high), n * r, r,
                KAPPA_IN_MEMORY=in_memory,
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return scale_p, scale_g, residual_scale
