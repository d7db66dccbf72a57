"""Batches of inverses without pivoting, of matrices whose symmetric part is at least I, as NB-LoRA's Cayley transform
has them (whose kernels take ``gauss_jordan`` alone, in float64).

Math      Gauss-Jordan without pivoting: the symmetric part of every Schur complement is at least I, so every pivot is
          at least 1. Growth is about linear in the skew part, so one refinement follows: W ← W + W (I − M W).
          Above rank 64 by panels of BLOCK columns in registers. The panel with the pivots is eliminated first, then
          BLOCK pivots in turn of each other panel. Taken together, as a product with the inverse of the BLOCK × BLOCK
          pivots, they would lose what the first pivot cancels: a large part that all rows have in common.
Grid      Up to rank 64 one program per matrix, in registers. Above, up to SLOTS programs loop over the matrices, each
          with M, W and I − M W in its slot of a scratch buffer that stays in L2.
Shapes    (n, r, r) float32 contiguous, r from 1 to 256; n any number.
Roofline  6 r³ operations on 8 r² bytes, one dependent step per column: latency bound. Other programs hide the latency.
"""

import torch
import triton
import triton.language as tl

from ..launch import check_square, on_device
from ..primitives import dot, take_column, take_row
from .blocked import BLOCK, add_products, copy, registers
from .spd import IN_REGISTERS, SLOTS, WARPS


@triton.jit
def eliminate_column(b_w, b_column, i_row, i_col, j):
    """Runs one step of Gauss-Jordan in place, on pivot (j, j). b_w holds all rows and some columns of the matrix, and
    b_column its column j from before this step."""
    b_row = take_row(b_w, i_row, j)
    reciprocal = 1.0 / tl.sum(tl.where(i_row == j, b_column, 0.0), 0)
    b_row = tl.where(i_col == j, reciprocal, b_row * reciprocal)
    other_rows = tl.where((i_col == j)[None, :], 0.0, b_w) - b_column[:, None] * b_row[None, :]
    return tl.where((i_row == j)[:, None], b_row[None, :], other_rows)


@triton.jit
def eliminate_pivot(b_w, i_row, i_col, j):
    """Runs ``eliminate_column`` for columns among which is j."""
    return eliminate_column(b_w, take_column(b_w, i_col, j), i_row, i_col, j)


@triton.jit
def product(b_sum, lhs, rhs, r, BLOCK_R: tl.constexpr):
    """Returns b_sum + lhs @ rhs, float32 [BLOCK_R, BLOCK_R], as outer products at 64, where a dot would spill."""
    if BLOCK_R < 64:
        b_sum = dot(lhs, rhs, b_sum, "ieee")
    else:
        i_r = tl.arange(0, BLOCK_R)
        for j in range(0, r):
            b_sum += take_column(lhs, i_r, j)[:, None] * take_row(rhs, i_r, j)[None, :]
    return b_sum


@triton.jit(do_not_specialize=["r"])
def lora_small_inverse_kernel(matrices, inverses, r, BLOCK_R: tl.constexpr):
    i_matrix = tl.program_id(0).to(tl.int64)
    i_r, i_row, i_col = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_R)[None, :]
    o_matrix = i_matrix * r * r + i_row * r + i_col
    inside = (i_row < r) & (i_col < r)
    b_eye = tl.where(i_row == i_col, 1.0, 0.0)
    b_matrix = tl.load(matrices + o_matrix, mask=inside, other=0.0)  # [BLOCK_R, BLOCK_R], as all that follows
    b_matrix = tl.where(inside, b_matrix, b_eye)  # padded with I, so that every pivot is at least 1
    b_w = b_matrix
    for j in range(0, r):
        b_w = eliminate_pivot(b_w, i_r, i_r, j)
    b_residual = product(b_eye, -b_matrix, b_w, r, BLOCK_R)
    tl.store(inverses + o_matrix, product(b_w, b_w, b_residual, r, BLOCK_R), mask=inside)


