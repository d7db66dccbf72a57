"""Momentum without a second moment, for LoRA-Muon: its average, and the move that it makes, for all factors.

Math      of each factor p with gradient g and momentum m:
              m ← m + (1-β)(g - m)                     lora_momentum_kernel; it counts the step
              p ← (1 - η w) p + M m (a),  … + m M (b)  lora_move_kernel, M r×r per factor
Grid      one program per chunk of d of one factor, all its rank columns; for the average a factor is a flat row of
          numbers, but for experts, which lie interleaved.
Shapes    p, g, m of one shape and any float each; M float32 (n, R, R). Arithmetic is float32 ("ieee"
          products), 1 - β and 1 - η w are from float64; m and p are rounded once, at the store.
Roofline  2 reads and 1 write of d·r elements each: memory bound.
"""

import torch
import triton
import triton.language as tl

from ..factor_tiles import load_block
from ..launch import Launch, alignments, on_device, plan, stream_of
from ..pointer_table import (
    INDEX,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    Listed,
    Table,
    entry,
    flat_sizes,
    offsets,
    pointer_at,
    sizes,
    tensor_at,
)
from ..primitives import round_to
from ..tiles import grouped
from .adamw import HYPER, Settings, double, learning_rate, of_side
from .transform import TransformLaunch, transform_factor


@triton.jit
def average_factor(
    entries, beside, i_tensor, i_chunk, take, IS_A: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = ALIGNED and (IS_A or EXPERTS == 1)
    m, g = tensor_at(entries, i_tensor, 1, M, WIDE), pointer_at(beside + i_tensor, G, WIDE)
    if BLOCK_R == 1:
        d, r = flat_sizes(entries, i_tensor, ALIGNED)
    else:
        d, r = sizes(entries, i_tensor, IS_A, UNIFORM_R, WIDE)
    i_r = tl.arange(0, BLOCK_R)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, tl.minimum(start + CHUNK, d), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_g = load_block(g, i_d, i_r, d, r, IS_A, EXPERTS).to(tl.float32)  # [BLOCK_D, BLOCK_R], as all that follows
        b_m = load_block(m, i_d, i_r, d, r, IS_A, EXPERTS).to(tl.float32)
        b_m += (b_g - b_m) * take
        mask = (i_d < d)[:, None] & (i_r < r)[None, :]
        tl.store(m + offsets(i_d, i_r, d, r, IS_A, EXPERTS), round_to(b_m, M), mask=mask)


@triton.jit
def lora_momentum_kernel(
    entries, beside, tiles, steps, beta: tl.float64, G: tl.constexpr, M: tl.constexpr, UNIFORM_R: tl.constexpr,
    ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    take = (1.0 - double(beta)).to(tl.float32)
    is_a = False if BLOCK_R == 1 else entry(entries, i_tensor, SIDE) == SIDE_A
    if is_a:
        average_factor(
            entries, beside, i_tensor, i_chunk, take, True, G, M, UNIFORM_R, ALIGNED, EXPERTS, CHUNK, BLOCK_D, BLOCK_R
        )
    else:
        average_factor(
            entries, beside, i_tensor, i_chunk, take, False, G, M, UNIFORM_R, ALIGNED, EXPERTS, CHUNK, BLOCK_D, BLOCK_R
        )
    if i_chunk == 0:
        step = steps + entry(entries, i_tensor, INDEX)
        t = tl.load(step) + 1.0
        tl.debug_barrier()  # every thread has read it
        tl.store(step, t)


@triton.jit(do_not_specialize=["p_lr_b", "p_lr_a"])
def lora_move_kernel(
    entries, tiles, matrices, p_lr_b, p_lr_a, lr_b: tl.float64, decay_b: tl.float64, lr_a: tl.float64,
    decay_a: tl.float64, RATES: tl.constexpr, P: tl.constexpr, M: tl.constexpr, UNIFORM_R: tl.constexpr,
    ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """RATES: as in adamw.py."""
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    is_a = entry(entries, i_tensor, SIDE) == SIDE_A
    lr = learning_rate(is_a, p_lr_b, p_lr_a, lr_b, lr_a, RATES)
    keep = (1.0 - lr * of_side(is_a, decay_b, decay_a)).to(tl.float32)
    if is_a:
        transform_factor(
            entries, matrices, i_tensor, i_chunk, keep, 0, 1, True, P, M, True, UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        transform_factor(
            entries, matrices, i_tensor, i_chunk, keep, 0, 1, False, P, M, True, UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip


def average_(factors: list[Listed], beta: float, steps: torch.Tensor) -> None:
    """m ← m + (1-β)(g - m) of tables with columns p, m and the gradients beside them. steps: float32 (n,), on the
    device, counted up here. Version counters are the caller's."""
    with on_device(steps):
        stream = stream_of(steps)
        for listed in factors:
            make = lambda listed=listed: _AverageLaunch(listed.table, listed.dtype)
            plan(listed.table.plans, ("average", listed.dtype), stream, make)(listed, float(beta), steps, stream)


class _AverageLaunch:
    def __init__(self, table: Table, dtype: torch.dtype):
        flat = table.experts == 1
        tile = grouped("step", 1 if flat else max(16, table.r_max))
        self.tiles = table.tiles(tile.chunk, flat)
        self.launch = Launch(
            lora_momentum_kernel,
            (self.tiles.programs,),
            (),
            {"G": TL_DTYPE[dtype], "M": TL_DTYPE[table.dtypes[1]], "UNIFORM_R": 1 if flat else table.uniform_r}
            | {"ALIGNED": table.aligned, "EXPERTS": table.experts, "CHUNK": tile.chunk}
            | {"BLOCK_D": tile.d, "BLOCK_R": tile.r, "num_warps": tile.warps, "num_stages": tile.stages},
        )

    def __call__(self, listed: Listed, beta: float, steps: torch.Tensor, stream: int | None) -> None:
        self.launch.go(stream, (listed.table.entries, listed.addresses, self.tiles.pairs, steps), (beta,))


def move_(tables: list[Table], matrices: torch.Tensor, settings: Settings) -> None:
    """p ← (1 - η w) p + M m, or + m M, of tables with columns p, m. matrices: float32 (n, R, R). Of ``settings`` the
    learning rates and weight decays count. Version counters are the caller's."""
    numbers, rates = settings
    numbers = numbers[0], numbers[HYPER - 1], numbers[HYPER], numbers[2 * HYPER - 1]
    r_max, given = matrices.shape[-1], rates or (matrices, matrices)
    key = "move", r_max, rates and tuple([rate.dtype for rate in rates]), alignments([matrices])
    with on_device(matrices):
        stream = stream_of(matrices)
        for table in tables:
            flags = {"RATES": rates is not None, "P": TL_DTYPE[table.dtypes[0]], "M": TL_DTYPE[table.dtypes[1]]}
            make = lambda table=table, flags=flags: TransformLaunch(lora_move_kernel, table, r_max, flags)
            plan(table.plans, key, stream, make)(table, matrices, stream, given, numbers)
