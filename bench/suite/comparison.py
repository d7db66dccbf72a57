"""Measures a case: providers take turns, and each run is forward, then backward.

The file of an op builds a ``Comparison`` from a case: providers that are built on demand, the least cost of the op, and
the exact result. ``measure`` returns one row for each provider and mode. Timings come from interleaved rounds whose
order moves by one place each round. The ratio to the first provider is taken round by round, so that drift of the
machine cancels.

On CUDA a run has two times. The device's time is that between events in the stream, after the L2 cache was flushed and
the device was kept busy (its head start) for longer than the host needs to enqueue the run; otherwise the host's time
would be reported as a kernel's. The host's time is the time of that enqueueing. The two cannot be separated for a
provider that makes the host wait for the device, as ``torch.linalg.inv`` does: its rows are marked ``exposed``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fast.measure import memory
from lora_fast.measure.ceilings import Ceilings, Cost
from lora_fast.measure.clock import Spread, flush_cache, keep_busy, mark, rotated, seconds_between, wait
from suite.cases import Case

MODES = ("forward", "backward", "full")
FEWEST, MOST = 5, 100  # rounds
FIRST_HEAD_START, LEAST_HEAD_START, MOST_HEAD_START = 3e-3, 0.3e-3, 50e-3  # seconds; the first one while warming up


class Unavailable(Exception):
    """Raised by a provider that cannot run here; the message is the reason."""


class Setting(NamedTuple):
    """The device and our implementation. ``triton``: the kernels, native or interpreted; else their torch twins."""

    device: torch.device
    triton: bool


@dataclass
class Provider:
    """An implementation that is ready to run.

    Attributes:
        forward: returns the value that backward takes. backward: None for an op without a backward pass.
        results: from forward's value, after backward, the tensors whose error is computed; None where they are not
            comparable.
        prepare: called before each run, not timed. context: entered around each run.
        excluded: tensors that do not count as saved for backward.
        apart: whether the device is timed apart from the host. Otherwise, as for whole training steps, the time
            includes both.
        compiled: whether torch.compile made it. keeps: from forward's value, the tensors that its graph keeps for
            backward besides autograd's saved tensors.
    """

    forward: Callable[[], object]
    backward: Callable[[object], object] | None = None
    results: Callable[[object], dict[str, Tensor]] | None = None
    prepare: Callable[[], None] = lambda: None
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    excluded: Iterable[Tensor] = ()
    compiled: bool = False
    apart: bool = True
    keeps: Callable[[object], Iterable[Tensor]] = lambda value: ()


@dataclass
class Comparison:
    """Providers by name, the least cost of each mode, and the exact results. The first provider is the baseline."""

    providers: dict[str, Callable[[], Provider]]
    costs: dict[str, Cost]
    exact: Callable[[], dict[str, Tensor]] | None = None


@dataclass
class Row:
    """A provider's figures in one mode. Times are in µs, sizes in bytes.

    Attributes:
        ratio: the first provider's time over this provider's, of the same round.
        host: the host's time, where the times are the device's.
        exposed: whether the host took longer than its head start, so that its time is part of the device's.
        unavailable: why nothing was measured.
    """

    case: dict
    provider: str
    mode: str
    bytes: int = 0
    operations: int = 0
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: tuple[float, float, float] | None = None  # p20, p50, p80
    roofline: float | None = None  # least possible time over p50
    peak: int | None = None
    saved: int | None = None
    error: float | None = None  # largest relative L2 error of any result or gradient against float64
    traffic: float | None = None  # bytes requested over the least possible, counted by the interpreter
    launches: int | None = None  # also counted by the interpreter
    host: tuple[float, float, float] | None = None  # p20, p50, p80
    exposed: bool = False
    unavailable: str = ""


class Run(NamedTuple):
    """Seconds of one run: the device's, and the host's. On a CPU they are the same."""

    forward: float
    backward: float
    host_forward: float
    host_backward: float

    def device(self, mode: str) -> float:
        return self.forward * (mode != "backward") + self.backward * (mode != "forward")

    def host(self, mode: str = "full") -> float:
        return self.host_forward * (mode != "backward") + self.host_backward * (mode != "forward")


@dataclass
class Rounds:
    """Timed rounds of some providers; ``run`` runs one round. ``head_start``: for each provider, the seconds for which
    the device is kept busy while the host enqueues a run."""

    providers: dict[str, Provider]
    device: torch.device
    runs: dict[str, list[Run]] = field(default_factory=dict)
    head_start: dict[str, float] = field(default_factory=dict)
    turn: int = 0

    def run(self) -> None:
        for name in rotated(list(self.providers), self.turn):
            self.runs.setdefault(name, []).append(self._time(name))
        self.turn += 1

    def _time(self, name: str) -> Run:
        provider = self.providers[name]
        provider.prepare()
        with provider.context():
            flush_cache(self.device)
            wait(self.device)  # so that the driver's queue is empty
            if provider.apart:
                keep_busy(self.device, self.head_start.get(name, FIRST_HEAD_START))
            start, host_start = mark(self.device), time.perf_counter()
            value = provider.forward()
            host_middle, middle = time.perf_counter(), mark(self.device)
            if provider.backward is not None:
                provider.backward(value)
            host_end, end = time.perf_counter(), mark(self.device)
            wait(self.device)
        device_times = seconds_between(start, middle), seconds_between(middle, end)
        return Run(*device_times, host_middle - host_start, host_end - host_middle)

    def end_warm_up(self) -> None:
        """Forgets the runs so far. From now on a head start is as long as the provider needs."""
        for name, runs in self.runs.items():
            longest = max(run.host() for run in runs)
            self.head_start[name] = min(MOST_HEAD_START, max(LEAST_HEAD_START, 2.5 * longest))
        self.runs.clear()

    def times(self, name: str, mode: str) -> list[float]:
        """Returns the µs of each round."""
        return [1e6 * run.device(mode) for run in self.runs[name]]

    def host_times(self, name: str, mode: str) -> list[float]:
        """Returns the µs that the host took to enqueue each round."""
        return [1e6 * run.host(mode) for run in self.runs[name]]

    def is_exposed(self, name: str) -> bool:
        """Returns whether the host's time is part of the device's in at least one round of five."""
        if self.device.type != "cuda" or not self.providers[name].apart:
            return False
        hosts = Spread.of([run.host() for run in self.runs[name]])
        return hosts.p80 > self.head_start.get(name, FIRST_HEAD_START)


def measure(
    case: Case, comparison: Comparison, setting: Setting, ceilings: Ceilings, seconds: float, drive: Callable
) -> list[Row]:
    """Measures every provider of a case.

    Args:
        seconds: time for the rounds; see ``timed``.
        drive: ``drive(run, rounds)`` calls ``run`` that many times. In the suite pytest-benchmark does.
    """
    with torch.random.fork_rng():
        ready, missing = _build_all(comparison)
        rows = [Row(asdict(case), name, "full", unavailable=reason) for name, reason in missing.items()]
        if not ready:
            return rows
        exact = comparison.exact() if comparison.exact else {}
        examined = {name: _examine(provider, exact, setting.device) for name, provider in ready.items()}
        del exact  # float64 results of a large case take as much memory as the case itself
        rounds = timed(ready, setting.device, seconds, drive)
    baseline = next(iter(ready))
    for name, provider in ready.items():
        for mode in MODES if provider.backward is not None else MODES[:1]:
            times, reference = rounds.times(name, mode), rounds.times(baseline, mode)
            p20, p50, p80 = Spread.of(times).percentiles
            cost = comparison.costs[mode]
            roofline = 1e6 * ceilings.least_seconds(cost) / p50
            row = Row(asdict(case), name, mode, *cost, p20, p50, p80, roofline=roofline)
            row.ratio = Spread.of([r / t for r, t in zip(reference, times, strict=True)]).percentiles
            if setting.device.type == "cuda":
                row.host = Spread.of(rounds.host_times(name, mode)).percentiles
                row.exposed = rounds.is_exposed(name)
            row.peak, row.saved, row.error = examined[name]
            rows.append(row)
    return rows


def timed(providers: dict[str, Provider], device: torch.device, seconds: float, drive: Callable) -> Rounds:
    """Runs two rounds that warm up, then as many as fit in ``seconds``, at least FEWEST and at most MOST.

    With 0 seconds it runs two rounds whose times mean nothing.
    """
    rounds = Rounds(providers, device)
    if not seconds:
        drive(rounds.run, 2)
        return rounds
    start = time.perf_counter()
    rounds.run()
    rounds.run()
    round_seconds = (time.perf_counter() - start) / 2
    rounds.end_warm_up()
    drive(rounds.run, max(FEWEST, min(MOST, int(seconds / round_seconds))))
    return rounds


def simply(run: Callable[[], None], rounds: int) -> None:
    """Drives the rounds where pytest-benchmark does not."""
    for _ in range(rounds):
        run()


def _build_all(comparison: Comparison) -> tuple[dict[str, Provider], dict[str, str]]:
    """Returns the providers that run here, and the others' reasons."""
    ready, missing = {}, {}
    for name, build in comparison.providers.items():
        try:
            ready[name] = build()
        except Unavailable as reason:
            missing[name] = str(reason)
    return ready, missing


