"""Times on a device: marks in a stream, the parts of a training step, medians and percentiles."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from .machine import _process_bytes


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
        return cls(statistics.median(values), fifths[0], fifths[3])


class Clock:
    """Marks in time: events on the stream where there is one, so that the host may run ahead as it does in training."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append(event if self._cuda else time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        """Between one mark and the next, once the device has passed them all."""
        if self._cuda:
            torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return tuple(a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairs)


class Stopwatch:
    """Times one training step and the optimizer's part of it, and takes the memory figure that its device offers.

    On CUDA the host waits for the device before and after the step, and events on the stream time the optimizer; memory
    is the allocator's peak within the step. On a CPU memory is the resident size of the whole process after the step.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.memory_kind = "peak allocated on the GPU within the step" if self._cuda else "process size after the step"

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def optimizer_starts(self) -> None:
        self._optimizer_started = self._mark()

    def optimizer_ends(self) -> None:
        self._optimizer_ended = self._mark()

    def stop(self) -> tuple[float, float, int]:
        """Seconds of the step, of the optimizer, and bytes."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        if self._cuda:
            milliseconds = self._optimizer_started.elapsed_time(self._optimizer_ended)
            return seconds, milliseconds / 1e3, torch.cuda.max_memory_allocated()
        return seconds, self._optimizer_ended - self._optimizer_started, _process_bytes()

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
