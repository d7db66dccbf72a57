"""How a case is measured: providers take turns, and each run is forward, then backward.

A ``Comparison`` is what an op's file builds from a case: providers to be built on demand, the least work that the op
is, and the exact result. ``measure`` makes rows of it, one for each provider and mode. Timings are of interleaved
rounds, the order turned by one place each round, L2 flushed before every run on CUDA; the ratio to the first provider
is taken round by round, so that drift of the machine cancels.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from shapes import Case
from torch import Tensor

MODES = ("forward", "backward", "full")
FEWEST, MOST = 5, 100  # rounds


class Unavailable(Exception):
    """A provider that cannot run here; the message says why."""


class Setting(NamedTuple):
    """Where a case runs. ``triton``: ours are the kernels, natively or interpreted; else their torch twins."""

    device: torch.device
    triton: bool


class Work(NamedTuple):
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
    keeps: Callable[[object], list[Tensor]] = lambda value: []


@dataclass
class Comparison:
    """Providers by name, the first the one that others are compared with; the work of each mode; exact results."""

    providers: dict[str, Callable[[], Provider]]
    work: dict[str, Work]
    exact: Callable[[], dict[str, Tensor]] | None = None


@dataclass
class Row:
    """One provider in one mode. Times in µs, sizes in bytes; ratio: the first provider's time over this one's, of the
    same round. ``unavailable``: why nothing was measured."""

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
    unavailable: str = ""


@dataclass
class Rounds:
    """Timed rounds of some providers: ``run`` is one round."""

    providers: dict[str, Provider]
    device: torch.device
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    turn: int = 0

    def run(self) -> None:
        names = list(self.providers)
        first = self.turn % len(names)
        marks = {}
        for name in names[first:] + names[:first]:
            marks[name] = self._time(self.providers[name])
        wait(self.device)
        for name, (start, middle, end) in marks.items():
            self.seconds.setdefault(name, []).append((_elapsed(start, middle), _elapsed(middle, end)))
        self.turn += 1

    def _time(self, provider: Provider) -> tuple:
        provider.prepare()
        with provider.context():
            _flush(self.device)
            start = _mark(self.device)
            value = provider.forward()
            middle = _mark(self.device)
            if provider.backward is not None:
                provider.backward(value)
            return start, middle, _mark(self.device)

    def times(self, name: str, mode: str) -> list[float]:
        """µs of each round."""
        pick = {"forward": lambda f, b: f, "backward": lambda f, b: b, "full": lambda f, b: f + b}[mode]
        return [1e6 * pick(*pair) for pair in self.seconds[name]]


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
    rounds.seconds.clear()
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
    from lora_fast.cli.memory import PeakBytes  # not above: a GPU machine may lack what the command line needs

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
    """Relative L2 error."""
    difference, norm = (got.detach().to(exact) - exact).norm().item(), exact.norm().item()
    return difference / norm if norm else difference


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

    def microseconds(self, work: Work) -> float:
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


def _seconds(run: Callable, device: torch.device) -> float:
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
    """L2 holds nothing of the operands afterwards. It takes the device long enough for the host to prepare a launch."""
    if device.type == "cuda":
        _scratch(device).zero_()


@functools.lru_cache
def _scratch(device: torch.device) -> Tensor:
    return torch.empty(512 << 20, dtype=torch.int8, device=device)
