"""LoRA-Muon's momentum (an average without a second moment) and the move that it makes, for all factors.

Math      For each factor p with gradient g and momentum m:
              m ← m + (1-β)(g - m)                     lora_momentum_kernel; it also counts the step
              p ← (1 - η w) p + M m (a),  … + m M (b)  lora_move_kernel, M r×r per factor
Grid      One program per chunk of d of one factor, all its rank columns. For the average a factor is a flat row of
          numbers, except for experts, which are interleaved.
Shapes    p, g, m of one shape and any float each; M float32 (n, R, R). Arithmetic is float32 ("ieee"
          products), 1 - β and 1 - η w are computed in float64; m and p are rounded once, at the store (p stochastically
          where there are keys, as in transform.py).
Roofline  2 reads and 1 write of d·r elements each: memory bound.
"""

import torch
import triton
import triton.language as tl

from ..factor_tiles import load_block
from ..launch import Launch, alignments, on_device, plan, stream_of
from ..pointer_table import (
    INDEX,
    RESTS,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    FactorTable,
    TableWithGradients,
    chunk_end,
    load_entry,
    load_flat_sizes,
    load_sizes,
    pointer_at,
    tensor_at,
    tile_offsets,
)
from ..primitives import round_to
from ..tiles import grouped
from .adamw import HYPER, UPDATE, Settings, choose_side, double, learning_rate
from .transform import Noise, TransformLaunch, transform_factor


