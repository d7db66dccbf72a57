"""S = (keep∘x) aᵀ, the adapter's way down (Hu et al., arXiv 2106.09685, eq. 3).

Math      S[t, :] = Σ_i keep[t, i] x[t, i] a[:, i]; keep is the dropout mask. scaling, with 1/(1-p) in it, is applied
          where S is used (linear.py, grads.py), to sums that are float32.
Grid      one program per BLOCK_T tokens walks all of d_in; x is read once, a once per program (from L2).
Shapes    x (n_tokens, d_in) f16/bf16/f32, a (r, d_in) any float, S (n_tokens, r) in x's dtype. a is cast to x's dtype,
          sums are float32, one rounding at the store.
Backward  grads.py (dS, da) and linear.py (dx): S is saved, the mask is drawn again.
Roofline  n_tokens·d_in elements read against 2·n_tokens·d_in·r operations: memory bound up to r of about 200.
"""

import torch
import triton
import triton.language as tl

from . import tiles
from .launch import Keep, on_device, precision, rows
from .primitives import cast, dot, drop, keep_mask, round_to


@triton.jit(do_not_specialize=["seed", "drop_level"])
def lora_project_kernel(
    x,
    a,
    s,
    n_tokens,
    d_in,
    stride_x,
    stride_a,
    seed,
    drop_level,
    R: tl.constexpr,
    DROPOUT: tl.constexpr,
    SEED_IN_MEMORY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    i_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_r = tl.arange(0, BLOCK_R)
    m_t = i_t < n_tokens
    m_r = i_r < R
    p_x = x + i_t[:, None] * stride_x
    p_a = a + i_r[None, :].to(tl.int64) * stride_a
    b_s = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for o_in in range(0, d_in, BLOCK_IN):
        i_in = o_in + tl.arange(0, BLOCK_IN)
        m_in = i_in < d_in
        b_x = tl.load(p_x + i_in[None, :], mask=m_t[:, None] & m_in[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
        b_a = tl.load(p_a + i_in[:, None], mask=m_in[:, None] & m_r[None, :], other=0.0)  # [BLOCK_IN, BLOCK_R]
        if DROPOUT:
            b_x = drop(b_x, keep_mask(seed, i_t, o_in, drop_level, SEED_IN_MEMORY, BLOCK_IN))
        b_s = dot(b_x, cast(b_a, dtype), b_s, PRECISION)
    p_s = s + i_t[:, None] * R + i_r[None, :]
    tl.store(p_s, round_to(b_s, dtype), mask=m_t[:, None] & m_r[None, :])


def project(x: torch.Tensor, lora_A: torch.Tensor, keep: Keep | None = None) -> torch.Tensor:
    """x (n_tokens, d_in), lora_A (r, d_in) → S (n_tokens, r) in x's dtype. Twin: ``reference.project``."""
    x, lora_A = rows(x), rows(lora_A)
    n_tokens, d_in = x.shape
    r = lora_A.shape[0]
    s = torch.empty((n_tokens, r), dtype=x.dtype, device=x.device)
    if s.numel() == 0:
        return s
    tile = tiles.project(x, r)
    with on_device(x):
        lora_project_kernel[(triton.cdiv(n_tokens, tile.t),)](
            x,
            lora_A,
            s,
            n_tokens,
            d_in,
            x.stride(0),
            lora_A.stride(0),
            *Keep.arguments(keep),
            R=r,
            DROPOUT=keep is not None,
            SEED_IN_MEMORY=Keep.in_memory(keep),
            PRECISION=precision(x),
            BLOCK_T=tile.t,
            BLOCK_IN=tile.inner,
            BLOCK_R=tile.r,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return s
