"""The r×r algebra of NB-LoRA's Cayley transform and its backward. The mathematics is in cayley/__init__.py.

Grid      Up to SLOTS programs loop over the pairs, each with its own scratch of BLOCK_R × BLOCK_R matrices, which stays
          in L2 (linalg/blocked.py). A NaN stays in its pair.
Shapes    A pair's tensors, by address: ã or ga, a or dã (r, d_in), W float64 (r, r), scale and d scale (r,). Sums over
          the factors and the matrices that multiply the factors: float64 (n, R, R), R the largest rank. A pair's row in
          the table is that of its a. The address list (addresses.py) has n addresses of each: forward a, b, W, scale;
          backward dã, db̃, d scale, ga, gb, W, scale.
Roofline  2 r³ operations in float64, one dependent step per column (backward 4 r³): latency bound. Other programs hide
          the latency.
"""

import triton
import triton.language as tl

from ..linalg.blocked import BLOCK, add_products
from ..linalg.inverse import gauss_jordan
from ..pointer_table import D, R, load_entry, pointer_at, tensor_at
from ..primitives import round_to

ROWS = tl.constexpr(4)  # of matrices read from several addresses, at a time: the pointers take registers
EPS = tl.constexpr(2.0**-52)  # of float64
WARPS = {16: 1, 32: 2, 64: 4, 128: 8, 256: 8}  # by the largest rank, padded


@triton.jit
def load_scale(p_address, i, r, SCALED: tl.constexpr):
    b_scale = tl.full(i.shape, 1.0, tl.float32)
    if SCALED:
        b_scale = tl.load(pointer_at(p_address, tl.float32, False) + i, mask=i < r, other=0.0)
    return b_scale