@triton.jit
def average_factor(
    entries, gradients,
    i_tensor, i_chunk, one_minus_beta,
    G: tl.constexpr, M: tl.constexpr, IS_A: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = ALIGNED and (IS_A or EXPERTS == 1)
    m, g = tensor_at(entries, i_tensor, 1, M, WIDE), pointer_at(gradients + i_tensor, G, WIDE)
    if BLOCK_R == 1:
        d, r = load_flat_sizes(entries, i_tensor, ALIGNED)
    else:
        d, r = load_sizes(entries, i_tensor, IS_A, UNIFORM_R, WIDE)
    i_r = tl.arange(0, BLOCK_R)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, chunk_end(entries, i_tensor, start, d, CHUNK), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_g = load_block(g, i_d, i_r, d, r, IS_A, EXPERTS).to(tl.float32)  # [BLOCK_D, BLOCK_R], as all that follows
        b_m = load_block(m, i_d, i_r, d, r, IS_A, EXPERTS).to(tl.float32)
        b_m += (b_g - b_m) * one_minus_beta
        mask = (i_d < d)[:, None] & (i_r < r)[None, :]
        tl.store(m + tile_offsets(i_d, i_r, d, r, IS_A, EXPERTS), round_to(b_m, M), mask=mask)


@triton.jit
def lora_momentum_kernel(
    entries, gradients, tiles, steps,
    beta: tl.float64,
    G: tl.constexpr, M: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    one_minus_beta = (1.0 - double(beta)).to(tl.float32)
    walk_as_a = False if BLOCK_R == 1 else load_entry(entries, i_tensor, SIDE) == SIDE_A
    if walk_as_a:
        average_factor(
            entries, gradients,
            i_tensor, i_chunk, one_minus_beta,
            G, M, True,
            UNIFORM_R, ALIGNED, EXPERTS,
            CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    else:
        average_factor(
            entries, gradients,
            i_tensor, i_chunk, one_minus_beta,
            G, M, False,
            UNIFORM_R, ALIGNED, EXPERTS,
            CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    if i_chunk == 0 and load_entry(entries, i_tensor, RESTS) == 0:
        step = steps + load_entry(entries, i_tensor, INDEX)
        t = tl.load(step) + 1.0
        tl.debug_barrier()  # every thread has read the count before one of them overwrites it
        tl.store(step, t)


@triton.jit(do_not_specialize=["p_lr_b", "p_lr_a"])
def lora_move_kernel(
    entries, tiles, matrices, steps, keys, p_lr_b, p_lr_a,
    lr_b: tl.float64, decay_b: tl.float64, lr_a: tl.float64, decay_a: tl.float64,
    LR_IN_MEMORY: tl.constexpr, P: tl.constexpr, M: tl.constexpr, STOCHASTIC: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LR_IN_MEMORY: the learning rates are read at p_lr_b and p_lr_a in place of lr_b and lr_a."""
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    is_a = load_entry(entries, i_tensor, SIDE) == SIDE_A
    lr = learning_rate(p_lr_b, p_lr_a, is_a, lr_b, lr_a, LR_IN_MEMORY)
    p_factor = (1.0 - lr * choose_side(is_a, decay_b, decay_a)).to(tl.float32)
    if is_a:
        transform_factor(
            entries, matrices, steps, keys,
            i_tensor, i_chunk, p_factor,
            0, 1, P, M,
            True, True, STOCHASTIC, UPDATE,
            UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        transform_factor(
            entries, matrices, steps, keys,
            i_tensor, i_chunk, p_factor,
            0, 1, P, M,
            False, True, STOCHASTIC, UPDATE,
            UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip


def average_(tables: list[TableWithGradients], beta: float, steps: torch.Tensor) -> None:
    """m ← m + (1-β)(g - m) for tables with columns p, m and the gradients. steps: float32 (n,), on the device,
    incremented here. The caller increments version counters."""
    with on_device(steps):
        stream = stream_of(steps)
        for table in tables:
            make = lambda table=table: _AverageLaunch(table.factors, table.dtype)
            plan(table.factors.plans, ("average", table.dtype), stream, make)(table, float(beta), steps, stream)


class _AverageLaunch:
    """The launch of ``lora_momentum_kernel`` on one table, with what stays the same from step to step."""

    def __init__(self, factors: FactorTable, gradient_dtype: torch.dtype):
        flat = factors.experts == 1
        tile = grouped("step", 1 if flat else max(16, factors.r_max))
        self.tile_map = factors.tile_map(tile.chunk, flat)
        self.launch = Launch(
            lora_momentum_kernel,
            (self.tile_map.programs,),
            (),
            {"G": TL_DTYPE[gradient_dtype], "M": TL_DTYPE[factors.dtypes[1]]}
            | {"UNIFORM_R": 1 if flat else factors.uniform_r, "ALIGNED": factors.aligned, "EXPERTS": factors.experts}
            | tile.options(),
        )

    def __call__(self, table: TableWithGradients, beta: float, steps: torch.Tensor, stream: int | None) -> None:
        self.launch.go(stream, (table.factors.entries, table.addresses, self.tile_map.tiles, steps), (beta,))


def move_(tables: list[FactorTable], matrices: torch.Tensor, settings: Settings, noise: Noise | None = None) -> None:
    """p ← (1 - η w) p + M m, or + m M, for tables with columns p, m. matrices: float32 (n, R, R). Only the learning
    rates and weight decays of ``settings`` are used. With ``noise`` a p of 16 bits is rounded stochastically. The
    caller increments version counters."""
    numbers, rates = settings
    numbers = numbers[0], numbers[HYPER - 1], numbers[HYPER], numbers[2 * HYPER - 1]
    r_max, unread = matrices.shape[-1], (matrices, matrices)  # without noise or rates the kernel does not read them
    pointers = matrices, *(noise or unread), *(rates or unread)
    key = "move", r_max, rates and tuple([rate.dtype for rate in rates]), alignments(pointers[:3])
    with on_device(matrices):
        stream = stream_of(matrices)
        for table in tables:
            flags = {"LR_IN_MEMORY": rates is not None} | dict(zip("PM", map(TL_DTYPE.get, table.dtypes), strict=True))
            flags["STOCHASTIC"] = noise is not None and table.dtypes[0].itemsize == 2
            make = lambda table=table, flags=flags: TransformLaunch(lora_move_kernel, table, r_max, flags)
            plan(table.plans, (*key, flags["STOCHASTIC"]), stream, make)(table, pointers, stream, numbers)
