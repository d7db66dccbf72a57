"""Tall products x A + y B over the factors of all pairs, for NB-LoRA's Cayley transform. The mathematics is in
cayley/__init__.py.

Math      A factor is d rows of r columns (pointer_table.py), x its free parameters. Forward x A is a or b; backward
          x A + y B is the parameters' gradient, y that of a or b. algebra.py computes the first r rows of an a.
Grid      One program per chunk of d of a factor.
Shapes    x (d, r) in any float dtype, y float32; A and B (n, R, R) float64 → float32 forward, x's dtype backward.
          Products are float64.
Roofline  Every operand once against 2 r operations an element (backward 4 r): memory bound where float64 has half of
          float32's rate; with a 64th of it, as on sm_86, sm_89 and sm_120, bound by its operations.
"""

import torch
import triton
import triton.language as tl

from ..factor_tiles import block_k, load_block, load_matrix
from ..launch import on_device
from ..pointer_table import (
    INDEX,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    FactorTable,
    R,
    load_entry,
    load_sizes,
    pointer_at,
    tensor_at,
    tile_offsets,
)
from ..primitives import dot, round_to, to_float32
from ..tiles import grouped
from .sums import GRADIENTS


@triton.jit
def tall_product(
    b_sum, p, matrix, b_matrix,
    i_d, i_r, d, r, count,
    IS_A: tl.constexpr,
    R_MAX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns b_sum + rows i_d of p times ``count`` rows of the matrix, which is in registers where BLOCK_K is
    BLOCK_R."""
    if BLOCK_K == BLOCK_R:
        b_sum = dot(to_float32(load_block(p, i_d, i_r, d, r, IS_A)).to(tl.float64), b_matrix, b_sum, "ieee")
    else:
        for o_k in tl.range(0, count, BLOCK_K, num_stages=1):
            i_k = o_k + tl.arange(0, BLOCK_K)
            b_p = to_float32(load_block(p, i_d, i_k, d, r, IS_A)).to(tl.float64)  # [BLOCK_D, BLOCK_K]
            b_sum = dot(b_p, load_matrix(matrix, i_k, i_r, r, False, R_MAX), b_sum, "ieee")
    return b_sum


@triton.jit
def multiply_factor(
    entries, addresses, multipliers,
    i_tensor, i_chunk, n,
    X: tl.constexpr, OUT: tl.constexpr, BACKWARD: tl.constexpr, IS_A: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiplies one chunk of one factor. Rows of ``multipliers``, with i the pair: forward A is i for a, n + i for b,
    and there is no B; backward A is i for both, and B is n + i for a, 2n + i for b."""
    SIZE: tl.constexpr = R_MAX * R_MAX
    index = load_entry(entries, i_tensor, INDEX)  # the pair for an a, n + the pair for a b
    x, out = tensor_at(entries, i_tensor, 0, X, ALIGNED), pointer_at(addresses + index, OUT, ALIGNED)
    d, r = load_sizes(entries, i_tensor, IS_A, UNIFORM_R, ALIGNED)
    count = load_entry(entries, i_tensor, R)  # r as a number that the compiler does not know, so it unrolls no loop
    i_r = tl.arange(0, BLOCK_R)
    p_a = multipliers + index * SIZE
    if BACKWARD:
        y = pointer_at(addresses + GRADIENTS * n + index, tl.float32, ALIGNED)
        p_b = p_a + n * SIZE
        if not IS_A:
            p_a -= n * SIZE
    b_a, b_b = 0.0, 0.0
    if BLOCK_K == BLOCK_R:
        b_a = load_matrix(p_a, i_r, i_r, r, False, R_MAX)
        if BACKWARD:
            b_b = load_matrix(p_b, i_r, i_r, r, False, R_MAX)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, tl.minimum(start + CHUNK, d), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_out = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float64)
        b_out = tall_product(b_out, x, p_a, b_a, i_d, i_r, d, r, count, IS_A, R_MAX, BLOCK_R, BLOCK_K)
        if BACKWARD:
            b_out = tall_product(b_out, y, p_b, b_b, i_d, i_r, d, r, count, IS_A, R_MAX, BLOCK_R, BLOCK_K)
        mask = (i_d < d)[:, None] & (i_r < r)[None, :]
        if IS_A:
            mask = mask & (i_d >= r)[:, None]  # the first r rows are algebra.py's
        tl.store(out + tile_offsets(i_d, i_r, d, r, IS_A), round_to(b_out.to(tl.float32), OUT), mask=mask)


@triton.jit(do_not_specialize=["n"])
def lora_cayley_products_kernel(
    entries, tiles, addresses, multipliers,
    n,
    X: tl.constexpr, OUT: tl.constexpr, BACKWARD: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if load_entry(entries, i_tensor, SIDE) == SIDE_A:
        multiply_factor(
            entries, addresses, multipliers,
            i_tensor, i_chunk, n,
            X, OUT, BACKWARD, True,
            UNIFORM_R, ALIGNED, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        multiply_factor(
            entries, addresses, multipliers,
            i_tensor, i_chunk, n,
            X, OUT, BACKWARD, False,
            UNIFORM_R, ALIGNED, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip


def factor_products(table: FactorTable, addresses: torch.Tensor, multipliers: torch.Tensor, backward: bool) -> None:
    """Computes x A + y B of every factor of the table, into the first tensors of the list of addresses."""
    tile, x = grouped("product", max(16, table.r_max)), TL_DTYPE[table.dtypes[0]]
    tile_map = table.tile_map(tile.chunk)
    with on_device(multipliers):
        lora_cayley_products_kernel[(tile_map.programs,)](
            table.entries, tile_map.tiles, addresses, multipliers,
            len(table) // 2,
            X=x, OUT=x if backward else tl.float32, BACKWARD=backward,
            UNIFORM_R=table.uniform_r, ALIGNED=table.aligned, R_MAX=table.r_max,
            **tile.options(BLOCK_K=block_k(tile)), maxnreg=255,
        )  # fmt: skip
