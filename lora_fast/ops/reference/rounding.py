"""Plain-torch twins of the kernels' random numbers, bit for bit, and of stochastic rounding.

Philox 4x32-7 (Salmon et al., SC 2011) with a 64-bit key and a counter of four words. Its four words are eight 16-bit
numbers, low half first, one for each of eight neighbours in a row: the counter is (row, column // 8, word2, word3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.limits import PHILOX_ROUNDS, UPDATE

LOW = 0xFFFFFFFF


def noise(
    key: int | Tensor,
    rows: int,
    columns: int,
    word2: int | Tensor = 0,
    word3: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns a 16-bit number for each element, int64 (…, rows, columns). ``key`` and ``word2`` are numbers, or int64
    tensors (…) on the device."""
    key, word2, last = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (key, word2, word3))
    key, word2 = key[..., None, None], word2[..., None, None] & LOW
    row, group = (torch.arange(n, dtype=torch.int64, device=device) for n in (rows, -(-columns // 8)))
    words = list(torch.broadcast_tensors(row[:, None], group, word2, last, key)[:4])
    key0, key1 = key & LOW, (key >> 32) & LOW
    for _ in range(PHILOX_ROUNDS):
        (high0, low0), (high2, low2) = _multiply(0xD2511F53, words[0]), _multiply(0xCD9E8D57, words[2])
        words = [high2 ^ words[1] ^ key0, low2, high0 ^ words[3] ^ key1, low0]
        key0, key1 = (key0 + 0x9E3779B9) & LOW, (key1 + 0xBB67AE85) & LOW
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    return halves.flatten(-2)[..., :columns]


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the high and low 32 bits of constant · word. The product wraps in int64, which changes neither."""
    product = word * constant
    return (product >> 32) & LOW, product & LOW


def round_stochastic(x: Tensor, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 to float16 or bfloat16, up or down with the probability that makes the expectation exact.

    The 16-bit numbers are added to the bits that the cast drops. Below float16's normal range the spacing is constant,
    and adding a uniform number before a floor has the same effect. Values that are not finite are not changed.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13  # bits of float32's mantissa beyond that of dtype
    numbers = (numbers & ((1 << dropped) - 1)).to(torch.int32)
    rounded = ((x.contiguous().view(torch.int32) + numbers) & -(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        small = torch.floor(x * 2.0**24 + numbers * 2.0**-dropped) * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, small, rounded)
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)


def round_factors(
    x: Tensor, dtype: torch.dtype, keys: Tensor | None, steps: Tensor, is_a: bool | None, word3: int = UPDATE
) -> Tensor:
    """Rounds new factors in float32, (L, r, d) if ``is_a``, else (L, d, r), as a step does.

    Args:
        x: the factors. With ``is_a`` None, each counts as a flat row of numbers, as for AdamW alone.
        dtype: the dtype of the parameters.
        keys: int64 (L,), the factors' keys, with which 16-bit results are rounded stochastically. None rounds to
            nearest.
        steps: (L,), the number of each factor's step.
        word3: the pass of the step, ``UPDATE`` or ``CORRECTION``.
    """
    if keys is None or dtype.itemsize != 2:
        return x.to(dtype)
    steps = steps.to(torch.int64)
    if is_a is None:
        numbers = noise(keys, 1, x[0].numel(), steps, word3, x.device).view(x.shape)
    else:
        d, r = x.shape[:0:-1] if is_a else x.shape[1:]
        numbers = noise(keys, d, r, steps, word3, x.device)
        numbers = numbers.mT if is_a else numbers
    return round_stochastic(x, numbers, dtype)
