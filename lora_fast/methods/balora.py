"""BaLoRA (Castin, Nadjahi, Ablin, Peyré, arXiv 2605.31484): a step is followed by a change to the balanced factors of
the same product, for which a aᵀ = bᵀb. Notation: the paper's A, B are b, a.

A pair whose b is 0 is not changed. Its balanced factors are both 0, and zero factors have no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..batches.batch import Batch
from ..ops.pairs import GAUGES, hyperbalance_and_transport
from .method import Method

TRANSPORTS = ("none", "m", "mv")


@dataclass(frozen=True)
class BaLoRA(Method):
    """b ← b T and a ← T⁻¹ a with a aᵀ = bᵀb afterwards.

    Args:
        every: steps from one balancing to the next.
        gauge: the choice among the balanced pairs: "symmetric" (T is symmetric, the nearest to no change), "svd"
            (diagonal Grams), "svd_signed" (diagonal Grams, without sign flips).
        transport: the change of Adam's moments: "none", "m" (first moments transform as gradients do), "mv" (second
            moments too, by the squared matrices, which is approximate).
    """

    every: int = 1
    gauge: str = "symmetric"
    transport: str = "none"

    has_after = True

    def __post_init__(self) -> None:
        checks.count(self.every, "every")
        checks.choice(self.gauge, "gauge", GAUGES)
        checks.choice(self.transport, "transport", TRANSPORTS)

    def after(self, batch: Batch) -> None:
        due = batch.due(self.every)
        if not any(due):
            return
        ka, kb, *_ = batch.grams()
        t, t_inverse, transport, transport_inverse = hyperbalance_and_transport(ka, kb, self.gauge)
        # With b' = b T, the chain rule gives db' = db T⁻ᵀ.
        matrices = torch.stack([torch.cat([t, t_inverse]), torch.cat([transport_inverse.mT, transport.mT])])
        if not all(due):  # pairs that are due at another step keep their factors
            chosen = batch.rows(due).repeat(2)[:, None, None]
            matrices = torch.where(chosen, matrices, torch.eye(t.shape[-1], dtype=t.dtype, device=t.device))
        factor_matrices, gradient_matrices = matrices
        batch.transform(factor_matrices)
        if self.transport != "none":
            batch.transform(gradient_matrices, target="exp_avg")
        if self.transport == "mv":
            batch.transform(gradient_matrices.square(), target="exp_avg_sq")
