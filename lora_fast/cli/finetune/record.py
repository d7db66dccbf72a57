"""What a run did and cost: its record, and the clock. Memory of tensors: measure/memory.py."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field

from ...measure.clock import Spread
from ...metrics import BoundStats


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
        return asdict(Spread.of(_settled(self.seconds)))

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
