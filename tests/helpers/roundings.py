"""The roundings of an optimizer step, spelled out in float64 and in integers: which neighbour of the exact result a
16-bit factor becomes. Nothing here comes from the library; the random numbers are held to Random123's known answers."""

import zlib

import numpy
import torch

MANTISSA = {torch.bfloat16: 7, torch.float16: 10}  # stored bits
LEAST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14}  # of the smallest normal number
DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32's mantissa that the dtype lacks
UPDATE, CORRECTION = 0, 1  # passes of a step
LOW = numpy.uint64(0xFFFFFFFF)
HALF = numpy.uint64(32)


def philox(counter, key, rounds=7):
    """Returns the four words of Philox 4x32 (Salmon et al., SC 2011, section 3.3): uint64 arrays of 32-bit values."""
    x0, x1, x2, x3 = numpy.broadcast_arrays(*(numpy.asarray(word, dtype=numpy.uint64) for word in counter))
    k0, k1 = (int(word) for word in key)
    for _ in range(rounds):
        product0, product2 = numpy.uint64(0xD2511F53) * x0, numpy.uint64(0xCD9E8D57) * x2
        x0, x1 = (product2 >> HALF) ^ x1 ^ numpy.uint64(k0), product2 & LOW
        x2, x3 = (product0 >> HALF) ^ x3 ^ numpy.uint64(k1), product0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def noise(key, rows, columns, word2=0, word3=0):
    """Returns the 16-bit number of each element, int64 (rows, columns). Eight neighbours of a row share a counter; each
    word has two numbers, the low half first."""
    row, column = numpy.arange(rows)[:, None], numpy.arange(columns)
    words = numpy.stack(philox((row, column // 8, word2, word3), (key % 2**32, key >> 32)))
    chosen = numpy.take_along_axis(words, numpy.broadcast_to(column % 8 // 2, (1, rows, columns)), 0)[0]
    number = (chosen >> (16 * (column % 2)).astype(numpy.uint64)) & numpy.uint64(0xFFFF)
    return torch.from_numpy(number.astype(numpy.int64))


def factor_noise(name, shape, step, word3=UPDATE, flat=False):
    """Returns the numbers of the factor "<pair>.lora_A" (r, d) or "<pair>.lora_B" (d, r). ``flat``: of AdamW alone, for
    which a factor is one row."""
    key = zlib.crc32(name.encode())
    if flat:
        return noise(key, 1, shape.numel(), step, word3).view(shape)
    return noise(key, *shape[::-1], step, word3).T if name.endswith("lora_A") else noise(key, *shape, step, word3)


def spacing(x, dtype):
    """Returns the distance of neighbours of ``dtype`` at x, in float64."""
    exponent = torch.frexp(x.abs())[1].double() - 1
    return torch.exp2(exponent.clamp(min=LEAST_EXPONENT[dtype]) - MANTISSA[dtype])


def to_nearest(x, dtype):
    """Returns float64 x rounded to the nearest number of ``dtype``, ties to even, in float64. x is in range."""
    unit = spacing(x, dtype)
    return torch.round(x / unit) * unit


def to_neighbour(x, dtype, numbers):
    """Returns float64 x rounded by 16-bit numbers n, in float64: the magnitude up if its part below a unit of ``dtype``
    plus n / 2^16 is at least 1. float16 uses the 13 low bits of n, and below its normal range moves x itself, not the
    magnitude, up."""
    unit, share = spacing(x, dtype), (numbers % 2 ** DROPPED[dtype]).double() / 2 ** DROPPED[dtype]
    rounded = torch.floor(x.abs() / unit + share) * unit * x.sign()
    if dtype == torch.float16:
        rounded = torch.where(x.abs() < 2.0**-14, torch.floor(x / unit + share) * unit, rounded)
    return rounded


def check_rounded(got, exact, error, numbers=None):
    """Checks a 16-bit tensor against the exact float64 result of which float32's ``error`` is known: each entry is the
    result rounded. Where exact − error and exact + error round to different numbers, either is right.

    Returns:
        how many entries that leaves open, and how many there are.
    """
    rounded = (lambda x: to_nearest(x, got.dtype)) if numbers is None else lambda x: to_neighbour(x, got.dtype, numbers)
    low, high, got = rounded(exact - error), rounded(exact + error), got.double()
    wrong = ~((low <= got) & (got <= high))
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.numel()} entries; the first: {got[wrong][0].item()!r}, expected "
        f"{low[wrong][0].item()!r} … {high[wrong][0].item()!r} for {exact[wrong][0].item()!r}"
    )
    return int((low != high).sum()), got.numel()
