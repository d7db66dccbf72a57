"""Measures time: marks on a device, spreads of repeated measurements, and interleaved rounds.

Implementations that are compared run in turns: one call of each in a round, and another one first in each round. The
speed of a machine drifts, and this way the drift affects all of them alike.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .machine import process_bytes

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Mark = float | torch.cuda.Event

FLUSHED_BYTES = 1 << 28  # several times the L2 cache of any GPU


@dataclass(frozen=True)
class Spread:
    """The median, the 20th and the 80th percentile of some values."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Computes the spread; a single value is its own percentiles."""
        fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [*values] * 4
        return cls(statistics.median(values), fifths[0], fifths[3])

    @property
    def percentiles(self) -> tuple[float, float, float]:
        """p20, median, p80."""
        return self.p20, self.median, self.p80


# ---- Marks


def mark(device: torch.device) -> Mark:
    """Marks a moment: an event in the stream on CUDA, so that the host may run ahead, else the time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Returns the seconds between two marks that the device has passed."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def wait(device: torch.device) -> None:
    """Waits until the device has finished all work it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """A series of marks on one device; the first one is set on construction."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks = [mark(device)]

    def mark(self) -> None:
        self._marks.append(mark(self._device))

    def seconds(self) -> tuple[float, ...]:
        """Waits for the device and returns the seconds between consecutive marks."""
        wait(self._device)
        return tuple(map(seconds_between, self._marks, self._marks[1:]))


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Returns the wall time of one call; the device is idle before it and has finished after it."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


class Stopwatch:
    """Times one training step and the optimizer's part of it, and reads the memory figure that the device offers.

    On CUDA the host waits for the device before and after the step, events in the stream time the optimizer, and memory
    is the allocator's peak within the step. On a CPU memory is the resident size of the whole process after the step.
    """

    def __init__(self, device: torch.device):
        self._device, self._cuda = device, device.type == "cuda"
        self.memory_kind = "peak allocated on the GPU within the step" if self._cuda else "process size after the step"

    def start(self) -> None:
        wait(self._device)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._started = time.perf_counter()

    def optimizer_starts(self) -> None:
        self._optimizer_started = mark(self._device)

    def optimizer_ends(self) -> None:
        self._optimizer_ended = mark(self._device)

    def stop(self) -> tuple[float, float, int]:
        """Returns the seconds of the step, the seconds of the optimizer, and bytes."""
        wait(self._device)
        seconds = time.perf_counter() - self._started
        optimizer_seconds = seconds_between(self._optimizer_started, self._optimizer_ended)
        memory = torch.cuda.max_memory_allocated(self._device) if self._cuda else process_bytes()
        return seconds, optimizer_seconds, memory


# ---- Turns


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """Returns the items in the order of one round: each round starts one place later than the round before."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def turns(items: Sequence[T], rounds: int, warm_up: int = 1) -> Iterator[tuple[int, T]]:
    """Yields (round, item), every item once a round, in rotated order. Rounds below 0 warm up and do not count."""
    for turn in range(-warm_up, rounds):
        for item in rotated(items, turn):
            yield turn, item


def host_microseconds(
    steps: Mapping[K, tuple[Callable[[int], None], Callable[[], object]]], rounds: int, warm_up: int, calls: int = 1
) -> dict[K, float]:
    """Returns the lower quartile of each step's CPU time on this thread, µs a call.

    The time is the thread's own and the quartile is the lower one, because other processes and the caches only ever
    add to it. Garbage is collected between the rounds, never within a step.

    Args:
        steps: name → (prepare, step). ``prepare`` is called with the round before the step and is not timed.
        calls: how often a step runs in one round.
    """
    microseconds: dict[K, list[float]] = {name: [] for name in steps}
    gc.disable()
    try:
        for turn in range(warm_up + rounds):
            for name, (prepare, step) in steps.items():
                prepare(turn)
                start = time.thread_time_ns()
                for _ in range(calls):
                    step()
                if turn >= warm_up:
                    microseconds[name].append((time.thread_time_ns() - start) / calls / 1e3)
            gc.collect(0)
    finally:
        gc.enable()
    return {name: statistics.quantiles(values, n=4)[0] for name, values in microseconds.items()}


# ---- The state of a GPU before a timed call


def flush_cache(device: torch.device) -> None:
    """Overwrites the L2 cache of a GPU, so that it holds no operand of the next call."""
    if device.type == "cuda":
        _scratch(device).zero_()


def keep_busy(device: torch.device, seconds: float) -> None:
    """Keeps a GPU busy with nothing for some seconds; what is enqueued in the meantime waits.

    Without this head start a GPU waits for the host to enqueue short kernels, and the host's time would be measured.
    """
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * _cycles_per_second(device)))


@functools.lru_cache
def _scratch(device: torch.device) -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)


@functools.lru_cache
def _cycles_per_second(device: torch.device) -> float:
    cycles, times = 20_000_000, []
    for _ in range(8):
        clock = Clock(device)
        torch.cuda._sleep(cycles)
        clock.mark()
        times += clock.seconds()
    return cycles / min(times)  # the fastest run: at first the clock may still be that of an idle GPU
