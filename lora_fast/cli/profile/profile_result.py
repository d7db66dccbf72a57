"""Everything that a profile found, and its one-sentence verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...measure.ceilings import Ceilings
from ...measure.clock import Spread
from .engines import COMPILED, EAGER, FUSED
from .layer_times import Layer
from .step_times import Times


@dataclass
class Measured:
    """One engine. Seconds; bytes.

    Attributes:
        over_fused: this engine's step over the fused one's, round by round. peak: None where it cannot be counted.
        files: names of its trace and, on CUDA, its memory snapshot.
    """

    times: Times
    forward: Spread
    backward: Spread
    optimizer: Spread
    step: Spread
    over_fused: Spread
    tokens_per_second: float
    saved: int
    peak: int | None
    files: list[str]


@dataclass
class Result:
    """``fusing``: what ``fuse_`` said. ``fused_layers``: how many of its layers it changed, ``fallbacks``: why some of
    these ran PEFT's own forward, and how many. ``skipped``: why there is no compiled engine, or "". ``machine``:
    conditions."""

    settings: dict[str, object]
    environment: dict[str, object]
    machine: str
    fusing: str
    fused_layers: int
    fallbacks: dict[str, int]
    skipped: str
    ceilings: Ceilings
    engines: dict[str, Measured]
    layers: list[Layer]

    def worst_error(self, label: str) -> float:
        """The largest gradient error of the layers looked at."""
        return max(layer.error[label] for layer in self.layers)

    def layers_said(self) -> str:
        """How many layers were fused, which not and why, and which ran PEFT's own forward nevertheless."""
        fallbacks = [f"{count} of them ran PEFT's own forward: {reason}" for reason, count in self.fallbacks.items()]
        return "; ".join([self.fusing, *fallbacks])

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"verdict": self.verdict()}

    def verdict(self) -> str:
        """Whether fusing pays here. A gain is one only where the 20th percentile of the ratios is above 1."""
        if self.fused_layers == sum(self.fallbacks.values()):
            return "No gain: no layer ran fused."
        said = [_compared(EAGER, self.engines[EAGER].over_fused)]
        if COMPILED in self.engines:
            said.append(_compared(COMPILED, self.engines[COMPILED].over_fused))
        kept, other = (self.engines[label].saved / 2**20 for label in (FUSED, EAGER))
        memory = f"{kept:.1f} MiB kept for backward against {other:.1f}" if kept != other else ""
        return " ".join([*said, f"Memory: {memory or 'as much kept for backward as PEFT eager keeps'}."])


def _compared(label: str, ratio: Spread) -> str:
    figures = f"{label} over fused {ratio.median:.2f} (p20–p80 {ratio.p20:.2f}–{ratio.p80:.2f})"
    if ratio.p20 > 1:
        return f"Faster than {label}: {figures}."
    if ratio.p80 < 1:
        return f"No gain, slower than {label}: {figures}."
    return f"No gain over {label} that this run can show: {figures}."