def once(provider: Provider) -> object:
    """Runs a provider once, not timed. Returns forward's value."""
    provider.prepare()
    with provider.context():
        value = provider.forward()
        if provider.backward is not None:
            provider.backward(value)
    return value


def _examine(
    provider: Provider, exact: dict[str, Tensor], device: torch.device
) -> tuple[int | None, int | None, float | None]:
    """Returns the peak bytes of a run beside those allocated before it, the bytes kept for backward, and the largest
    error."""
    value = once(provider)  # compiles
    error = None
    if exact and provider.results is not None:
        results = provider.results(value)
        error = max(relative_error(results[name], right) for name, right in exact.items())
    del value  # frees its graph before memory is counted
    saved = saved_bytes(provider) if provider.backward is not None else None
    provider.prepare()
    if provider.compiled and device.type != "cuda":
        return None, saved, error  # PeakBytes would see the uncompiled code run
    return memory.peak_bytes(lambda: once(provider), device), saved, error


def saved_bytes(provider: Provider) -> int:
    """Returns the bytes of the distinct storages that forward keeps for backward, the provider's own excluded."""
    provider.prepare()
    with provider.context():
        return memory.saved_bytes(provider.forward, provider.excluded, provider.keeps)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Returns the relative L2 error. A NaN becomes infinite, so that a maximum over errors cannot lose it."""
    difference, norm = (got.detach().to(exact) - exact).norm().item(), exact.norm().item()
    error = difference / norm if norm else difference
    return math.inf if math.isnan(error) else error


def size(*tensors: Tensor) -> int:
    """Returns the bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
