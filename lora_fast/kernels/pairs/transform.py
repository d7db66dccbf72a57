"""Factors times r×r matrices, in place, for all factors in one launch.

Math      For each factor p with its matrix M: p ← M p (a), p ← p M (b); with ADD p ← p + M p, p + p M.
          ``transform_factor`` is the general form p ← k p + M x, k p + x M, which LoRA-Muon's move also uses, with the
          momentum as x (momentum.py). The methods that transform are iLoRA, πLoRA, scale regularization and BaLoRA.
Grid      One program per chunk of d of one factor, all its rank columns, so products along the rank stay within a
          program and p may be its own source.
Shapes    p, x of one shape and any float each; M float32 (n, R, R), R the largest rank. Products are float32 ("ieee"),
          rounded once to p's dtype, at the store: to nearest, or, where there are keys, int64 (n,), stochastically as
          in a step whose counts are ``steps``, float32 (n,).
Roofline  1 read (of x and, with another p, of p) and 1 write of d·r elements; M adds r / chunk of that up to rank 64,
          and is read for every tile above (factor_tiles.py). 2 r operations an element: memory bound at small ranks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import limits
from ..factor_tiles import block_k, load_block, load_matrix, round_tile, times_matrix
from ..launch import Launch, alignments, check_tensor, on_device, plan, stream_of
from ..pointer_table import (
    INDEX,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    FactorTable,
    chunk_end,
    find_tables,
    largest_rank,
    load_entry,
    load_sizes,
    tensor_at,
    tile_offsets,
)
from ..primitives import dot, keep_ieee, to_float32
from ..tiles import grouped

CORRECTION = tl.constexpr(limits.CORRECTION)


class Noise(NamedTuple):
    """The tensors that choose the noise of stochastic rounding: the step counts, float32 (n,), and the factors' keys,
    int64 (n,)."""

    steps: torch.Tensor
    keys: torch.Tensor


@triton.jit
def transform_factor(
    entries, matrices, steps, keys,
    i_tensor, i_chunk, p_factor,
    TARGET: tl.constexpr, SOURCE: tl.constexpr, P: tl.constexpr, X: tl.constexpr,
    IS_A: tl.constexpr, ADD: tl.constexpr, STOCHASTIC: tl.constexpr, PASS: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p ← x M, or p ← p_factor p + x M with ADD, for one chunk of one factor seen as rows. TARGET and SOURCE are the
    columns of p and x, which may be the same."""
    WIDE: tl.constexpr = ALIGNED and (IS_A or EXPERTS == 1)
    p, x = tensor_at(entries, i_tensor, TARGET, P, WIDE), tensor_at(entries, i_tensor, SOURCE, X, WIDE)
    d, r = load_sizes(entries, i_tensor, IS_A, UNIFORM_R, WIDE)
    index = load_entry(entries, i_tensor, INDEX)
    matrix = matrices + index * R_MAX * R_MAX
    key, t = 0, 0.0
    if STOCHASTIC:
        key, t = tl.load(keys + index), tl.load(steps + index)
    i_r = tl.arange(0, BLOCK_R)
    if BLOCK_K == BLOCK_R:
        b_matrix = load_matrix(matrix, i_r, i_r, r, IS_A, R_MAX)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, chunk_end(entries, i_tensor, start, d, CHUNK), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_new = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
        if BLOCK_K < BLOCK_R:
            b_new = times_matrix(
                b_new, x, x, matrix,
                i_d, i_r, d, r, 0.0,
                IS_A, False, EXPERTS,
                R_MAX, BLOCK_K,
            )  # fmt: skip
            if ADD:
                b_new += p_factor * load_block(p, i_d, i_r, d, r, IS_A, EXPERTS).to(tl.float32)
        else:
            b_x = load_block(x, i_d, i_r, d, r, IS_A, EXPERTS)  # [BLOCK_D, BLOCK_R]
            b_new = dot(to_float32(b_x), b_matrix, b_new, "ieee")
            if ADD:
                b_p = b_x if TARGET == SOURCE else load_block(p, i_d, i_r, d, r, IS_A, EXPERTS)
                # Without keep_ieee the compiler makes p the accumulator, in twice the registers.
                b_new = keep_ieee(b_new) + p_factor * b_p.to(tl.float32)
        mask = (i_d < d)[:, None] & (i_r < r)[None, :]
        b_new = round_tile(b_new, key, t, i_d, o_d, PASS, P, STOCHASTIC, BLOCK_D, BLOCK_R)
        tl.store(p + tile_offsets(i_d, i_r, d, r, IS_A, EXPERTS), b_new, mask=mask)


