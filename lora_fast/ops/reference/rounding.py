"""Plain-torch twins of the kernels' random numbers, bit for bit, and of stochastic rounding.

Philox 4x32-7 (Salmon et al., SC 2011) with a 64-bit key and a counter of four words. Its four words are eight 16-bit
numbers, low half first, one for each of eight neighbours in a row: the counter is (row, column // 8, word2, word3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.limits import PHILOX_ROUNDS, UPDATE

LOW = 0xFFFFFFFF
CACHED = 1 << 17  # elements that are rounded together on a CPU, so that they stay in its cache


def noise(
    key: int | Tensor,
    rows: int,
    columns: int,
    word2: int | Tensor = 0,
    word3: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns a 16-bit number for each element, int32 (…, rows, columns). ``key`` and ``word2`` are numbers, or int64
    tensors (…) on the device."""
    keys, steps = (torch.as_tensor(x, dtype=torch.int64, device=device)[..., None, None] for x in (key, word2))
    row, group = (torch.arange(n, dtype=torch.int64, device=device) for n in (rows, -(-columns // 8)))
    # In each round two words are multiplied. A product wraps in int64, which changes neither of its halves.
    word0, word1, middle, _ = torch.broadcast_tensors(row[:, None], group, steps & LOW, keys)
    key0, key1, last = keys & LOW, (keys >> 32) & LOW, torch.full_like(word0, word3)
    for _ in range(PHILOX_ROUNDS):
        product0, product2 = word0 * 0xD2511F53, middle * 0xCD9E8D57
        word0 = ((product2 >> 32).bitwise_and_(LOW)).bitwise_xor_(word1).bitwise_xor_(key0)
        middle = ((product0 >> 32).bitwise_and_(LOW)).bitwise_xor_(last).bitwise_xor_(key1)
        word1, last = product2.bitwise_and_(LOW), product0.bitwise_and_(LOW)
        key0, key1 = (key0 + 0x9E3779B9) & LOW, (key1 + 0xBB67AE85) & LOW
    words = torch.stack([word.to(torch.int32) for word in (word0, word1, middle, last)], -1)
    return words.view(torch.int16).flatten(-2)[..., :columns].to(torch.int32) & 0xFFFF  # a word's low half is first


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


def scaled_to(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x · scale in ``dtype``, x's own or float32 for it. Where that has 16 bits, a finite value does not become
    infinite: it is the largest number at most."""
    scaled = x * scale
    if dtype.itemsize == 2:
        largest = torch.finfo(dtype).max
        scaled = torch.where(x.isfinite(), scaled.clamp(-largest, largest), scaled)
    return scaled.to(dtype)


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
    size = len(x) if x.is_cuda else max(1, CACHED // max(1, x[0].numel()))
    parts = zip(*(tensor.split(size) for tensor in (x, keys, steps.to(torch.int64))), strict=True)
    rounded = []
    for part, part_keys, part_steps in parts:
        if is_a is None:
            numbers = noise(part_keys, 1, x[0].numel(), part_steps, word3, x.device).view(part.shape)
        else:
            d, r = x.shape[:0:-1] if is_a else x.shape[1:]
            numbers = noise(part_keys, d, r, part_steps, word3, x.device)
            numbers = numbers.mT if is_a else numbers
        rounded.append(round_stochastic(part, numbers, dtype))
    return torch.cat(rounded)
