"""What a run did and cost: its record, and the clock. Memory of tensors: memory.py."""

from __future__ import annotations

import math
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata

import torch

from ..metrics import BoundStats


@dataclass
class Record:
    """Everything that is measured in one run; saved with each checkpoint, so a resumed run has all of it."""

    label: str
    losses: list[float] = field(default_factory=list)  # of each step, before its update
    seconds: list[float] = field(default_factory=list)  # of each step: forward, backward, clipping, update
    optimizer_seconds: list[float] = field(default_factory=list)  # of each step: the update alone
    memory: list[int] = field(default_factory=list)  # bytes: see memory_kind
    memory_kind: str = ""
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    adapter: list[dict[str, float]] = field(default_factory=list)  # lf.hf.summary, and "step"
    bounds: dict[str, dict] = field(default_factory=dict)  # of each norm-bounded layer: see add_bounds
    change_erank: float | None = None  # of W + s b a − W₀, where training has changed W itself
    saved_bytes: int = 0  # kept for backward by one micro-batch, parameters and buffers not counted
    optimizer_bytes: int = 0  # the optimizer's state after its first step
    optimizer_peak_bytes: int = 0  # the most that was alive at once in the first step of the optimizer, with its state
    trained_parameters: int = 0
    tokens_per_step: int = 0
    layers: str = ""  # the report of fuse_
    diverged: str = ""  # what ended the run early, of several
    sample_before: str = ""
    sample_after: str = ""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def add_bounds(self, stats: dict[str, BoundStats]) -> None:
        """Layer → the norm's name, its bound, and ``values``, the norm of its ΔW at each step that ``adapter`` has."""
        for name, layer in stats.items():
            row = self.bounds.setdefault(name, {"norm": layer.norm, "bound": layer.bound, "values": []})
            row["values"].append(layer.value)

    def bounds_used(self) -> dict[str, float]:
        """Layer → how much of its bound it used at the last of those steps, 0 to 1."""
        return {name: row["values"][-1] / row["bound"] for name, row in self.bounds.items()}

    def step_time(self) -> dict[str, float]:
        """Median and the 20th and 80th percentile, in seconds, of the steps after the first, which also allocates."""
        seconds = _settled(self.seconds)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else None
        low, high = (fifths[0], fifths[3]) if fifths else (seconds[0], seconds[0])
        return {"median": statistics.median(seconds), "p20": low, "p80": high}

    def optimizer_time(self) -> float:
        """Mean seconds of the update after the first step: what a method does every few steps counts in full."""
        return statistics.fmean(_settled(self.optimizer_seconds))

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one of the adapter's figures, where it is known."""
        rows = [row for row in self.adapter if name in row]
        return [int(row["step"]) for row in rows], [row[name] for row in rows]

    def last(self, name: str) -> float:
        """An adapter's figure at the end; NaN where it is not known."""
        return self.adapter[-1].get(name, math.nan) if self.adapter else math.nan


def _settled(seconds: list[float]) -> list[float]:
    return seconds[1:] or seconds


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


def environment() -> dict[str, object]:
    """Where the figures come from."""
    packages = ("lora-fast", "torch", "triton", "transformers", "peft", "accelerate")
    threads = torch.get_num_threads()
    on_cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _process_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
