"""How a case is measured: providers take turns, and each run is forward, then backward.

A ``Comparison`` is what an op's file builds from a case: providers to be built on demand, the least work that the op
is, and the exact result. ``measure`` makes rows of it, one for each provider and mode. Timings are of interleaved
rounds, the order turned by one place each round; the ratio to the first provider is taken round by round, so that drift
of the machine cancels.

On CUDA a run has two times. The device's is that between events, after L2 was flushed and the device was kept busy
("head start") for longer than the host takes to enqueue the run: without that the host's time would be reported as a
kernel's. The host's is the time of that enqueueing. A provider that makes the host wait (``torch.linalg.inv`` does)
cannot be told apart in this way, and is marked ``exposed``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from suite.cases import Case

MODES = ("forward", "backward", "full")
FEWEST, MOST = 5, 100  # rounds
FIRST_HEAD_START, LEAST_HEAD_START, MOST_HEAD_START = 3e-3, 0.3e-3, 50e-3  # seconds; the first: while warming up


class Unavailable(Exception):
    """A provider that cannot run here; the message says why."""


class Setting(NamedTuple):
    """Where a case runs. ``triton``: ours are the kernels, natively or interpreted; else their torch twins."""

    device: torch.device
    triton: bool


class Cost(NamedTuple):
    """The least that any implementation must do: bytes of every operand once, and floating-point operations."""

    bytes: int
    operations: int


@dataclass
class Provider:
    """One implementation, ready to run.

    Attributes:
        forward: returns what backward takes. backward: None for an op without one.
        results: from forward's value, after backward, the tensors whose error is judged; None where they are not
            comparable.
        prepare: before each run, not timed. context: around each run. own: tensors that are not "saved for backward".
        apart: whether the device is timed apart from the host; else, as of whole training steps, the time is both's.
        compiled: whether it is torch.compile's. keeps: of forward's value, what its graph keeps for backward besides
            saved tensors.
    """

    forward: Callable[[], object]
    backward: Callable[[object], object] | None = None
    results: Callable[[object], dict[str, Tensor]] | None = None
    prepare: Callable[[], None] = lambda: None
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    own: Iterable[Tensor] = ()
    compiled: bool = False
    apart: bool = True
    keeps: Callable[[object], list[Tensor]] = lambda value: []


@dataclass
class Comparison:
    """Providers by name, the first the one that others are compared with; the work of each mode; exact results."""

    providers: dict[str, Callable[[], Provider]]
    work: dict[str, Cost]
    exact: Callable[[], dict[str, Tensor]] | None = None


@dataclass
class Row:
    """One provider in one mode. Times in µs, sizes in bytes; ratio: the first provider's time over this one's, of the
    same round. ``host``: the host's time, where the times are the device's; ``exposed``: the host took longer than its
    head start, so that its time is in the device's. ``unavailable``: why nothing was measured."""

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
    traffic: float | None = None  # bytes asked for over the least possible, counted by the interpreter
    launches: int | None = None  # likewise
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
    """Timed rounds of some providers: ``run`` is one round. ``head_start``: seconds for which the device is kept busy
    while the host enqueues a provider's run."""

    providers: dict[str, Provider]
    device: torch.device
    runs: dict[str, list[Run]] = field(default_factory=dict)
    head_start: dict[str, float] = field(default_factory=dict)
    turn: int = 0

    def run(self) -> None:
        names = list(self.providers)
        first = self.turn % len(names)
        for name in names[first:] + names[:first]:
            self.runs.setdefault(name, []).append(self._time(name))
        self.turn += 1

    def _time(self, name: str) -> Run:
        provider = self.providers[name]
        provider.prepare()
        with provider.context():
            _flush(self.device)
            wait(self.device)  # so that the driver's queue is empty
            if provider.apart:
                _keep_busy(self.device, self.head_start.get(name, FIRST_HEAD_START))
            start, began = _mark(self.device), time.perf_counter()
            value = provider.forward()
            between, middle = time.perf_counter(), _mark(self.device)
            if provider.backward is not None:
                provider.backward(value)
            ended, end = time.perf_counter(), _mark(self.device)
            wait(self.device)
        return Run(_elapsed(start, middle), _elapsed(middle, end), between - began, ended - between)

    def warmed_up(self) -> None:
        """Forgets the runs so far; from now on a head start is as long as the provider needs."""
        for name, runs in self.runs.items():
            longest = max(run.host() for run in runs)
            self.head_start[name] = min(MOST_HEAD_START, max(LEAST_HEAD_START, 2.5 * longest))
        self.runs.clear()

    def times(self, name: str, mode: str) -> list[float]:
        """µs of each round."""
        return [1e6 * run.device(mode) for run in self.runs[name]]

    def host_times(self, name: str, mode: str) -> list[float]:
        """µs that the host took to enqueue each round."""
        return [1e6 * run.host(mode) for run in self.runs[name]]

    def is_exposed(self, name: str) -> bool:
        """Whether the host's time is in the device's, in one round of five or more."""
        if self.device.type != "cuda" or not self.providers[name].apart:
            return False
        return spread([run.host() for run in self.runs[name]])[2] > self.head_start.get(name, FIRST_HEAD_START)


