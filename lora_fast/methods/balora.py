"""BaLoRA (Castin, Nadjahi, Ablin, Peyré, arXiv 2605.31484): a step is followed by a change to the balanced factors of
the same product, for which a aᵀ = bᵀb. Notation: the paper's A, B are b, a.

A pair whose b is 0 is not changed. Its balanced factors are both 0, and zero factors have no gradient. A pair whose a
does not have full rank, or whose factors are not finite, is not changed either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..batches.batch import Batch
from ..ops.pairs import GAUGES, hyperbalance, hyperbalance_and_transport
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
            moments too, by the squared matrices, which is approximate). Moments in directions in which b vanishes, with
            singular values of the product below 1e-3 of the largest, are at most rotated. Pairs that have such
            directions transform as with "mv".
    """

    every: int = 1
    gauge: str = "symmetric"
    transport: str = "none"

    has_after = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count(self.every, "every")
        checks.choice(self.gauge, "gauge", GAUGES)
        checks.choice(self.transport, "transport", TRANSPORTS)

    def after(self, batch: Batch) -> None:
        due = batch.due(self.every)
        if not any(due):
            return
        ka, kb, *_ = batch.grams()
        if self.transport == "none":
            batch.transform(_where_due(batch, due, torch.cat(hyperbalance(ka, kb, self.gauge))))
            return
        t, t_inverse, u, u_inverse, deficient = hyperbalance_and_transport(ka, kb, self.gauge)
        batch.transform(_where_due(batch, due, torch.cat([t, t_inverse])))
        # With b' = b T, the chain rule gives db' = db T⁻ᵀ.
        matrices = _where_due(batch, due, torch.cat([u_inverse.mT, u.mT]))
        batch.transform(matrices, target="exp_avg")
        squares = matrices.square()
        if self.transport == "m":
            # A rotated first moment must not meet the second moment of a direction that has had no gradient.
            squares = torch.where(deficient.repeat(2, 1, 1), squares, _identity(matrices))
        batch.transform(squares, target="exp_avg_sq")


def _where_due(batch: Batch, due: list[bool], matrices: Tensor) -> Tensor:
    """Returns the matrices (2L, r, r), replaced by the identity for pairs that are due at another step."""
    if all(due):
        return matrices
    return torch.where(batch.rows(due).repeat(2)[:, None, None], matrices, _identity(matrices))


def _identity(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
