"""The result of a profile: all figures, and a verdict in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...measure.ceilings import Ceilings
from ...measure.clock import Spread
from .engines import COMPILED, EAGER, FUSED
from .layer_times import Layer
from .step_times import Times


@dataclass
class Measured:
    """The figures of an engine, in seconds and bytes.

    Attributes:
        over_fused: the engine's step time over the fused engine's of the same round.
        saved: kept for backward by one forward pass. peak: in one step; None where it cannot be counted.
        files: names of the trace and, on CUDA, the memory snapshot.
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
    """All figures of a profile.

    Attributes:
        machine: the conditions of the measurement, in words. fusing: the report of ``fuse_``, in words.
        fused_layers: number of layers that were fused.
        fallbacks: reason → number of fused layers that nevertheless ran PEFT's own forward.
        skipped: why there is no compiled engine, or "".
        weight_format: of quantised frozen weights, or "". weight_bytes: of the frozen weights and buffers, as they are
            stored. plain_weight_bytes: which they would take if they were not quantised.
    """

    settings: dict[str, object]
    environment: dict[str, object]
    machine: str
    fusing: str
    fused_layers: int
    fallbacks: dict[str, int]
    skipped: str
    ceilings: Ceilings
    weight_format: str
    weight_bytes: int
    plain_weight_bytes: int
    engines: dict[str, Measured]
    layers: list[Layer]

    def worst_error(self, label: str) -> float:
        """Returns the largest gradient error of the measured layers."""
        return max(layer.error[label] for layer in self.layers)

    def fused_layers_text(self) -> str:
        """Returns in words how many layers were fused, why others were not, and how many ran PEFT's own forward."""
        fallbacks = [f"{count} of them ran PEFT's own forward: {reason}" for reason, count in self.fallbacks.items()]
        return "; ".join([self.fusing, *fallbacks])

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"verdict": self.verdict()}

    def verdict(self) -> str:
        """Returns in words whether fusing pays: it does only if the 20th percentile of the ratios is above 1."""
        if self.fused_layers == sum(self.fallbacks.values()):
            return "No gain: no layer ran fused."
        labels = [label for label in (EAGER, COMPILED) if label in self.engines]
        sentences = [_compared(label, self.engines[label].over_fused) for label in labels]
        fused, eager = (self.engines[label].saved / 2**20 for label in (FUSED, EAGER))
        memory = f"{fused:.1f} MiB are kept for backward, against {eager:.1f}"
        if fused == eager:
            memory = "as much is kept for backward as by PEFT eager"
        if self.weight_format:
            stored, plain = (size / 2**20 for size in (self.weight_bytes, self.plain_weight_bytes))
            memory += f"; the frozen weights take {stored:.1f} MiB ({self.weight_format}) in place of {plain:.1f}"
        return " ".join([*sentences, f"Memory: {memory}."])


def _compared(label: str, ratio: Spread) -> str:
    figures = f"{label} over fused {ratio.median:.2f} (p20–p80 {ratio.p20:.2f}–{ratio.p80:.2f})"
    if ratio.p20 > 1:
        return f"Faster than {label}: {figures}."
    if ratio.p80 < 1:
        return f"No gain, slower than {label}: {figures}."
    return f"No gain over {label} that exceeds the noise: {figures}."
