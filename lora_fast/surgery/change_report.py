"""Report: the layers that a change of a model concerned and, for each candidate left alone, the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from .. import backend, checks
from ..kernels.grouping import group_by

SHOWN = 4  # names printed per reason


@dataclass
class Report:
    """The result of ``inject_``, ``fuse_``, ``merge_``, ``save_adapter`` and the like; ``print`` shows a summary.

    Attributes:
        action: what was done, in the past tense ("fused").
        changed: module name → what it became.
        left: name of a candidate → why it was left alone.
        note: a further sentence, or nothing.
    """

    action: str
    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        layers = "layer" if len(self.changed) == 1 else "layers"
        left = f"; left {self.reasons()}" if self.left else ""
        return f"{self.action} {len(self.changed)} {layers}{left}" + (f". {self.note}" if self.note else "")

    def reasons(self) -> str:
        """Returns the candidates left alone, grouped by reason, as in ``1: lm_head (output embeddings)``."""
        groups = group_by(self.left, self.left.__getitem__)
        return "; ".join(f"{len(names)}: {_shorten(names)} ({reason})" for reason, names in groups.items())

    def require_change(self, argument: str, expected: str, allow_empty: bool) -> None:
        """Raises ArgumentError if no layer is to be changed and that is not allowed; for use before any change."""
        if not checks.flag(allow_empty, "allow_empty") and not self.changed:
            raise checks.ArgumentError(argument, expected, f"none; left {self.reasons()}" if self.left else "none")

    def note_fallbacks(self, layers: Iterable[nn.Module]) -> None:
        """Notes why plain torch runs on the layers' devices, if kernels might be expected there."""
        devices = {parameter.device for layer in layers for parameter in layer.parameters()}
        self.note = ". ".join(sorted({sentence for device in devices if (sentence := backend.fallback(device))}))


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
