"""Jit functions on tiles of a factor: loads, products with r×r matrices, sums over the programs that share a factor.

Math      A factor is seen as d rows of r rank columns (pointer_table.py), so every product is a tile times an r×r
          matrix from the right: p M of a b multiplies its tile by M, M p of an a its transposed tile by Mᵀ.
Grid      One program per chunk of d of one factor. A kernel that sums over d lets every program store a partial sum.
          The last program of the factor to finish, found by an integer counter, adds them in the order of the chunks,
          so the same inputs give the same bits and there is no second launch. Counters are left at zero.
Shapes    Tiles [BLOCK_D, BLOCK_R] in the factor's dtype; M float32 (R, R), R the largest rank of the launch; partial
          sums and results (R, R) in the accumulator's dtype, zero beyond a factor's own rank.
Roofline  Up to rank 64, M stays in registers while the factor passes. Above, every tile reads M in steps of BLOCK_K
          rows, from L2. Partial sums add r / chunk of the factor's bytes.
"""

import triton
import triton.language as tl

from .pointer_table import tile_offsets
from .primitives import dot, noise, round_stochastic, round_to, to_float32
from .tiles import GroupedTile

GRAM_RANK = 64  # largest rank class whose M or Gram stays in registers while a factor passes


@triton.jit
def block_offsets(i_row, i_col, R_MAX: tl.constexpr):
    return i_row[:, None] * R_MAX + i_col[None, :]


@triton.jit
def store_partial(b_sum, p_partial, p_total, i_row, i_col, count, R_MAX: tl.constexpr):
    """Stores a program's block among the partial sums, or as the result where the factor has one program."""
    o_block = block_offsets(i_row, i_col, R_MAX)
    mask = (i_row < R_MAX)[:, None] & (i_col < R_MAX)[None, :]
    if count == 1:
        tl.store(p_total + o_block, b_sum, mask=mask)
    else:
        tl.store(p_partial + o_block, b_sum, mask=mask)


@triton.jit
def is_last_program(counter, count):
    """Returns whether this program is the last of ``count`` to arrive. The stores of all of them are visible to it."""
    tl.debug_barrier()  # all threads of this program have stored before one of them counts the arrival
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    tl.debug_barrier()
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def add_partials(p_partial, p_total, stride, i_row, i_col, count, R_MAX: tl.constexpr):
    """total = Σ_k partial[k], k ascending."""
    o_block = block_offsets(i_row, i_col, R_MAX)
    mask = (i_row < R_MAX)[:, None] & (i_col < R_MAX)[None, :]
    b_total = tl.zeros([i_row.shape[0], i_col.shape[0]], dtype=p_total.dtype.element_ty)
    for _ in range(0, count):
        # .cg bypasses L1, which is not coherent with the other programs' stores.
        b_total += tl.load(p_partial + o_block, mask=mask, other=0.0, cache_modifier=".cg")
        p_partial += stride
    tl.store(p_total + o_block, b_total, mask=mask)


@triton.jit
def load_block(p, i_d, i_r, d, r, IS_A: tl.constexpr, EXPERTS: tl.constexpr = 1):
    mask = (i_d < d)[:, None] & (i_r < r)[None, :]
    return tl.load(p + tile_offsets(i_d, i_r, d, r, IS_A, EXPERTS), mask=mask, other=0.0)  # [BLOCK_D, BLOCK_R]


@triton.jit
def load_matrix(matrix, i_k, i_r, r, IS_A: tl.constexpr, R_MAX: tl.constexpr):
    """Returns M as it multiplies a tile [BLOCK_D, rank] from the right, M for b, Mᵀ for a: [BLOCK_K, BLOCK_R]."""
    mask = (i_k < r)[:, None] & (i_r < r)[None, :]
    if IS_A:
        p_matrix = matrix + i_r[None, :] * R_MAX + i_k[:, None]
    else:
        p_matrix = matrix + i_k[:, None] * R_MAX + i_r[None, :]
    return tl.load(p_matrix, mask=mask, other=0.0)


@triton.jit
def times_matrix(
    b_acc, x, p, matrix,
    i_d, i_r, d, r, c,
    IS_A: tl.constexpr, ADD: tl.constexpr, EXPERTS: tl.constexpr,
    R_MAX: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns b_acc + (x + c p) M for rows i_d, where M is too large for registers: float32 [BLOCK_D, BLOCK_R]."""
    for o_k in tl.range(0, R_MAX, BLOCK_K, num_stages=1):
        i_k = o_k + tl.arange(0, BLOCK_K)
        b_x = to_float32(load_block(x, i_d, i_k, d, r, IS_A, EXPERTS))  # [BLOCK_D, BLOCK_K]
        if ADD:
            b_x += c * to_float32(load_block(p, i_d, i_k, d, r, IS_A, EXPERTS))
        b_acc = dot(b_x, load_matrix(matrix, i_k, i_r, r, IS_A, R_MAX), b_acc, "ieee")
    tl.debug_barrier()  # all of x and p is read before any of it is overwritten
    return b_acc


@triton.jit
def round_tile(
    b_value, key, t, i_d, o_d,
    PASS: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Returns a float32 tile [BLOCK_D, BLOCK_R] of a factor, whose first row is ``o_d``, rounded to DTYPE: to nearest,
    or with STOCHASTIC by noise that depends on the factor's key, the step t, the pass and the element alone. A flat row
    of numbers is one row of the noise."""
    if STOCHASTIC:
        if BLOCK_R == 1:
            b_noise = tl.trans(noise(key, tl.arange(0, 1), o_d, t, PASS, BLOCK_D))
        else:
            b_noise = noise(key, i_d, 0, t, PASS, BLOCK_R)
        b_rounded = round_stochastic(b_value, b_noise, DTYPE)
    else:
        b_rounded = round_to(b_value, DTYPE)
    return b_rounded


def block_k(tile: GroupedTile) -> int:
    """Returns the rows of M in one product: all of them up to rank 64."""
    return tile.r if tile.r <= GRAM_RANK else 16