@triton.jit
def lora_transform_kernel(
    entries, tiles, matrices, steps, keys,
    COLUMN: tl.constexpr, P: tl.constexpr, ADD: tl.constexpr, STOCHASTIC: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if load_entry(entries, i_tensor, SIDE) == SIDE_A:
        transform_factor(
            entries, matrices, steps, keys,
            i_tensor, i_chunk, 1.0,
            COLUMN, COLUMN, P, P,
            True, ADD, STOCHASTIC, CORRECTION,
            UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        transform_factor(
            entries, matrices, steps, keys,
            i_tensor, i_chunk, 1.0,
            COLUMN, COLUMN, P, P,
            False, ADD, STOCHASTIC, CORRECTION,
            UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip


def transform_(tensors: list[torch.Tensor], is_a: list[bool], matrices: torch.Tensor, add: bool = False) -> None:
    """p ← M p (rank first) or p ← p M (rank last) for every factor, in place; with ``add``, p ← p + M p or p + p M.
    matrices: float32 (n, R, R), R the largest rank."""
    r_max = largest_rank(tensors, is_a)
    check_tensor("matrices", matrices, (len(tensors), r_max, r_max), torch.float32)
    if not tensors:
        return
    _launch_transform([table.factors for table in find_tables([tensors], is_a)], matrices, 0, add, r_max, None)
    torch.autograd.graph.increment_version(tensors)


def transform_tables_(
    tables: list[FactorTable], matrices: torch.Tensor, column: int, add: bool, noise: Noise | None = None
) -> None:
    """Runs ``transform_`` on one column of tables. With ``noise`` results of 16 bits are rounded stochastically. The
    caller increments version counters."""
    _launch_transform(tables, matrices, column, add, matrices.shape[-1], noise)


def _launch_transform(
    tables: list[FactorTable], matrices: torch.Tensor, column: int, add: bool, r_max: int, noise: Noise | None
) -> None:
    pointers = matrices, *(noise or (matrices, matrices))  # without noise the kernel reads neither steps nor keys
    aligned = alignments(pointers)
    with on_device(matrices):
        stream = stream_of(matrices)
        for table in tables:
            stochastic = noise is not None and table.dtypes[column].itemsize == 2
            flags = {"COLUMN": column, "P": TL_DTYPE[table.dtypes[column]], "ADD": add, "STOCHASTIC": stochastic}
            make = lambda table=table, flags=flags: TransformLaunch(lora_transform_kernel, table, r_max, flags)
            key = "transform", column, add, r_max, stochastic, aligned
            plan(table.plans, key, stream, make)(table, pointers, stream)


class TransformLaunch:
    """A launch of ``kernel``, which runs ``transform_factor`` on every factor of a table. ``flags`` are the constexprs
    that depend on neither table nor tile."""

    def __init__(self, kernel, table: FactorTable, r_max: int, flags: dict):
        tile = grouped("transform", max(16, r_max))
        self.tile_map = table.tile_map(tile.chunk)
        self.launch = Launch(
            kernel,
            (self.tile_map.programs,),
            (),
            flags
            | {"UNIFORM_R": table.uniform_r, "ALIGNED": table.aligned, "EXPERTS": table.experts, "R_MAX": r_max}
            | tile.options(BLOCK_K=block_k(tile)),
        )

    def __call__(self, table: FactorTable, pointers: tuple, stream: int | None, numbers: tuple = ()) -> None:
        self.launch.go(stream, (table.entries, self.tile_map.tiles, *pointers), numbers)
