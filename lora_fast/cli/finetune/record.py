"""The record of a training run: losses, times, memory, and figures of the adapters."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field

from ...measure.clock import Spread
from ...metrics import BoundStats
from ..output.terminal import RunFailed


@dataclass
class Record:
    """Everything that is measured in one run. It is saved with each checkpoint, so that a resumed run contains the
    figures from before the interruption."""

    label: str
    losses: list[float] = field(default_factory=list)  # of each step, computed before its update
    seconds: list[float] = field(default_factory=list)  # of each step: forward, backward, clipping, update
    optimizer_seconds: list[float] = field(default_factory=list)  # of each step: the update alone
    memory: list[int] = field(default_factory=list)  # bytes at each step
    memory_kind: str = ""  # what these bytes measure, in words
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    adapter: list[dict[str, float]] = field(default_factory=list)  # lf.hf.summary, with "step" added
    bounds: dict[str, dict] = field(default_factory=dict)  # by norm-bounded layer; see add_bounds
    change_erank: float | None = None  # stable rank of W + s b a − W₀, if training has changed W itself
    weight_format: str = ""  # of quantised frozen weights
    weight_bytes: int = 0  # of the frozen weights and buffers, as they are stored
    plain_weight_bytes: int = 0  # which they would take if they were not quantised
    saved_bytes: int = 0  # kept for backward by one micro-batch, without parameters and buffers
    optimizer_bytes: int = 0  # of the optimizer's state after its first step
    optimizer_peak_bytes: int = 0  # most bytes allocated at once in the optimizer's first step, with its state
    trained_parameters: int = 0
    tokens_per_step: int = 0
    layers: str = ""  # the report of fuse_
    diverged: str = ""  # why the run ended early, in a comparison of methods
    sample_before: str = ""
    sample_after: str = ""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def add_bounds(self, stats: dict[str, BoundStats]) -> None:
        """Adds one step's norms to ``bounds``, which maps each layer to the name of its norm, its bound, and
        ``values``, the norms of its ΔW at the steps of ``adapter``."""
        for name, layer in stats.items():
            row = self.bounds.setdefault(name, {"norm": layer.norm, "bound": layer.bound, "values": []})
            row["values"].append(layer.value)

    def bounds_used(self) -> dict[str, float]:
        """Maps each norm-bounded layer to the share of its bound, 0 to 1, that it used at the last of those steps."""
        return {name: row["values"][-1] / row["bound"] for name, row in self.bounds.items()}

    def step_time(self) -> dict[str, float]:
        """Returns the median and the 20th and 80th percentile, in seconds, of the steps after the first, which also
        allocates."""
        return asdict(Spread.of(_after_first(self.seconds)))

    def optimizer_time(self) -> float:
        """Returns the mean seconds of the updates after the first. The mean, unlike the median, includes what a method
        does every few steps only."""
        return statistics.fmean(_after_first(self.optimizer_seconds))

    def weights_note(self) -> str:
        """Returns a sentence on the memory of quantised weights, or "" if they are not quantised."""
        if not self.weight_format:
            return ""
        return (
            f"The frozen weights of linear layers are quantised ({self.weight_format}). With their scales and the "
            f"other weights, such as embeddings, they take {self.weight_bytes / 2**20:.1f} MiB in place of "
            f"{self.plain_weight_bytes / 2**20:.1f}. All losses are those of the quantised model."
        )

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps and the values of one of the adapter's figures, at the steps that have it."""
        rows = [row for row in self.adapter if name in row]
        return [int(row["step"]) for row in rows], [row[name] for row in rows]

    def last(self, name: str) -> float:
        """Returns one of the adapter's figures at the end of the run, or NaN if there is none."""
        return self.adapter[-1].get(name, math.nan) if self.adapter else math.nan


class Diverged(RunFailed):
    """The loss is no longer a finite number. ``record`` contains the run up to this step."""

    def __init__(self, message: str, record: Record):
        super().__init__(message)
        self.record = record


def _after_first(seconds: list[float]) -> list[float]:
    return seconds[1:] or seconds
