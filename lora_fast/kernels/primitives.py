"""Small jit helpers shared by the kernels. Workarounds for Triton's interpreter are in this file only.

The interpreter stores bfloat16 as bit patterns: arithmetic and ``tl.dot`` on them give undefined results, and its cast
to bfloat16 truncates. The kernels therefore use ``dot``, ``drop`` and ``round_to``.
"""

import triton
import triton.language as tl

from . import limits

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
PHILOX_ROUNDS = tl.constexpr(limits.PHILOX_ROUNDS)


@triton.jit
def dot(lhs, rhs, acc, PRECISION: tl.constexpr):
    """Returns acc + lhs @ rhs, accumulated in acc's dtype: float32, or float64 if both operands are float64."""
    if INTERPRET:
        lhs = lhs.to(acc.dtype)
        rhs = rhs.to(acc.dtype)
    return tl.dot(lhs, rhs, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def keep_ieee(block):
    """Returns the matrix unchanged, but hides its origin from the compiler so that a dot keeps full precision.

    Triton (3.7) traces operands of a dot back through casts, sums and selections to the dtypes that were loaded. If one
    of them has 16 bits, it multiplies float32 operands in TF32 on sm_100 even with "ieee", and fails on float64
    operands. It does not trace through a reduction, so a sum of one term stops it.
    """
    return tl.sum(block[:, :, None], 2)


@triton.jit
def to_float32(block):
    """Returns the matrix in float32, safe for a dot in full precision."""
    wide = block.to(tl.float32)
    if block.dtype != tl.float32:
        wide = keep_ieee(wide)
    return wide


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Returns a float32 block rounded to ``dtype``: to nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # the last kept bit breaks ties
        rounded = tl.where(value == value, rounded, 0x7FC0)  # the sum above may turn a NaN into an infinity
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def scaled_to(value, scale, dtype: tl.constexpr):
    """Returns value · scale in float32, rounded to ``dtype``, a 16-bit value's own. A finite value does not become
    infinite: it is the largest number at most."""
    LARGEST: tl.constexpr = 65504.0 if dtype == tl.float16 else 3.3895313892515355e38
    scaled = value * scale
    if dtype != tl.float32:
        finite = tl.abs(value) < float("inf")  # false for a NaN, too
        scaled = tl.where(finite, tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST), scaled)
        scaled = round_to(scaled, dtype).to(tl.float32)
    return scaled


@triton.jit
def halves(value):
    """Splits value into bfloat16 high and low. high + low equals value within 2⁻¹⁷ · |value|, and exactly for a
    float16 value."""
    wide = value.to(tl.float32)
    high = round_to(wide, tl.bfloat16)
    low = round_to(wide - high.to(tl.float32), tl.bfloat16)
    return high, low


@triton.jit
def dot_wide(tall, thin, acc, PRECISION: tl.constexpr):
    """Returns acc + tall @ thin in thin's precision. tall holds activations or their gradients; thin is a factor, S or
    dS, in the same dtype or another.

    If tall has 16 bits and thin is float32, thin goes through the tensor cores as two bfloat16 halves. Float16 halves
    would underflow below 1e-7 and overflow above 65,504. A bfloat16 tall is used as it is; a float16 tall is also split
    into two bfloat16 halves, which is exact.
    """
    if tall.dtype == thin.dtype:
        acc = dot(tall, thin, acc, PRECISION)
    elif tall.dtype == tl.float32:
        acc = dot(tall, to_float32(thin), acc, PRECISION)
    elif tall.dtype == tl.bfloat16:
        high, low = halves(thin)
        acc = dot(tall, low, acc, PRECISION)  # small terms first: they lose less to rounding
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
    """Returns acc + thin @ factor for a result that is rounded to ``dtype``. thin is S or dS. Operands may have any
    dtype.

    For a bfloat16 result thin is rounded, because each token's error is independent and small beside the rounding of
    the result. The factor is not rounded, because its error would be the same for all tokens. For a float16 result
    neither is rounded to float16, whose range of exponents is too small.
    """
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
    """Returns value where keep is true and value · 0 elsewhere, so that a dropped NaN stays NaN."""
    if INTERPRET:
        zero = round_to(value.to(tl.float32) * 0.0, value.dtype)
    else:
        zero = value * 0.0
    return tl.where(keep, value, zero)


