"""The dropout mask of compiled layers: a hash of the element's number, in plain torch ops that a compiler fuses into
the loops that read the mask, so that it is never stored.

The hash is that of a counter with two 32-bit keys: Wellons' ``lowbias32`` (nullprogram.com/blog/2018/07/31), with one
key added to the counter and the other one xored in between its rounds, without the last shift, which changes only low
bits. A product of int32 wraps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # lowbias32's multipliers as int32
_LOWEST = -(1 << 31)


def hashed_mask(keys: Tensor, n_tokens: int, d_in: int, level: int) -> Tensor:
    """Returns the mask of two keys, int32 (2,), as a bool (n_tokens, d_in). An element is dropped with probability
    level / 65536."""
    number = torch.arange(n_tokens * d_in, dtype=torch.int32, device=keys.device).view(n_tokens, d_in)
    number = number + keys[0]
    number = (number ^ ((number >> 16) & 0xFFFF)) * _FIRST
    number = (number ^ ((number >> 15) & 0x1FFFF) ^ keys[1]) * _SECOND
    return number > max(_LOWEST, _LOWEST + (level << 16) - 1)
