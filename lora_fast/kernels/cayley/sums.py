"""Sums xᵀy over the factors of all pairs, for NB-LoRA's Cayley transform. The mathematics is in cayley/__init__.py.

Math      A factor is d rows of r columns (pointer_table.py), x its free parameters without the first r rows of an a.
          Forward y is x; backward y is the gradient of the transformed factor.
Grid      (chunks of all factors, blocks of the sum), partial sums as in factor_tiles.py.
Shapes    x (d, r) in any float dtype, y float32 → float64 (n_factors, R, R). Products and sums are float64.
Roofline  Every operand once against 2 r operations an element: memory bound where float64 has half of float32's rate;
          with a 64th of it, as on sm_86, sm_89 and sm_120, bound by its operations.
"""

import torch
import triton
import triton.language as tl

from ..factor_tiles import add_partials, is_last_program, load_block, store_partial
from ..launch import on_device
from ..pointer_table import (
    INDEX,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    FactorTable,
    count_programs,
    load_entry,
    load_sizes,
    pointer_at,
    tensor_at,
)
from ..primitives import dot, to_float32
from ..tiles import grouped

GRADIENTS = tl.constexpr(3)  # of the lists of n addresses in backward, the first of those of gradients


@triton.jit
def load_below(p, i_d, i_r, d, r, IS_A: tl.constexpr):
    """Returns rows i_d of a factor in float64, with the first r rows of an a set to 0."""
    b = to_float32(load_block(p, i_d, i_r, d, r, IS_A)).to(tl.float64)  # [BLOCK_D, BLOCK_R]
    if IS_A:
        b = tl.where((i_d >= r)[:, None], b, 0.0)
    return b


@triton.jit
def sum_factor(
    entries, addresses, partials, totals, counters,
    i_tensor, i_chunk, n,
    X: tl.constexpr, BACKWARD: tl.constexpr, IS_A: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sums one chunk of one factor for one block of xᵀy."""
    N_BLOCKS: tl.constexpr = (R_MAX + BLOCK_R - 1) // BLOCK_R
    SIZE: tl.constexpr = R_MAX * R_MAX
    index = load_entry(entries, i_tensor, INDEX)  # the pair for an a, n + the pair for a b
    x = tensor_at(entries, i_tensor, 0, X, ALIGNED)
    y = pointer_at(addresses + GRADIENTS * n + index, tl.float32, ALIGNED) if BACKWARD else x
    d, r = load_sizes(entries, i_tensor, IS_A, UNIFORM_R, ALIGNED)
    i_row = (tl.program_id(1) // N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_col = (tl.program_id(1) % N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_sum = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, tl.minimum(start + CHUNK, d), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_x = load_below(x, i_d, i_row, d, r, IS_A)
        if BACKWARD or R_MAX > BLOCK_R:
            b_y = load_below(y, i_d, i_col, d, r, IS_A)
        else:
            b_y = b_x
        b_sum += dot(tl.trans(b_x), b_y, tl.zeros_like(b_sum), "ieee")  # in two levels: rounds less often
    count = count_programs(d, CHUNK)
    p_partial, p_total = partials + tl.program_id(0).to(tl.int64) * SIZE, totals + index * SIZE
    store_partial(b_sum, p_partial, p_total, i_row, i_col, count, R_MAX)
    if count > 1:  # noqa: SIM102 - a jit function evaluates both sides of an `and`
        if is_last_program(counters + i_tensor * N_BLOCKS * N_BLOCKS + tl.program_id(1), count):
            add_partials(p_partial - i_chunk.to(tl.int64) * SIZE, p_total, SIZE, i_row, i_col, count, R_MAX)


@triton.jit(do_not_specialize=["n"])
def lora_cayley_sums_kernel(
    entries, tiles, addresses, partials, totals, counters,
    n,
    X: tl.constexpr, BACKWARD: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if load_entry(entries, i_tensor, SIDE) == SIDE_A:
        sum_factor(
            entries, addresses, partials, totals, counters,
            i_tensor, i_chunk, n,
            X, BACKWARD, True,
            UNIFORM_R, ALIGNED, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    else:
        sum_factor(
            entries, addresses, partials, totals, counters,
            i_tensor, i_chunk, n,
            X, BACKWARD, False,
            UNIFORM_R, ALIGNED, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip


def factor_sums(table: FactorTable, addresses: torch.Tensor, backward: bool) -> torch.Tensor:
    """Computes xᵀy of every factor of the table: float64 (n_factors, R, R)."""
    r_max, tile = table.r_max, grouped("gram", max(16, table.r_max))
    tile_map = table.tile_map(tile.chunk)
    totals, partials = (
        torch.empty((count, r_max, r_max), dtype=torch.float64, device=table.device)
        for count in (len(table), tile_map.programs)
    )
    with on_device(totals):
        lora_cayley_sums_kernel[(tile_map.programs, triton.cdiv(r_max, tile.r) ** 2)](
            table.entries, tile_map.tiles, addresses, partials, totals, table.counters,
            len(table) // 2,
            X=TL_DTYPE[table.dtypes[0]], BACKWARD=backward,
            UNIFORM_R=table.uniform_r, ALIGNED=table.aligned, R_MAX=r_max,
            **tile.options(), maxnreg=255,
        )  # fmt: skip
    return totals