@triton.jit(do_not_specialize=["n"])
def lora_cayley_inverse_kernel(
    entries, addresses, totals, multipliers, scratch,
    n,
    P: tl.constexpr, SCALED: tl.constexpr, R_MAX: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Computes W, a's first r columns, and the matrices that multiply the other columns of ã (−2 W) and b̃ (−2 W D)."""
    SIZE: tl.constexpr = R_MAX * R_MAX
    SLOT: tl.constexpr = BLOCK_R * BLOCK_R
    i_r, i_rows = tl.arange(0, BLOCK_R), tl.arange(0, ROWS)
    i_slot = tl.program_id(0).to(tl.int64)
    w = scratch + i_slot * SLOT
    for i_pair in tl.range(i_slot, n, tl.num_programs(0), num_stages=1):
        free_a, a = tensor_at(entries, i_pair, 0, P, False), pointer_at(addresses + i_pair, tl.float32, False)
        inverse = pointer_at(addresses + 2 * n + i_pair, tl.float64, False)
        d_in, r = load_entry(entries, i_pair, D), load_entry(entries, i_pair, R).to(tl.int32)
        gram_a, gram_b = totals + i_pair * SIZE, totals + (n + i_pair) * SIZE
        multiplier_a, multiplier_b = multipliers + i_pair * SIZE, multipliers + (n + i_pair) * SIZE
        b_scale = load_scale(addresses + 3 * n + i_pair, i_r, r, SCALED)[None, :]
        b_squares = tl.zeros([BLOCK_R], dtype=tl.float64)
        tl.debug_barrier()
        for o in tl.range(0, r, ROWS, num_stages=1):
            i_row = o + i_rows
            mask = (i_row < r)[:, None] & (i_r < r)[None, :]
            o_gram = i_row[:, None] * R_MAX + i_r[None, :]
            b_m = tl.load(gram_a + o_gram, mask=mask, other=0.0) + tl.load(gram_b + o_gram, mask=mask, other=0.0)
            b_m += tl.load(free_a + i_r[None, :] * d_in + i_row[:, None], mask=mask, other=0.0).to(tl.float32)
            b_m -= tl.load(free_a + i_row[:, None] * d_in + i_r[None, :], mask=mask, other=0.0).to(tl.float32)
            b_squares += tl.sum(b_m * b_m, 0)
            tl.store(w + i_row[:, None] * BLOCK_R + i_r[None, :], b_m, mask=mask)  # [ROWS, BLOCK_R] float64
        tl.debug_barrier()
        p_diagonal, tau = w + i_r * (BLOCK_R + 1), EPS * tl.sqrt(tl.sum(b_squares, 0))
        b_diagonal = tl.load(p_diagonal, mask=i_r < r, other=0.0)
        tl.debug_barrier()
        tl.store(p_diagonal, b_diagonal + (1.0 + tau), mask=i_r < r)
        gauss_jordan(w, r, BLOCK_R, multiplier_a, R_MAX, BLOCK_R)  # the multiplier is stored below
        for o in tl.range(0, r, ROWS, num_stages=1):
            i_row = o + i_rows
            mask = (i_row < r)[:, None] & (i_r < r)[None, :]
            b_w = tl.load(w + i_row[:, None] * BLOCK_R + i_r[None, :], mask=mask, other=0.0)
            tl.store(inverse + i_row[:, None] * r + i_r[None, :], b_w, mask=mask)
            o_factor = i_row[:, None] * R_MAX + i_r[None, :]
            tl.store(multiplier_a + o_factor, -2.0 * b_w, mask=mask)
            tl.store(multiplier_b + o_factor, -2.0 * b_w * b_scale, mask=mask)
            b_a = 2.0 * b_w - tl.where(i_row[:, None] == i_r[None, :], 1.0, 0.0)
            tl.store(a + i_r[None, :] * d_in + i_row[:, None], b_a.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["n"])
def lora_cayley_backward_kernel(
    entries, addresses, totals, multipliers, scratch,
    n,
    P: tl.constexpr, SCALED: tl.constexpr, R_MAX: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Computes d a1, d scale, and the matrices that multiply the parameters (−R), ga (−2 Wᵀ) and gb (−2 D Wᵀ)."""
    SIZE: tl.constexpr = R_MAX * R_MAX
    SLOT: tl.constexpr = BLOCK_R * BLOCK_R
    i_r, i_block, i_rows = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK), tl.arange(0, ROWS)
    w_transposed = scratch + tl.program_id(0).to(tl.int64) * 3 * SLOT
    t, wt_t = w_transposed + SLOT, w_transposed + 2 * SLOT
    for i_pair in tl.range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0), num_stages=1):
        da, grad_a = pointer_at(addresses + i_pair, P, False), pointer_at(addresses + 3 * n + i_pair, tl.float32, False)
        w, scale = pointer_at(addresses + 5 * n + i_pair, tl.float64, False), addresses + 6 * n + i_pair
        d_in, r = load_entry(entries, i_pair, D), load_entry(entries, i_pair, R).to(tl.int32)
        m_r = i_r < r
        sum_a, sum_b = totals + i_pair * SIZE, totals + (n + i_pair) * SIZE
        b_scale = load_scale(scale, i_r, r, SCALED)[None, :]
        b_dscale = tl.zeros([BLOCK_R], dtype=tl.float64)
        tl.debug_barrier()
        for o in tl.range(0, r, ROWS, num_stages=1):  # T and Wᵀ
            i_row = o + i_rows
            mask = (i_row < r)[:, None] & m_r[None, :]
            o_sum, o_slot = i_row[:, None] * R_MAX + i_r[None, :], i_row[:, None] * BLOCK_R + i_r[None, :]
            b_c = tl.load(sum_b + o_sum, mask=mask, other=0.0)  # [ROWS, BLOCK_R], as all that follows
            b_t = tl.load(grad_a + i_r[None, :] * d_in + i_row[:, None], mask=mask, other=0.0).to(tl.float64)
            b_t -= tl.load(sum_a + o_sum, mask=mask, other=0.0) + b_c * b_scale
            tl.store(t + o_slot, b_t, mask=mask)
            b_wt = tl.load(w + i_r[None, :] * r + i_row[:, None], mask=mask, other=0.0)
            tl.store(w_transposed + o_slot, b_wt, mask=mask)
            if SCALED:
                b_w = tl.load(w + i_row[:, None] * r + i_r[None, :], mask=mask, other=0.0)
                b_dscale -= 2.0 * tl.sum(b_w * b_c, 0)
        if SCALED:
            dscale = pointer_at(addresses + 2 * n + i_pair, tl.float32, False)
            tl.store(dscale + i_r, b_dscale.to(tl.float32), mask=m_r)
        tl.debug_barrier()
        for o in tl.range(0, r, BLOCK, num_stages=1):  # Wᵀ T
            i_row = o + i_block
            m_row = i_row < r
            b_wt_t = tl.zeros([BLOCK, BLOCK_R], dtype=tl.float64)
            b_wt_t = add_products(b_wt_t, 1.0, w_transposed + i_row * BLOCK_R, 1, m_row, t + i_r, BLOCK_R, m_r, r)
            o_slot = i_row[:, None] * BLOCK_R + i_r[None, :]
            tl.store(wt_t + o_slot, b_wt_t, mask=m_row[:, None] & m_r[None, :])
        tl.debug_barrier()
        s = t  # T is not read again
        for o in tl.range(0, r, BLOCK, num_stages=1):  # S = 2 Wᵀ T Wᵀ
            i_row = o + i_block
            m_row = i_row < r
            b_s = tl.zeros([BLOCK, BLOCK_R], dtype=tl.float64)
            b_s = add_products(b_s, 2.0, wt_t + i_row * BLOCK_R, 1, m_row, w_transposed + i_r, BLOCK_R, m_r, r)
            tl.store(s + i_row[:, None] * BLOCK_R + i_r[None, :], b_s, mask=m_row[:, None] & m_r[None, :])
        tl.debug_barrier()
        for o in tl.range(0, r, ROWS, num_stages=1):
            i_row = o + i_rows
            mask = (i_row < r)[:, None] & m_r[None, :]
            o_slot, o_factor = i_row[:, None] * BLOCK_R + i_r[None, :], i_row[:, None] * R_MAX + i_r[None, :]
            b_s = tl.load(s + o_slot, mask=mask, other=0.0)
            b_st = tl.load(s + i_r[None, :] * BLOCK_R + i_row[:, None], mask=mask, other=0.0)
            b_wt = -2.0 * tl.load(w_transposed + o_slot, mask=mask, other=0.0)
            tl.store(da + i_row[:, None] * d_in + i_r[None, :], round_to((b_s - b_st).to(tl.float32), P), mask=mask)
            tl.store(multipliers + i_pair * SIZE + o_factor, -(b_s + b_st), mask=mask)
            tl.store(multipliers + (n + i_pair) * SIZE + o_factor, b_wt, mask=mask)
            b_wt *= load_scale(scale, i_row, r, SCALED)[:, None]
            tl.store(multipliers + (2 * n + i_pair) * SIZE + o_factor, b_wt, mask=mask)
