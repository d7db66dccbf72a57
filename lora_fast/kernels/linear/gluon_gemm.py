"""The GEMM with the adapter in it, warp-specialised for Hopper: the strategy "gluon" of gemm.py.

Math      result = left · W' + keep∘(thin · factor) + bias, as in gemm.py.
Grid      One program per multiprocessor that torch's carve-out leaves walks tiles of the result, in gemm.py's order.
Warps     Three partitions of a program walk the same tiles:
          multiply (8 warps)  starts the accumulator from the thin product, adds the steps over d_in, stores the result;
          fetch (1 warp)      copies left and W by TMA, up to ``STAGES`` steps ahead, also across tiles;
          prepare (2 warps)   stores thin and factor in 16 bits, the bias and the mask's bits for the next tile,
          so that a multiplying warp computes no address, converts no factor and draws no mask.
Barriers  A writer completes the barrier "full" of a buffer, after which the reader may read it. The reader completes
          "empty", after which the writer may write it again. At the n-th use of a buffer the reader waits for phase
          n mod 2 of "full", and the writer for the other phase of "empty", so that its first wait passes.
Shapes    As in gemm.py, but left, W and result have 16 bits and TMA can address them (``tiles.uses_tma``). Any rank.
Roofline  Compute bound, as in gemm.py.

No interpreter runs Gluon. tests/helpers/gluon_machine.py runs these functions on a CPU and delays copies and products
as long as the barriers allow. The kernel is not verified on a GPU, so it runs only where ``lora-fast tune`` measured it
as the fastest.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import limits, tiles
from ..launch import NO_MASK, DropoutMask, Launch, LaunchError, Matrix, allocator

# Triton 3.9 has new names for these.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret

BLOCK_T, BLOCK_OUT, BLOCK_IN, STAGES = 128, 256, 64, 3
WARPS = 8
FETCHING_WARPS, PREPARING_WARPS = gl.constexpr(1), gl.constexpr(2)
FETCHING_REGISTERS, PREPARING_REGISTERS = gl.constexpr(24), gl.constexpr(168)  # for each thread
NUMBERS = gl.constexpr(16)  # elements of a factor, S or dS that a thread converts at a time
MASK_ROWS = gl.constexpr(8)  # tokens whose mask is drawn at a time
PHILOX_ROUNDS = gl.constexpr(limits.PHILOX_ROUNDS)


@gluon.jit
def tile_origin(tile, n_tokens, d_out, BLOCK_T: gl.constexpr, BLOCK_OUT: gl.constexpr, GROUP: gl.constexpr):
    """Returns the first token and the first column of a tile."""
    n_tiles_t, n_tiles_out = gl.cdiv(n_tokens, BLOCK_T), gl.cdiv(d_out, BLOCK_OUT)
    group = tile // (GROUP * n_tiles_out)
    group_rows = gl.minimum(n_tiles_t - group * GROUP, GROUP)
    within = tile % (GROUP * n_tiles_out)
    return (group * GROUP + within % group_rows) * BLOCK_T, (within // group_rows) * BLOCK_OUT


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Returns the next buffer of a ring and the phase of its barriers, which flips each time the ring wraps."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


# ---- fetch


@gluon.jit
def fetch(
    left, weight, left_buffers, weight_buffers, full, empty, n_tokens, d_out, d_in,
    TRANSPOSED: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_OUT: gl.constexpr, BLOCK_IN: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies left and W to shared memory by TMA, step by step of d_in for all tiles of this program."""
    BYTES: gl.constexpr = (BLOCK_T + BLOCK_OUT) * BLOCK_IN * 2
    n_tiles = gl.cdiv(n_tokens, BLOCK_T) * gl.cdiv(d_out, BLOCK_OUT)
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        o_t, o_out = tile_origin(tile, n_tokens, d_out, BLOCK_T, BLOCK_OUT, GROUP)
        for o_in in range(0, d_in, BLOCK_IN):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), BYTES)  # "full" completes once both copies have written all their bytes
            copy_in(left, [o_t, o_in], full.index(stage), left_buffers.index(stage))
            if TRANSPOSED:
                o_weight = [o_out, o_in]
            else:
                o_weight = [o_in, o_out]
            copy_in(weight, o_weight, full.index(stage), weight_buffers.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


# ---- prepare


@gluon.jit
def store_parts(buffers, source, o_row, o_column, n_rows, n_columns, stride):
    """Loads a block of a factor, S or dS and stores it for the tensor cores. If ``buffers`` (parts, rows, columns) have
    one part, the block is rounded to their dtype; if two, they receive its bfloat16 halves, the high one first."""
    dtype: gl.constexpr = buffers.dtype
    ROWS: gl.constexpr = buffers.shape[1]
    COLUMNS: gl.constexpr = buffers.shape[2]
    ACROSS: gl.constexpr = COLUMNS if COLUMNS < 64 else 64  # columns at a time: the width of a 128-byte swizzle
    DOWN: gl.constexpr = NUMBERS * 32 * gl.num_warps() // ACROSS  # rows at a time
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // ACROSS, ACROSS // 8], [gl.num_warps(), 1], [1, 0])
    for row in gl.static_range(0, ROWS, DOWN):
        i_row = o_row.to(gl.int64) + row + gl.arange(0, DOWN, gl.SliceLayout(1, layout))
        for column in gl.static_range(0, COLUMNS, ACROSS):
            i_column = o_column + column + gl.arange(0, ACROSS, gl.SliceLayout(0, layout))
            mask = (i_row < n_rows)[:, None] & (i_column < n_columns)[None, :]
            block = gl.load(source + i_row[:, None] * stride + i_column[None, :], mask=mask, other=0.0)
            high = block.to(dtype)
            buffers.index(0).slice(row, DOWN).slice(column, ACROSS, dim=1).store(high)
            if buffers.shape[0] == 2:
                low = (block.to(gl.float32) - high.to(gl.float32)).to(dtype)
                buffers.index(1).slice(row, DOWN).slice(column, ACROSS, dim=1).store(low)


@gluon.jit
def philox(seed, counter0, counter1):
    """Returns four uint32 of Philox 4x32-7 for key ``seed`` (int64) and counter (counter0, counter1, 0, 0), the same as
    in ``primitives.keep_mask``."""
    key0, key1 = (seed & 0xFFFFFFFF).to(gl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(gl.uint32)
    word0, word1 = counter0, counter1
    word2, word3 = gl.zeros_like(word0), gl.zeros_like(word1)
    for _ in gl.static_range(PHILOX_ROUNDS):
        high0, low0 = gl.umulhi(word0, 0xD2511F53), word0 * 0xD2511F53
        high2, low2 = gl.umulhi(word2, 0xCD9E8D57), word2 * 0xCD9E8D57
        word0, word1, word2, word3 = high2 ^ word1 ^ key0, low2, high0 ^ word3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return word0, word1, word2, word3


@gluon.jit
def kept_pair(word, level, position: gl.constexpr):
    """Returns the mask bits of two neighbouring columns, shifted to ``position`` in a byte."""
    low = ((word & 0xFFFF) >= level).to(gl.int32)
    high = ((word >> 16) >= level).to(gl.int32)
    return (low << position) | (high << (position + 1))


@gluon.jit
def store_mask(buffer, seed, drop_level, o_t, o_out):
    """Stores the mask of a tile with eight columns in a byte, the first in bit 0. ``buffer`` is (BLOCK_T // MASK_ROWS,
    MASK_ROWS, BLOCK_OUT // 8)."""
    ROWS: gl.constexpr = buffer.shape[1]
    GROUPS: gl.constexpr = buffer.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    level = drop_level.to(gl.uint32)
    i_row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    i_group = o_out // 8 + gl.arange(0, GROUPS, gl.SliceLayout(0, layout))
    zero = gl.zeros([ROWS, GROUPS], gl.uint32, layout)
    for i in range(buffer.shape[0]):
        i_t = o_t + i * ROWS + i_row
        rows, groups = zero + i_t.to(gl.uint32)[:, None], zero + i_group.to(gl.uint32)[None, :]
        word0, word1, word2, word3 = philox(seed, rows, groups)
        bits = kept_pair(word0, level, 0) | kept_pair(word1, level, 2)
        bits |= kept_pair(word2, level, 4) | kept_pair(word3, level, 6)
        buffer.index(i).store(bits.to(gl.uint8))


@gluon.jit
def prepare(
    thin, factor, bias, seed, in_memory, drop_level, thin_buffers, factor_buffers, bias_buffer, mask_buffer, full,
    empty, n_tokens, d_out, stride_factor,
    R: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, DROPOUT: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_OUT: gl.constexpr, BLOCK_R: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Stores thin, factor, bias and mask of each tile in shared memory, as soon as "multiply" has read the previous
    ones."""
    bias_layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    if DROPOUT:  # noqa: SIM102  (a constexpr, then a number that only a launch knows)
        if in_memory != 0:
            seed = gl.load(seed.to(gl.pointer_type(gl.int64)))
    n_tiles = gl.cdiv(n_tokens, BLOCK_T) * gl.cdiv(d_out, BLOCK_OUT)
    use = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        o_t, o_out = tile_origin(tile, n_tokens, d_out, BLOCK_T, BLOCK_OUT, GROUP)
        for o_r in range(0, R, BLOCK_R):
            mbarrier.wait(empty, (use & 1) ^ 1)
            store_parts(thin_buffers, thin, o_t, o_r, n_tokens, R, R)
            if TRANSPOSED:
                store_parts(factor_buffers, factor, o_out, o_r, d_out, R, stride_factor)
            else:
                store_parts(factor_buffers, factor, o_r, o_out, R, d_out, stride_factor)
            if o_r == 0:
                if HAS_BIAS:
                    i_bias = o_out + gl.arange(0, BLOCK_OUT, bias_layout)
                    bias_buffer.store(gl.load(bias + i_bias, mask=i_bias < d_out, other=0.0).to(gl.float32))
                if DROPOUT:
                    store_mask(mask_buffer, seed, drop_level, o_t, o_out)
            fence_async_shared()  # the tensor cores read shared memory asynchronously and see only fenced stores
            mbarrier.arrive(full, count=1)
            use += 1


# ---- multiply


@gluon.jit
def dropped(b_acc, mask_buffer):
    """Returns keep∘acc, in which a dropped NaN stays NaN."""
    BLOCK_T: gl.constexpr = b_acc.shape[0]
    GROUPS: gl.constexpr = b_acc.shape[1] // 8
    grouped = b_acc.reshape([BLOCK_T, GROUPS, 8])
    layout: gl.constexpr = grouped.type.layout
    bits = reinterpret(mask_buffer, gl.uint8, [BLOCK_T, GROUPS], mask_buffer.layout)
    b_bits = bits.load(gl.SliceLayout(2, layout)).to(gl.int32)
    i_bit = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    keep = ((b_bits[:, :, None] >> i_bit[None, None, :]) & 1) != 0
    kept = gl.where(keep, grouped, grouped * 0.0).reshape([BLOCK_T, GROUPS * 8])
    return gl.convert_layout(kept, b_acc.type.layout, assert_trivial=True)


@gluon.jit
def multiply(
    result, scaling, left_buffers, weight_buffers, thin_buffers, factor_buffers, bias_buffer, mask_buffer,
    result_buffer, full, empty, thin_full, thin_empty, n_tokens, d_out, d_in,
    R: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, DROPOUT: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_OUT: gl.constexpr, BLOCK_IN: gl.constexpr, BLOCK_R: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Computes each tile: thin product, scaling, mask, bias, then the products over d_in; rounds and stores it."""
    dtype: gl.constexpr = result.dtype
    THIN_PARTS: gl.constexpr = thin_buffers.shape[0]
    FACTOR_PARTS: gl.constexpr = factor_buffers.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_OUT, 16])
    n_tiles = gl.cdiv(n_tokens, BLOCK_T) * gl.cdiv(d_out, BLOCK_OUT)
    stage, phase, thin_use = 0, 0, 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        o_t, o_out = tile_origin(tile, n_tokens, d_out, BLOCK_T, BLOCK_OUT, GROUP)
        b_acc = gl.zeros([BLOCK_T, BLOCK_OUT], gl.float32, layout)
        for o_r in range(0, R, BLOCK_R):
            mbarrier.wait(thin_full, thin_use & 1)
            for i in gl.static_range(THIN_PARTS):
                for j in gl.static_range(FACTOR_PARTS):
                    if i + j < 2:  # the product of both low halves is below the rounding of the others
                        factor = factor_buffers.index(j)
                        if TRANSPOSED:
                            factor = factor.permute([1, 0])
                        b_acc = warpgroup_mma(thin_buffers.index(i), factor, b_acc)
            mbarrier.arrive(thin_empty, count=1, pred=o_r + BLOCK_R < R)
            thin_use += 1
        if TRANSPOSED:
            b_acc *= scaling
        if DROPOUT:
            b_acc = dropped(b_acc, mask_buffer)
        if HAS_BIAS:
            b_acc += bias_buffer.load(gl.SliceLayout(0, layout))[None, :]
        mbarrier.arrive(thin_empty, count=1)
        before = stage
        for o_in in range(0, d_in, BLOCK_IN):
            mbarrier.wait(full.index(stage), phase)
            weight = weight_buffers.index(stage)
            if TRANSPOSED:
                weight = weight.permute([1, 0])
            b_acc = warpgroup_mma(left_buffers.index(stage), weight, b_acc, is_async=True)
            b_acc = warpgroup_mma_wait(1, (b_acc,))  # leaves this product in flight, so the previous one is done
            mbarrier.arrive(empty.index(before), count=1, pred=o_in > 0)
            before = stage
            stage, phase = next_stage(stage, phase, STAGES)
        b_acc = warpgroup_mma_wait(0, (b_acc,))
        mbarrier.arrive(empty.index(before), count=1)
        halves = b_acc.reshape([BLOCK_T, 2, BLOCK_OUT // 2]).permute([0, 2, 1])
        low, high = gl.split(halves)
        store_result(result, result_buffer, low.to(dtype), o_t, o_out)
        store_result(result, result_buffer, high.to(dtype), o_t, o_out + BLOCK_OUT // 2)
    tma.store_wait(0)


@gluon.jit
def store_result(result, buffer, block, o_t, o_out):
    """Stores a block of the result by TMA, through the buffer."""
    tma.store_wait(0)  # the previous copy may still read the buffer
    buffer.store(block)
    fence_async_shared()
    copy_out(result, [o_t, o_out], buffer)


@gluon.jit(do_not_specialize=["seed", "in_memory", "drop_level", "n_tokens"])
def lora_gluon_linear_kernel(
    left, weight, result, bias, thin, factor,
    scaling, seed: gl.int64, in_memory: gl.int32, drop_level: gl.int32,
    n_tokens, d_out, d_in, stride_factor,
    R: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, DROPOUT: gl.constexpr,
    THIN_PARTS: gl.constexpr, FACTOR_PARTS: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_OUT: gl.constexpr,
    BLOCK_IN: gl.constexpr, BLOCK_R: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Allocates shared memory and barriers and starts the three partitions. If TRANSPOSED, weight is (d_out, d_in) and
    factor (d_out, r). left, weight and result are descriptors, and a block of result has BLOCK_OUT // 2 columns.
    THIN_PARTS and FACTOR_PARTS are 2 for an operand in bfloat16 halves, else 1."""
    dtype: gl.constexpr = left.dtype
    thin_dtype: gl.constexpr = dtype if THIN_PARTS == 1 else gl.bfloat16
    factor_dtype: gl.constexpr = dtype if FACTOR_PARTS == 1 else gl.bfloat16
    factor_shape: gl.constexpr = [BLOCK_OUT, BLOCK_R] if TRANSPOSED else [BLOCK_R, BLOCK_OUT]
    thin_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, BLOCK_R], thin_dtype)
    factor_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(factor_shape, factor_dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain_rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    left_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_IN], left.layout)
    weight_buffers = gl.allocate_shared_memory(dtype, [STAGES] + weight.block_type.shape, weight.layout)
    result_buffer = gl.allocate_shared_memory(dtype, result.block_type.shape, result.layout)
    thin_buffers = gl.allocate_shared_memory(thin_dtype, [THIN_PARTS, BLOCK_T, BLOCK_R], thin_layout)
    factor_buffers = gl.allocate_shared_memory(factor_dtype, [FACTOR_PARTS] + factor_shape, factor_layout)
    bias_buffer = gl.allocate_shared_memory(gl.float32, [BLOCK_OUT if HAS_BIAS else 1], plain)
    mask_shape: gl.constexpr = [BLOCK_T // MASK_ROWS, MASK_ROWS, BLOCK_OUT // 8] if DROPOUT else [1, 1, 1]
    mask_buffer = gl.allocate_shared_memory(gl.uint8, mask_shape, plain_rows)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    thin_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    thin_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(thin_full, count=1)
    mbarrier.init(thin_empty, count=1)
    gl.warp_specialize(
        [
            (multiply, (
                result, scaling, left_buffers, weight_buffers, thin_buffers, factor_buffers, bias_buffer, mask_buffer,
                result_buffer, full, empty, thin_full, thin_empty, n_tokens, d_out, d_in,
                R, TRANSPOSED, HAS_BIAS, DROPOUT, BLOCK_T, BLOCK_OUT, BLOCK_IN, BLOCK_R, GROUP, STAGES,
            )),
            (fetch, (
                left, weight, left_buffers, weight_buffers, full, empty, n_tokens, d_out, d_in,
                TRANSPOSED, BLOCK_T, BLOCK_OUT, BLOCK_IN, GROUP, STAGES,
            )),
            (prepare, (
                thin, factor, bias, seed, in_memory, drop_level, thin_buffers, factor_buffers, bias_buffer,
                mask_buffer, thin_full, thin_empty, n_tokens, d_out, stride_factor,
                R, TRANSPOSED, HAS_BIAS, DROPOUT, BLOCK_T, BLOCK_OUT, BLOCK_R, GROUP,
            )),
        ],
        [FETCHING_WARPS, PREPARING_WARPS],
        [FETCHING_REGISTERS, PREPARING_REGISTERS],
    )  # fmt: skip


_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def _matrix(tensor: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> Matrix:
    """Returns the description of a matrix whose blocks have the default layout in shared memory for ``dtype``."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
    rows, columns = tensor.shape
    return Matrix((rows, columns), (tensor.stride(0), tensor.stride(1)), block, layout)


class GluonGemm:
    """The strategy "gluon" for one signature. The interface is that of ``gemm.FusedGemm``.

    Raises:
        LaunchError: the GPU is not sm_90, or TMA cannot address the operands.
    """

    def __init__(self, left, weight, bias, factor, r: int, dropout: bool, transposed: bool, shape: tuple[int, ...]):
        (n_tokens, d_in), d_out, dtype = left.shape, shape[-1], left.dtype
        if not tiles.takes_gluon(left, weight, d_out):
            raise LaunchError(
                "lora_fast: strategy 'gluon': expected 16-bit matrices with rows of whole 16-byte pieces on an "
                f"sm_{tiles.GLUON_ARCH} GPU, got {dtype} with strides {left.stride()} and {weight.stride()} on "
                f"{tiles.limits(left.device).name}: choose another strategy (lora-fast tune)"
            )
        # As in ``primitives.dot_rounded``, a wide factor is split into halves, and beside float16 S or dS as well.
        wide = factor.dtype is not dtype
        factor_parts, thin_parts = 1 + wide, 1 + (wide and dtype is torch.float16)
        largest_r = max(16, tiles.gemm_rank(r) // factor_parts)  # fits in shared memory beside the pipeline
        n_tiles = triton.cdiv(n_tokens, BLOCK_T) * triton.cdiv(d_out, BLOCK_OUT)
        weight_block = (BLOCK_OUT, BLOCK_IN) if transposed else (BLOCK_IN, BLOCK_OUT)
        result = torch.empty(n_tokens, d_out, dtype=dtype, device="meta")
        self.empty = allocator(shape, dtype, left.device)
        self.launch = Launch(
            lora_gluon_linear_kernel, (min(n_tiles, tiles.programs(left.device)),),
            (n_tokens, d_out, d_in, factor.stride(0)),
            {
                "R": r, "TRANSPOSED": transposed, "HAS_BIAS": bias is not None, "DROPOUT": dropout,
                "THIN_PARTS": thin_parts, "FACTOR_PARTS": factor_parts,
                "BLOCK_T": BLOCK_T, "BLOCK_OUT": BLOCK_OUT, "BLOCK_IN": BLOCK_IN,
                "BLOCK_R": min(tiles.rank_block(r), largest_r), "GROUP": tiles.GROUP,
                "STAGES": STAGES, "num_warps": WARPS,
            },
            (
                _matrix(left, (BLOCK_T, BLOCK_IN), dtype),
                _matrix(weight, weight_block, dtype),
                _matrix(result, (BLOCK_T, BLOCK_OUT // 2), dtype),
            ),
        )  # fmt: skip

    def __call__(
        self, left, weight, bias, thin, factor, scaling: float, keep: DropoutMask | None, stream: int | None = None
    ):
        result = self.empty()
        tensors = left, weight, result, left if bias is None else bias, thin, factor
        self.launch.go(stream, tensors, (scaling, *(keep or NO_MASK)))
        return result