@triton.jit
def gauss_jordan(w, r, stride, columns, stride_columns, BLOCK_R: tl.constexpr):
    """w (r, r) in memory, float32 or float64, ← its inverse. ``columns`` is scratch for BLOCK columns of w, or r if
    that is less, each in a row. It starts and ends with a barrier."""
    i_r, i_block = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    m_r = i_r < r
    blocks = tl.cdiv(r, BLOCK)
    for i_panel in tl.range(0, blocks, num_stages=1):
        o = i_panel * BLOCK
        end = tl.minimum(o + BLOCK, r)
        i_col = o + i_block
        p_panel, m_panel = w + i_r[:, None] * stride + i_col[None, :], m_r[:, None] & (i_col < r)[None, :]
        tl.debug_barrier()
        b_panel = tl.load(p_panel, mask=m_panel, other=0.0)  # [BLOCK_R, BLOCK]
        for j in range(o, end):
            b_column = take_column(b_panel, i_col, j)
            tl.store(columns + (j - o) * stride_columns + i_r, b_column, mask=m_r)
            b_panel = eliminate_column(b_panel, b_column, i_r, i_col, j)
        tl.debug_barrier()
        tl.store(p_panel, b_panel, mask=m_panel)
        tl.debug_barrier()
        for ahead in tl.range(1, blocks, num_stages=1):
            i_col = (i_panel + ahead) % blocks * BLOCK + i_block
            p_panel, m_panel = w + i_r[:, None] * stride + i_col[None, :], m_r[:, None] & (i_col < r)[None, :]
            b_panel = tl.load(p_panel, mask=m_panel, other=0.0)
            for j in range(o, end):
                b_column = tl.load(columns + (j - o) * stride_columns + i_r, mask=m_r, other=0.0)
                b_panel = eliminate_column(b_panel, b_column, i_r, i_col, j)
            tl.debug_barrier()
            tl.store(p_panel, b_panel, mask=m_panel)
    tl.debug_barrier()


@triton.jit
def invert(matrix, w, residual, r, BLOCK_R: tl.constexpr):
    """w ← the inverse of matrix; residual ← I − M W before the refinement. All are (r, r), float32, with a stride of
    BLOCK_R. It starts and ends with a barrier."""
    i_r, i_block = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    m_r = i_r < r
    copy(matrix, BLOCK_R, w, BLOCK_R, r, BLOCK_R)
    gauss_jordan(w, r, BLOCK_R, residual, BLOCK_R, BLOCK_R)
    for o in tl.range(0, r, BLOCK, num_stages=1):
        i_row = o + i_block
        m_row = i_row < r
        b_rows = tl.where(i_row[:, None] == i_r[None, :], 1.0, 0.0)  # [BLOCK, BLOCK_R]
        b_rows = add_products(b_rows, -1.0, matrix + i_row * BLOCK_R, 1, m_row, w + i_r, BLOCK_R, m_r, r)
        tl.store(residual + i_row[:, None] * BLOCK_R + i_r[None, :], b_rows, mask=m_row[:, None] & m_r[None, :])
    tl.debug_barrier()
    for o in tl.range(0, r, BLOCK, num_stages=1):
        i_row = o + i_block
        m_row = i_row < r
        p_rows, mask = w + i_row[:, None] * BLOCK_R + i_r[None, :], m_row[:, None] & m_r[None, :]
        b_rows = tl.load(p_rows, mask=mask, other=0.0)
        b_rows = add_products(b_rows, 1.0, w + i_row * BLOCK_R, 1, m_row, residual + i_r, BLOCK_R, m_r, r)
        tl.debug_barrier()
        tl.store(p_rows, b_rows, mask=mask)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "r"])
def lora_small_inverse_blocked_kernel(matrices, inverses, scratch, n, r, BLOCK_R: tl.constexpr):
    """Computes what ``lora_small_inverse_kernel`` does, with M, W and I − M W in the program's slot of ``scratch``."""
    matrix = scratch + tl.program_id(0).to(tl.int64) * 3 * BLOCK_R * BLOCK_R
    w, residual = matrix + BLOCK_R * BLOCK_R, matrix + 2 * BLOCK_R * BLOCK_R
    for i_matrix in tl.range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0), num_stages=1):
        copy(matrices + i_matrix * r * r, r, matrix, BLOCK_R, r, BLOCK_R)
        invert(matrix, w, residual, r, BLOCK_R)
        copy(w, BLOCK_R, inverses + i_matrix * r * r, r, r, BLOCK_R)


def small_inverse(matrices: torch.Tensor) -> torch.Tensor:
    """Computes the inverses of float32 (n, r, r) whose symmetric part is at least I. Twin:
    ``reference.pairs.small_inverse``."""
    n, r = check_square("matrices", matrices)
    inverses = torch.empty((n, r, r), dtype=torch.float32, device=matrices.device)
    if n == 0:
        return inverses
    matrices, block_r = matrices.contiguous(), max(16, triton.next_power_of_2(r))
    with on_device(matrices):
        if r <= IN_REGISTERS:
            lora_small_inverse_kernel[(n,)](
                matrices, inverses,
                r,
                BLOCK_R=block_r, num_warps=WARPS[block_r], maxnreg=255,
            )  # fmt: skip
        else:
            scratch = torch.empty((min(n, SLOTS), 3, block_r, block_r), dtype=torch.float32, device=matrices.device)
            lora_small_inverse_blocked_kernel[(len(scratch),)](
                matrices, inverses, scratch,
                n, r,
                BLOCK_R=block_r, num_warps=8, maxnreg=registers(block_r),
            )  # fmt: skip
    return inverses
