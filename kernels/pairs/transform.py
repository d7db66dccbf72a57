"""Factors times r×r matrices, for all factors in one launch.

Math      lora_transform_kernel is p ← M p (a), p ← p M (b), or p ← p + M p, p + p M.
"""

import torch
import triton
import triton.language as tl

from ..factor_tiles import block_k, load_block, load_matrix, times_matrix
from ..launch import Launch, alignments, check_tensor, on_device, plan, stream_of
from ..pointer_table import INDEX, SIDE, SIDE_A, TL_DTYPE, Table, entry, largest_rank, listed, offsets, sizes, tensor_at
from ..primitives import dot, keep_ieee, round_to, to_float32
from ..tiles import grouped


@triton.jit
def transform_factor(
    entries, matrices, i_tensor, i_chunk, keep, TARGET: tl.constexpr, SOURCE: tl.constexpr, IS_A: tl.constexpr,
    P: tl.constexpr, X: tl.constexpr, ADD: tl.constexpr, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr,
    EXPERTS: tl.constexpr, R_MAX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p ← x M, or p ← keep p + x M with ADD, for one chunk of one factor. TARGET and SOURCE are the columns of p and x,
    which may be one."""
    WIDE: tl.constexpr = ALIGNED and (IS_A or EXPERTS == 1)
    p, x = tensor_at(entries, i_tensor, TARGET, P, WIDE), tensor_at(entries, i_tensor, SOURCE, X, WIDE)
    d, r = sizes(entries, i_tensor, IS_A, UNIFORM_R, WIDE)
    matrix = matrices + entry(entries, i_tensor, INDEX) * R_MAX * R_MAX
    i_r = tl.arange(0, BLOCK_R)
    if BLOCK_K == BLOCK_R:
        b_matrix = load_matrix(matrix, i_r, i_r, r, IS_A, R_MAX)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, tl.minimum(start + CHUNK, d), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_new = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
        if BLOCK_K < BLOCK_R:
            b_new = times_matrix(b_new, x, x, 0.0, matrix, i_d, i_r, d, r, IS_A, False, EXPERTS, R_MAX, BLOCK_K)
            if ADD:
                b_new += keep * load_block(p, i_d, i_r, d, r, IS_A, EXPERTS).to(tl.float32)
        else:
            b_x = load_block(x, i_d, i_r, d, r, IS_A, EXPERTS)  # [BLOCK_D, BLOCK_R]
            b_new = dot(to_float32(b_x), b_matrix, b_new, "ieee")
            if ADD:  # keep_ieee: else the compiler makes p the accumulator, in twice the registers
                b_p = b_x if TARGET == SOURCE else load_block(p, i_d, i_r, d, r, IS_A, EXPERTS)
                b_new = keep_ieee(b_new) + keep * b_p.to(tl.float32)
        mask = (i_d < d)[:, None] & (i_r < r)[None, :]
        tl.store(p + offsets(i_d, i_r, d, r, IS_A, EXPERTS), round_to(b_new, P), mask=mask)


@triton.jit
def lora_transform_kernel(
    entries, tiles, matrices, COLUMN: tl.constexpr, P: tl.constexpr, ADD: tl.constexpr, UNIFORM_R: tl.constexpr,
    ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if entry(entries, i_tensor, SIDE) == SIDE_A:
        transform_factor(
            entries, matrices, i_tensor, i_chunk, 1.0, COLUMN, COLUMN, True, P, P, ADD, UNIFORM_R, ALIGNED, EXPERTS,
            R_MAX, CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        transform_factor(
            entries, matrices, i_tensor, i_chunk, 1.0, COLUMN, COLUMN, False, P, P, ADD, UNIFORM_R, ALIGNED, EXPERTS,
            R_MAX, CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip


def transform_(tensors: list[torch.Tensor], is_a: list[bool], matrices: torch.Tensor, add: bool = False) -> None:
    """p ← M p (rank first) or p ← p M (rank last) for every factor, in place; with ``add``, p ← p + M p or p + p M.
    matrices: float32 (n, R, R), R the largest rank."""
    r_max = largest_rank(tensors, is_a)
    check_tensor("matrices", matrices, (len(tensors), r_max, r_max), torch.float32)
    if not tensors:
        return
    _launch_transform([factors.table for factors in listed([tensors], is_a)], matrices, 0, add, r_max)
    torch.autograd.graph.increment_version(tensors)


def transform_tables_(tables: list[Table], matrices: torch.Tensor, column: int, add: bool) -> None:
    """Runs ``transform_`` on one column of tables. Version counters are the caller's."""
    _launch_transform(tables, matrices, column, add, matrices.shape[-1])


def _launch_transform(tables: list[Table], matrices: torch.Tensor, column: int, add: bool, r_max: int) -> None:
    with on_device(matrices):
        stream = stream_of(matrices)
        for table in tables:
            flags = {"COLUMN": column, "P": TL_DTYPE[table.dtypes[column]], "ADD": add}
            make = lambda table=table, flags=flags: TransformLaunch(lora_transform_kernel, table, r_max, flags)
            key = "transform", column, add, r_max, alignments([matrices])
            plan(table.plans, key, stream, make)(table, matrices, stream)


class TransformLaunch:
    """A launch of ``kernel``, which runs ``transform_factor`` on every factor of a table. ``flags`` are the constexprs
    that depend on neither table nor tile."""

    def __init__(self, kernel, table: Table, r_max: int, flags: dict):
        tile = grouped("transform", max(16, r_max))
        self.tiles = table.tiles(tile.chunk)
        self.launch = Launch(
            kernel,
            (self.tiles.programs,),
            (),
            flags
            | {"UNIFORM_R": table.uniform_r, "ALIGNED": table.aligned, "EXPERTS": table.experts, "R_MAX": r_max}
            | {"CHUNK": tile.chunk, "BLOCK_D": tile.d, "BLOCK_R": tile.r, "BLOCK_K": block_k(tile)}
            | {"num_warps": tile.warps, "num_stages": tile.stages},
        )

    def __call__(
        self, table: Table, matrices: torch.Tensor, stream: int | None, rates: tuple = (), numbers: tuple = ()
    ) -> None:
        self.launch.go(stream, (table.entries, self.tiles.pairs, matrices, *rates), numbers)