def measure(
    case: Case, comparison: Comparison, setting: Setting, ceilings: Ceilings, seconds: float, drive: Callable
) -> list[Row]:
    """``drive(run, rounds)`` calls ``run`` that many times (pytest-benchmark does, in the suite)."""
    with torch.random.fork_rng():
        ready, missing = _ready(comparison)
        rows = [Row(asdict(case), name, "full", unavailable=why) for name, why in missing.items()]
        if not ready:
            return rows
        exact = comparison.exact() if comparison.exact else {}
        extra = {name: _examine(provider, exact, setting.device) for name, provider in ready.items()}
        del exact
        rounds = timed(ready, setting.device, seconds, drive)
    baseline = next(iter(ready))
    for name, provider in ready.items():
        for mode in MODES if provider.backward is not None else MODES[:1]:
            times, reference = rounds.times(name, mode), rounds.times(baseline, mode)
            p20, p50, p80 = spread(times)
            work = comparison.work[mode]
            row = Row(asdict(case), name, mode, *work, p20, p50, p80, roofline=ceilings.microseconds(work) / p50)
            row.ratio = spread([r / t for r, t in zip(reference, times, strict=True)])
            if setting.device.type == "cuda":
                row.host, row.exposed = spread(rounds.host_times(name, mode)), rounds.is_exposed(name)
            row.peak, row.saved, row.error = extra[name]
            rows.append(row)
    return rows


def timed(providers: dict[str, Provider], device: torch.device, seconds: float, drive: Callable) -> Rounds:
    """As many rounds as fit in ``seconds``, within bounds, after two that warm up; 0 seconds: two that mean nothing."""
    rounds = Rounds(providers, device)
    if not seconds:
        drive(rounds.run, 2)
        return rounds
    start = time.perf_counter()
    rounds.run()
    rounds.run()
    round_seconds = (time.perf_counter() - start) / 2
    rounds.warmed_up()
    drive(rounds.run, max(FEWEST, min(MOST, int(seconds / round_seconds))))
    return rounds


def simply(run: Callable[[], None], rounds: int) -> None:
    """What drives the rounds where pytest-benchmark does not."""
    for _ in range(rounds):
        run()


def _ready(comparison: Comparison) -> tuple[dict[str, Provider], dict[str, str]]:
    ready, missing = {}, {}
    for name, build in comparison.providers.items():
        try:
            ready[name] = build()
        except Unavailable as reason:
            missing[name] = str(reason)
    return ready, missing


def spread(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def once(provider: Provider) -> object:
    """One run, not timed."""
    provider.prepare()
    with provider.context():
        value = provider.forward()
        if provider.backward is not None:
            provider.backward(value)
    return value


def _examine(
    provider: Provider, exact: dict[str, Tensor], device: torch.device
) -> tuple[int | None, int | None, float | None]:
    """Peak bytes of a run beside what was there before it, bytes kept for backward, and the largest error."""
    value = once(provider)  # compiles
    error = None
    if exact and provider.results is not None:
        found = provider.results(value)
        error = max(relative_error(found[name], right) for name, right in exact.items())
    del value
    saved = saved_bytes(provider) if provider.backward is not None else None
    provider.prepare()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        once(provider)
        return torch.cuda.max_memory_allocated(device) - before, saved, error
    if provider.compiled:
        return None, saved, error  # PeakBytes would see the uncompiled code run
    from lora_fast.measure.memory import PeakBytes

    with PeakBytes() as memory:
        once(provider)
    return memory.peak, saved, error


def saved_bytes(provider: Provider) -> int:
    """Bytes of the distinct storages that forward keeps for backward, its own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in provider.own}
    kept = []

    def keep(tensor: Tensor) -> None:  # no backward follows; a hook's own tensor may keep the graph alive for good
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.detach())

    provider.prepare()
    with provider.context(), torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        value = provider.forward()
    storages = [tensor.untyped_storage() for tensor in kept + provider.keeps(value)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Relative L2 error; infinite where it is not a number, so that no maximum loses it."""
    difference, norm = (got.detach().to(exact) - exact).norm().item(), exact.norm().item()
    error = difference / norm if norm else difference
    return math.inf if math.isnan(error) else error


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- The device


class Ceilings(NamedTuple):
    """What this device reaches: a large GEMM in float32 and in its 16-bit type (operations a second), a copy (bytes
    read and written a second)."""

    dtype: str
    operations: float
    bandwidth: float

    def microseconds(self, work: Cost) -> float:
        """The least possible time."""
        return 1e6 * max(work.bytes / self.bandwidth, work.operations / self.operations)


def ceilings(device: torch.device, dtype: str, small: bool = False) -> Ceilings:
    """Best of several runs of a GEMM and of a copy too large for the caches; ``small``: rough, in milliseconds."""
    cuda = device.type == "cuda"
    side, numel = (256, 1 << 20) if small else (8192, 1 << 29) if cuda else (1536, 1 << 25)
    x = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
    source = torch.ones(numel, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    gemm = min(_seconds(functools.partial(torch.mm, x, x), device) for _ in range(8))
    copy = min(_seconds(functools.partial(target.copy_, source), device) for _ in range(8))
    return Ceilings(dtype, 2 * side**3 / gemm, 2 * numel / copy)


def _seconds(run: Callable, device: torch.device, apart: bool = True) -> float:
    if apart:
        _keep_busy(device, LEAST_HEAD_START)
    start = _mark(device)
    run()
    end = _mark(device)
    wait(device)
    return _elapsed(start, end)


def _mark(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flush(device: torch.device) -> None:
    """L2 holds nothing of the operands afterwards."""
    if device.type == "cuda":
        _scratch(device).zero_()


@functools.lru_cache
def _scratch(device: torch.device) -> Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device=device)


def _keep_busy(device: torch.device, seconds: float) -> None:
    """The device does nothing for so long, and what is enqueued meanwhile waits."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * _cycles_per_second(device)))


@functools.lru_cache
def _cycles_per_second(device: torch.device) -> float:
    """The largest of several: at first the clock may still be that of an idle device."""
    cycles = 20_000_000
    return cycles / min(_seconds(functools.partial(torch.cuda._sleep, cycles), device, apart=False) for _ in range(8))
