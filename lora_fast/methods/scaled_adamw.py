"""Scaled (Riemannian) AdamW (Zhang & Pilanci, arXiv 2402.02347): both moments are computed from preconditioned
gradients,

da ← (bᵀb + δI)⁻¹ da        db ← db (a aᵀ + δI)⁻¹

with the factors before the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..batches.batch import Batch
from .method import Method


@dataclass(frozen=True)
class ScaledAdamW(Method):
    """Gradients in the metric of the other factor.

    Args:
        damping: δ, above 0, since bᵀb is 0 at the start. From b = 0 a small δ makes the first gradients of a so large
            that the second moments, which remember them, all but stop a. docs/methods.md has the runs that chose the
            default.
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive(self.damping, "damping")

    def before(self, batch: Batch) -> None:
        batch.precondition(self.damping)
