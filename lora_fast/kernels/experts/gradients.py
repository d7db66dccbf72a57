"""The gradients of all experts' factors in one launch.

Math      da_e = Σ_t dS[t, :]ᵀ x[t, :] and db_e = scaling Σ_t dy[t, :]ᵀ S[t, :] over the rows t of expert e
Grid      (blocks of columns of da, then of db, experts). A program walks all rows of its expert in order, so that sums
          need no second launch and the same inputs give the same bits. An expert without rows has zero gradients,
          which its programs store.
Shapes    x (n, d_in), dy (n, d_out) with contiguous rows; S, dS (n, r); da (E, r, d_in), db (E, d_out, r), contiguous,
          in the factors' dtypes. Sums are float32, with one rounding at the store.
Skew      The launch takes as long as the expert with the most rows. Splitting its rows between programs would need
          float32 partial sums for every expert, because the host does not know which one it is.
Roofline  n·(d_in + d_out) elements read once, S and dS once for each block of columns (from L2), and E·r·(d_in + d_out)
          written: memory bound.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..launch import contiguous_rows, is_wide, launch, on_device, precision
from ..primitives import dot_wide, round_to
from ..segments import begins_at, ends_at


@triton.jit
def store_gradient(
    tall, thin, gradient,
    scaling, i_block, i_expert, begin, end,
    d, stride_tall, stride_r, stride_d,
    R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores a block of columns of an expert's gradient, scaling · thinᵀ tall over the rows begin … end. It is (r, d)
    in any order."""
    i_out = i_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i_r = tl.arange(0, BLOCK_R)
    m_out, m_r = i_out < d, i_r < R
    b_sum = tl.zeros([BLOCK_OUT, BLOCK_R], dtype=tl.float32)
    for o_t in range(0, end - begin, BLOCK_T):
        i_t = begin.to(tl.int64) + o_t + tl.arange(0, BLOCK_T)
        m_t = i_t < end
        p_tall = tall + i_t[:, None] * stride_tall + i_out[None, :]
        b_tall = tl.load(p_tall, mask=m_t[:, None] & m_out[None, :], other=0.0)  # [BLOCK_T, BLOCK_OUT]
        b_thin = tl.load(thin + i_t[:, None] * R + i_r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0)
        b_sum = dot_wide(tl.trans(b_tall), b_thin, b_sum, PRECISION)
    p_gradient = gradient + i_expert.to(tl.int64) * R * d + i_out[:, None] * stride_d + i_r[None, :] * stride_r
    tl.store(p_gradient, round_to(b_sum * scaling, gradient.dtype.element_ty), mask=m_out[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["n_rows", "n_experts"])
def lora_expert_grads_kernel(
    x, dy, s, ds, da, db, offsets,
    scaling,
    n_rows, n_experts, d_in, d_out, n_blocks_a, stride_x, stride_dy,
    R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores a block of columns of da, in the first n_blocks_a programs of an expert, or of db."""
    i_block, i_expert = tl.program_id(0), tl.program_id(1)
    begin, end = begins_at(offsets, i_expert, n_rows), ends_at(offsets, i_expert, n_rows, n_experts)
    if i_block < n_blocks_a:
        store_gradient(
            x, ds, da, 1.0, i_block, i_expert, begin, end,
            d_in, stride_x, d_in, 1,
            R, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_R,
        )  # fmt: skip
    else:
        store_gradient(
            dy, s, db, scaling, i_block - n_blocks_a, i_expert, begin, end,
            d_out, stride_dy, 1, R,
            R, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_R,
        )  # fmt: skip


def grad_factors(
    x: torch.Tensor, dy: torch.Tensor, s: torch.Tensor, ds: torch.Tensor | None, lora_A: torch.Tensor,
    lora_B: torch.Tensor, scaling: float, offsets: torch.Tensor, need_a: bool = True, need_b: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Returns da_e = dSᵀ x (E, r, d_in) and db_e = scaling · dyᵀ S (E, d_out, r), each None if not needed, in the
    factors' dtypes and contiguous, for x (n, d_in), dy (n, d_out), S and dS (n, r), which may be None if da is not
    needed, and offsets (E,). Twin: ``reference.experts.grad_factors``."""
    x, dy, s, ds = contiguous_rows(x), contiguous_rows(dy), s.contiguous(), s if ds is None else ds.contiguous()
    (n_rows, d_in), (n_experts, d_out, r) = x.shape, lora_B.shape
    empty = torch.empty if n_rows else torch.zeros  # a grid must not be empty
    da = empty((n_experts, r, d_in), dtype=lora_A.dtype, device=x.device) if need_a else None
    db = empty((n_experts, d_out, r), dtype=lora_B.dtype, device=x.device) if need_b else None
    tile = tiles.expert_grads(x, r, is_wide(x, s) or is_wide(x, ds))
    n_blocks_a, n_blocks_b = (triton.cdiv(d, tile.outer) * need for d, need in ((d_in, need_a), (d_out, need_b)))
    if n_rows and n_blocks_a + n_blocks_b:
        # x stands in for a gradient that is not needed: the kernel takes a pointer, but does not write to it.
        tensors = x, dy, s, ds, x if da is None else da, x if db is None else db, offsets
        with on_device(x):
            launch(
                lora_expert_grads_kernel, (n_blocks_a + n_blocks_b, n_experts), tensors, (float(scaling),),
                (n_rows, n_experts, d_in, d_out, n_blocks_a, x.stride(0), dy.stride(0)),
                {"R": r, "PRECISION": precision(x), **tile.options()},
            )  # fmt: skip
    return da, db
