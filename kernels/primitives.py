"""Small jit helpers shared by the kernels, and the one place that knows Triton's interpreter.

The interpreter holds bfloat16 as bit patterns: its arithmetic and ``tl.dot`` on them give garbage and its cast to
bfloat16 truncates. ``dot``, ``drop`` and ``round_to`` are what the kernels use instead.
"""

import triton
import triton.language as tl

from . import limits

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
PHILOX_ROUNDS = tl.constexpr(limits.PHILOX_ROUNDS)


@triton.jit
def dot(lhs, rhs, acc, PRECISION: tl.constexpr):
    """acc + lhs @ rhs, accumulated in acc's dtype: float32, or float64 as both operands are."""
    if INTERPRET:
        lhs = lhs.to(acc.dtype)
        rhs = rhs.to(acc.dtype)
    return tl.dot(lhs, rhs, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def keep_ieee(block):
    """The same matrix, for a dot in full precision. Triton (3.7) looks through casts, sums and selections for dtypes
    that were loaded: with 16 bits among them it multiplies float32 operands in TF32 on sm_100, "ieee" or not, and
    breaks on float64 ones. It does not look through a reduction, here of one term."""
    return tl.sum(block[:, :, None], 2)


@triton.jit
def to_float32(block):
    """A matrix in float32, for a dot in full precision."""
    wide = block.to(tl.float32)
    if block.dtype != tl.float32:
        wide = keep_ieee(wide)
    return wide


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """A float32 block in ``dtype``, to nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def halves(value):
    """high and low, both bfloat16, whose sum is value to 2⁻¹⁷ of it; every float16 is such a sum exactly."""
    wide = value.to(tl.float32)
    high = round_to(wide, tl.bfloat16)
    low = round_to(wide - high.to(tl.float32), tl.bfloat16)
    return high, low


@triton.jit
def dot_wide(tall, thin, acc, PRECISION: tl.constexpr):
    """acc + tall @ thin with thin's own precision: tall are activations or their gradients, thin is a factor, S or dS,
    in tall's dtype or another. Beside 16-bit activations a float32 thin goes through the tensor cores as two bfloat16
    halves, whatever its size: float16 halves would vanish below 1e-7 and overflow above 65,504. bfloat16 activations
    are exact as they are; float16 ones are two halves themselves."""
    if tall.dtype == thin.dtype:
        acc = dot(tall, thin, acc, PRECISION)
    elif tall.dtype == tl.float32:
        acc = dot(tall, to_float32(thin), acc, PRECISION)
    elif tall.dtype == tl.bfloat16:
        high, low = halves(thin)
        acc = dot(tall, low, acc, PRECISION)
        acc = dot(tall, high, acc, PRECISION)
    else:
        high, low = halves(thin)
        tall_high, tall_low = halves(tall)
        acc = dot(tall_low, low, acc, PRECISION)
        acc = dot(tall_low, high, acc, PRECISION)
        acc = dot(tall_high, low, acc, PRECISION)
        acc = dot(tall_high, high, acc, PRECISION)
    return acc


@triton.jit
def dot_rounded(thin, factor, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """acc + thin @ factor for a result that is rounded to ``dtype``, of S or dS and a factor in any dtypes. In bfloat16
    thin is rounded, a token's own small error beside that of the result; the factor, whose error would be the same for
    all tokens, is not. float16 has too few exponents for either."""
    if thin.dtype == dtype and factor.dtype == dtype:
        acc = dot(thin, factor, acc, PRECISION)
    elif dtype == tl.float32:
        acc = dot(to_float32(thin), to_float32(factor), acc, PRECISION)
    elif dtype == tl.bfloat16:
        acc = dot_wide(round_to(thin.to(tl.float32), dtype), factor, acc, PRECISION)
    else:
        high, low = halves(thin)
        acc = dot(low, round_to(factor.to(tl.float32), tl.bfloat16), acc, PRECISION)
        acc = dot_wide(high, factor.to(tl.float32), acc, PRECISION)
    return acc


@triton.jit
def drop(value, keep):
    """value where kept, value · 0 elsewhere: a NaN stays a NaN."""
    if INTERPRET:
        zero = round_to(value.to(tl.float32) * 0.0, value.dtype)
    else:
        zero = value * 0.0
    return tl.where(keep, value, zero)


@triton.jit
def take_column(b_matrix, i_col, j):
    """Column j of a block, by a sum of one term: [rows]."""
    return tl.sum(tl.where(i_col[None, :] == j, b_matrix, 0.0), 1)


@triton.jit
def take_row(b_matrix, i_row, j):
    """Row j of a block, by a sum of one term: [columns]."""
    return tl.sum(tl.where(i_row[:, None] == j, b_matrix, 0.0), 0)


@triton.jit
def div_rn(block, scalar):
    """block / scalar, correctly rounded."""
    return tl.div_rn(block, tl.zeros_like(block) + scalar)


@triton.jit
def keep_mask(seed, in_memory, drop_level, i_t, o_col, BLOCK_COL: tl.constexpr):
    """The dropout mask of tokens ``i_t`` [BLOCK_T] and columns ``o_col`` … ``o_col + BLOCK_COL`` (multiples of 8):
    bool [BLOCK_T, BLOCK_COL]. With ``in_memory`` not 0, ``seed`` is the address of the int64 seed: one compiled kernel
    serves both, so that a graph captured after a warm-up without one loads no module.

    Philox 4x32-7 (Salmon et al., SC 2011), key = seed, counter = (token, column // 8, 0, 0): one call gives eight
    16-bit numbers, one for each of eight neighbouring columns, so a thread that holds eight of them needs no other.
    """
    seed = seed.to(tl.int64)  # in the interpreter a small one is 32 bits wide
    seed = tl.load(seed.to(tl.pointer_type(tl.int64)), mask=in_memory != 0, other=seed)
    i_group = o_col // 8 + tl.arange(0, BLOCK_COL // 8)
    zero = tl.zeros([i_t.shape[0], BLOCK_COL // 8], dtype=tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed, zero + i_t.to(tl.uint32)[:, None], zero + i_group.to(tl.uint32)[None, :], zero, zero, PHILOX_ROUNDS
    )
    level = drop_level.to(tl.uint32)
    low = tl.join(
        tl.join((word0 & 0xFFFF) >= level, (word2 & 0xFFFF) >= level),
        tl.join((word1 & 0xFFFF) >= level, (word3 & 0xFFFF) >= level),
    )
    high = tl.join(
        tl.join((word0 >> 16) >= level, (word2 >> 16) >= level),
        tl.join((word1 >> 16) >= level, (word3 >> 16) >= level),
    )
    return tl.reshape(tl.join(low, high), [i_t.shape[0], BLOCK_COL])  # [..., word // 2, word % 2, half]
