"""BaLoRA (Castin, Nadjahi, Ablin, Peyré, arXiv 2605.31484): after a step, the factors of the same product that are
balanced, a aᵀ = bᵀb. Notation: the paper's A, B are b, a.

A pair whose b is 0 is left as it is: projecting it would kill both factors for good.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..batches.batch import Batch
from ..ops import pairs as pair_ops
from .method import Method

TRANSPORTS = ("none", "m", "mv")


@dataclass(frozen=True)
class BaLoRA(Method):
    """b ← b T and a ← T⁻¹ a with a aᵀ = bᵀb afterwards.

    Args:
        every: steps from one balancing to the next.
        gauge: which of the balanced pairs: "symmetric" (T symmetric, the nearest to no change), "svd" (diagonal Grams),
            "svd_signed" (the same without sign flips).
        transport: of Adam's moments: "none", "m" (first moments as gradients transform), "mv" (second moments too, by
            squared entries, which is approximate).
    """

    every: int = 1
    gauge: str = "symmetric"
    transport: str = "none"

    has_after = True

    def __post_init__(self) -> None:
        checks.count(self.every, "every")
        checks.choice(self.gauge, "gauge", pair_ops.GAUGES)
        checks.choice(self.transport, "transport", TRANSPORTS)

    def after(self, batch: Batch) -> None:
        if not batch.due(self.every):
            return
        ka, kb, *_ = batch.grams()
        t, t_inverse = pair_ops.hyperbalance(ka, kb, self.gauge)
        batch.transform(torch.cat([t, t_inverse]))
        moments = torch.cat([t_inverse.mT, t.mT])
        if self.transport != "none":
            batch.transform(moments, target="exp_avg")
        if self.transport == "mv":
            batch.transform(moments.square(), target="exp_avg_sq")
