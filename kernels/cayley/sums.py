"""Sums xᵀy over the factors of all pairs, for NB-LoRA's Cayley transform; the mathematics is in cayley/__init__.py.

Math      a factor is d rows of r columns (pointer_table.py), x its free parameters without the first r rows of an a.
          Forward y is x, backward the gradient of what became of it.
Grid      (chunks of all factors, blocks of the sum), partial sums as in pairs/gram.py.
Shapes    x (d, r) in any float dtype, y float32 → (n_factors, R, R), float64 forward, float32 backward, and so are the
          products.
Roofline  every operand once against 2 r operations an element: memory bound in float32.
"""

import torch
import triton
import triton.language as tl

from ..factor_tiles import add_partials, store_partial, is_last_program, load_block
from ..launch import on_device
from ..pointer_table import INDEX, SIDE, SIDE_A, TL_DTYPE, Table, load_entry, pointer_at, count_programs, load_sizes, tensor_at
from ..primitives import dot, to_float32
from ..tiles import grouped
from .addresses import AddressList

GRADIENTS = tl.constexpr(3)  # their first row among the moving tensors


@triton.jit
def load_below(p, i_d, i_r, d, r, IS_A: tl.constexpr, DTYPE: tl.constexpr):
    """Rows i_d of a factor, as DTYPE; of an a, without its first r."""
    b = to_float32(load_block(p, i_d, i_r, d, r, IS_A)).to(DTYPE)  # [BLOCK_D, BLOCK_R]
    if IS_A:
        b = tl.where((i_d >= r)[:, None], b, 0.0)
    return b


@triton.jit
def inner_factor(
    entries, moving, partials, totals, counters, i_tensor, i_chunk, n, IS_A: tl.constexpr, X: tl.constexpr,
    BACKWARD: tl.constexpr, SUM: tl.constexpr, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One chunk of one factor, one block of xᵀy."""
    N_BLOCKS: tl.constexpr = (R_MAX + BLOCK_R - 1) // BLOCK_R
    SIZE: tl.constexpr = R_MAX * R_MAX
    index = load_entry(entries, i_tensor, INDEX)  # of a pair's a, n more for its b
    x = tensor_at(entries, i_tensor, 0, X, ALIGNED)
    y = pointer_at(moving + GRADIENTS * n + index, tl.float32, ALIGNED) if BACKWARD else x
    d, r = load_sizes(entries, i_tensor, IS_A, UNIFORM_R, ALIGNED)
    i_row = (tl.program_id(1) // N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_col = (tl.program_id(1) % N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_sum = tl.zeros([BLOCK_R, BLOCK_R], dtype=SUM)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, tl.minimum(start + CHUNK, d), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_x = load_below(x, i_d, i_row, d, r, IS_A, SUM)
        if BACKWARD or R_MAX > BLOCK_R:
            b_y = load_below(y, i_d, i_col, d, r, IS_A, SUM)
        else:
            b_y = b_x
        b_sum = dot(tl.trans(b_x), b_y, b_sum, "ieee")
    count = count_programs(d, CHUNK)
    p_mine, p_total = partials + tl.program_id(0).to(tl.int64) * SIZE, totals + index * SIZE
    store_partial(b_sum, p_mine, p_total, i_row, i_col, count, R_MAX)
    if count > 1:  # noqa: SIM102 - a jit function evaluates both sides of an `and`
        if is_last_program(counters + i_tensor * N_BLOCKS * N_BLOCKS + tl.program_id(1), count):
            add_partials(p_mine - i_chunk.to(tl.int64) * SIZE, p_total, SIZE, i_row, i_col, count, R_MAX)


@triton.jit(do_not_specialize=["n"])
def lora_cayley_inner_kernel(
    entries, tiles, moving, partials, totals, counters, n, X: tl.constexpr, BACKWARD: tl.constexpr, SUM: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if load_entry(entries, i_tensor, SIDE) == SIDE_A:
        inner_factor(
            entries, moving, partials, totals, counters, i_tensor, i_chunk, n, True, X, BACKWARD, SUM, UNIFORM_R,
            ALIGNED, R_MAX, CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    else:
        inner_factor(
            entries, moving, partials, totals, counters, i_tensor, i_chunk, n, False, X, BACKWARD, SUM, UNIFORM_R,
            ALIGNED, R_MAX, CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip


def inner(table: Table, moving: AddressList, backward: bool) -> torch.Tensor:
    """xᵀy of every factor of the table."""
    r_max, tile = table.r_max, grouped("gram", max(16, table.r_max))
    tiles, dtype = table.tiles(tile.chunk), torch.float32 if backward else torch.float64
    totals, partials = (
        torch.empty((count, r_max, r_max), dtype=dtype, device=table.device) for count in (len(table), tiles.programs)
    )
    with on_device(totals):
        lora_cayley_inner_kernel[(tiles.programs, triton.cdiv(r_max, tile.r) ** 2)](
            table.entries, tiles.pairs, moving.addresses, partials, totals, table.counters, len(table) // 2,
            X=TL_DTYPE[table.dtypes[0]], BACKWARD=backward, SUM=tl.float32 if backward else tl.float64,
            UNIFORM_R=table.uniform_r, ALIGNED=table.aligned, R_MAX=r_max, CHUNK=tile.chunk, BLOCK_D=tile.d,
            BLOCK_R=tile.r, num_warps=tile.warps, num_stages=tile.stages, maxnreg=255,
        )  # fmt: skip
    return totals