@triton.jit
def take_column(b_matrix, i_col, j):
    """Returns column j of a block, [rows]. It is a masked sum because Triton cannot index a block."""
    return tl.sum(tl.where(i_col[None, :] == j, b_matrix, 0.0), 1)


@triton.jit
def take_row(b_matrix, i_row, j):
    """Returns row j of a block, [columns]."""
    return tl.sum(tl.where(i_row[:, None] == j, b_matrix, 0.0), 0)


@triton.jit
def div_rn(block, scalar):
    """Returns block / scalar, correctly rounded (plain ``/`` is an approximation on a GPU)."""
    return tl.div_rn(block, tl.zeros_like(block) + scalar)


@triton.jit
def keep_mask(seed, in_memory, drop_level, i_t, o_col, BLOCK_COL: tl.constexpr):
    """Returns the dropout mask of tokens ``i_t`` [BLOCK_T] and columns ``o_col`` … ``o_col + BLOCK_COL`` (multiples of
    8): bool [BLOCK_T, BLOCK_COL]. If ``in_memory`` is 0, ``seed`` is the seed itself (a plain seed), otherwise the
    address of an int64 seed. Both kinds of seed run the same compiled kernel. After a warm-up with plain seeds, a graph
    capture therefore loads no new module.

    Philox 4x32-7 (Salmon et al., SC 2011) with key = seed and counter = (token, column // 8, 0, 0). One call gives
    eight 16-bit numbers, one for each of eight neighbouring columns, so a thread that holds these columns calls it
    once.
    """
    seed = seed.to(tl.int64)  # the interpreter passes small integers as 32 bits
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
    # Each join adds a last dimension of size 2. Together they have the shape [..., word // 2, word % 2, half], so the
    # reshape puts half h (0 is the low one) of word w into column 2 w + h of its group of eight.
    return tl.reshape(tl.join(low, high), [i_t.shape[0], BLOCK_COL])


@triton.jit
def noise(key, i_row, o_col, word2, word3, BLOCK_COL: tl.constexpr):
    """Draws a 16-bit number for each element of rows ``i_row`` and columns ``o_col`` … ``o_col + BLOCK_COL`` (multiples
    of 8): int32 [rows, BLOCK_COL]. It depends on the key, the element and the two words alone. One Philox call serves
    eight neighbours, as in ``keep_mask``. Twin: ``reference.rounding.noise``."""
    i_group = o_col // 8 + tl.arange(0, BLOCK_COL // 8)
    zero = tl.zeros([i_row.shape[0], BLOCK_COL // 8], dtype=tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        key, zero + i_row.to(tl.uint32)[:, None], zero + i_group.to(tl.uint32)[None, :],
        zero + word2.to(tl.uint32), zero + word3, PHILOX_ROUNDS,
    )  # fmt: skip
    low = tl.join(tl.join(word0 & 0xFFFF, word2 & 0xFFFF), tl.join(word1 & 0xFFFF, word3 & 0xFFFF))
    high = tl.join(tl.join(word0 >> 16, word2 >> 16), tl.join(word1 >> 16, word3 >> 16))
    return tl.reshape(tl.join(low, high), [i_row.shape[0], BLOCK_COL]).to(tl.int32)


@triton.jit
def round_stochastic(value, b_noise, dtype: tl.constexpr):
    """Returns a float32 block rounded to bfloat16 or float16, up or down with the probability that makes the
    expectation exact. The noise is added to the bits that the cast drops. Below float16's normal range, where the
    spacing is fixed, a floor has the same effect. A value that is not finite stays as it is. Twin:
    ``reference.rounding.round_stochastic``."""
    bits = value.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:
        # bfloat16 drops the low 16 bits of a float32; float16 drops 13 (mask 8191) of a normal number.
        rounded = ((bits + b_noise) & -65536).to(tl.float32, bitcast=True)
    else:
        b_noise = b_noise & 8191
        rounded = ((bits + b_noise) & -8192).to(tl.float32, bitcast=True)
        # float16's subnormal numbers are multiples of 2^-24.
        small = tl.floor(value * 16777216.0 + b_noise.to(tl.float32) * (1.0 / 8192)) * (1.0 / 16777216)
        rounded = tl.where(tl.abs(value) < 6.103515625e-05, small, rounded)  # 2^-14, the smallest normal number
    return round_to(tl.where(tl.abs(value) < float("inf"), rounded, value), dtype)
