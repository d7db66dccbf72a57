"""Measures the ceilings of a device, and computes from them the least time that an op can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .clock import Clock, keep_busy

REPEATS = 8  # the fastest run counts: a ceiling is what the device can reach
GEMM_SIDE = {"cuda": 8192, "cpu": 1536}
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # several times the caches
SMALL_SIDE, SMALL_BYTES = 256, 1 << 20
HEAD_START = 0.3e-3  # seconds in which the host enqueues a run


class Cost(NamedTuple):
    """The least that any implementation must do: bytes of every operand once, and floating-point operations."""

    bytes: float
    operations: int


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of a device: operations a second of a square GEMM in ``dtype``, and bytes a second (read plus
    written) of a copy."""

    dtype: str
    operations: float
    bandwidth: float

    def least_seconds(self, cost: Cost) -> float:
        """Returns the least possible time: all operations at the one ceiling, or all bytes at the other."""
        return max(cost.operations / self.operations, cost.bytes / self.bandwidth)


def measure_ceilings(device: torch.device, dtype: str, small: bool = False) -> Ceilings:
    """Times a GEMM in ``dtype`` and a copy. ``small``: operands so small that it takes milliseconds, for a dry run."""
    side = SMALL_SIDE if small else GEMM_SIDE[device.type]
    size = SMALL_BYTES if small else COPIED_BYTES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gemm = _least_seconds(lambda: torch.mm(left, right), device)
    copy = _least_seconds(lambda: target.copy_(source), device)
    return Ceilings(dtype, 2 * side**3 / gemm, 2 * size / copy)


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    times: list[float] = []
    for _ in range(REPEATS):
        keep_busy(device, HEAD_START)
        clock = Clock(device)
        call()
        clock.mark()
        times += clock.seconds()
    return min(times)


def layer_cost(n_tokens: int, d_in: int, d_out: int, r: int, element: int, weight: float, adapter: int) -> Cost:
    """Returns the cost of a LoRA layer's forward and backward pass, every operand once a pass.

    Forward reads x and W and writes y; backward reads dy and W and writes dx. For the adapter, backward reads x again,
    both passes read a and b, and backward writes their gradients.

    Args:
        r: rank; 0 for the frozen linear layer alone.
        element, weight, adapter: bytes of one element of activations, of W, and of a and b.
    """
    operations = 4 * n_tokens * d_in * d_out + 6 * n_tokens * r * (d_in + d_out)
    activations = n_tokens * (2 * d_in + 2 * d_out + (d_in if r else 0))
    size = element * activations + 2 * weight * d_in * d_out + adapter * 3 * r * (d_in + d_out)
    return Cost(bytes=size, operations=operations)
