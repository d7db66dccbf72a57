"""Scale regularization (Tan, "Scale Regularization for Stable Low-Rank Adaptation") adds λ Σ ℓ² to the loss, with

ℓ = log(‖a‖² / (r d_in)) − log(‖b‖² / (r d_out) + ε)
da += 4 λ ℓ a / ‖a‖²        db −= 4 λ ℓ b / (‖b‖² + ε r d_out)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..batches.batch import Batch
from .method import Method


@dataclass(frozen=True)
class ScaleReg(Method):
    """Penalises the difference between the mean squares of the two factors.

    Args:
        lam: λ.
        eps: ε, above 0.
        decoupled: whether the learning rate times this gradient is subtracted from the factors after AdamW, outside its
            moments. Without it, Adam's first step moves every entry of a by about the learning rate for any λ.
    """

    lam: float = 1e-3
    eps: float = 1e-6
    decoupled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative(self.lam, "lam")
        checks.positive(self.eps, "eps")
        checks.flag(self.decoupled, "decoupled")

    @property
    def has_after(self) -> bool:  # type: ignore[override]  # a class attribute of other methods, here a field decides
        return self.decoupled

    def before(self, batch: Batch) -> None:
        if not self.decoupled:
            batch.add_to_gradients(self._coefficients(batch))

    def after(self, batch: Batch) -> None:
        if self.decoupled:
            c_b, c_a = self._coefficients(batch).chunk(2)
            # p += c p of each factor is a transform by c I.
            changes = torch.cat([c_b * -batch.settings_b["lr"], c_a * -batch.settings_a["lr"]])
            batch.transform(torch.diag_embed(changes[:, None].expand(-1, batch.pairs[0].rank)), add=True)

    def _coefficients(self, batch: Batch) -> Tensor:
        """Returns the gradient of λ ℓ² divided by the factor, which is one number for each factor: (2L,)."""
        ka, kb, *_ = batch.grams()
        entries_a = batch.per_pair("entries_a", lambda pair: pair.rank * pair.a.shape[1])
        entries_b = batch.per_pair("entries_b", lambda pair: pair.rank * pair.b.shape[0])
        return batch.ops.scale_reg(ka, kb, entries_a, entries_b, self.lam, self.eps)
