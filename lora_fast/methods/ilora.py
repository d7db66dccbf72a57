"""iLoRA, "Imbalance-Regularized LoRA" (Zhu, Wu, Gu, Cevher), equations (4), (5). After AdamW and outside its moments:

    D = a aᵀ − ρ bᵀb        a −= h D a        b += h ρ b D        h = lr · λ, each factor's own learning rate

with D from the factors after AdamW in both. Notation: the paper's A, B, m, n are a, b, d_out, d_in. h is clipped so
that the step is stable: h (1+ρ) max(σ₁(a)², ρ σ₁(b)²) ≤ 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..batches.batch import Batch
from ..batches.pairs import Pair
from .method import Method


@dataclass(frozen=True)
class ILoRA(Method):
    """Decoupled regularisation of the imbalance between the factors.

    Args:
        lam: λ. Its effect is lr · λ a step. The paper uses 10 (GPT-2) and 0.01 to 100 (Mistral).
        rho: ρ, or None for ``rho_scale`` · (r / d_out) ** ``rho_exponent``. The paper's is r / d_out.
    """

    lam: float = 0.1
    rho: float | None = None
    rho_scale: float = 1.0
    rho_exponent: float = 1.0

    has_after = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative(self.lam, "lam")
        if self.rho is not None:
            checks.positive(self.rho, "rho")
        checks.positive(self.rho_scale, "rho_scale")
        checks.nonnegative(self.rho_exponent, "rho_exponent")

    def after(self, batch: Batch) -> None:
        ka, kb, *_ = batch.grams()  # of the factors after AdamW, since has_after is set
        lr_a, lr_b = batch.settings_a["lr"], batch.settings_b["lr"]
        rho = batch.per_pair("rho", self._ratio)
        batch.transform(batch.ops.imbalance(ka, kb, rho, lr_a, lr_b, self.lam), add=True)

    def _ratio(self, pair: Pair) -> float:
        ratio = pair.rank / pair.b.shape[0]
        return self.rho_scale * ratio**self.rho_exponent if self.rho is None else self.rho
