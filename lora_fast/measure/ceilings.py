"""The device's own ceilings, measured, and how close a layer comes to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .clock import Clock

REPEATS = 8  # the best one counts: a ceiling
GEMM_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # several times the caches


@dataclass(frozen=True)
class Ceilings:
    """Operations a second of one square GEMM, bytes a second (read and written) of one copy."""

    operations: float
    bytes: float

    def least_seconds(self, work: Cost) -> float:
        """No faster: all operations at the one ceiling, or all bytes at the other."""
        return max(work.operations / self.operations, work.bytes / self.bytes)


@dataclass(frozen=True)
class Cost:
    """What one forward and backward pass has to do at least."""

    operations: int
    bytes: int


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    side, size = GEMM_SIDE[device.type], COPY_BYTES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    gemm = _best(lambda: torch.mm(left, right, out=product), device)
    copy = _best(lambda: target.copy_(source), device)
    return Ceilings(2 * side**3 / gemm, 2 * size / copy)


def _best(call, device: torch.device) -> float:
    call()
    clock = Clock(device)
    for _ in range(REPEATS):
        call()
        clock.mark()
    return min(clock.seconds())


def layer_cost(n_tokens: int, d_in: int, d_out: int, r: int, element: int, adapter: int) -> Cost:
    """Of a LoRA layer, every operand once a pass; r = 0: of its frozen linear. ``element``, ``adapter``: bytes of one.

    Forward reads x and W and writes y; backward reads dy and W and writes dx; of the adapter it reads x again, a and b
    in both passes, and writes their gradients.
    """
    operations = 4 * n_tokens * d_in * d_out + 6 * n_tokens * r * (d_in + d_out)
    activations = n_tokens * (2 * d_in + 2 * d_out + (d_in if r else 0))
    return Cost(operations, element * (activations + 2 * d_in * d_out) + adapter * 3 * r * (d_in + d_out))
