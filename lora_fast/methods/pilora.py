"""πLoRA (Zhu, Wu, Gu, Cevher): scaled AdamW, followed by the step of iLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..batches.batch import Batch
from .ilora import ILoRA
from .method import Method
from .scaled_adamw import ScaledAdamW


@dataclass(frozen=True)
class PiLoRA(Method):
    """Gradients in the metric of the other factor, and regularisation of the imbalance: ScaledAdamW and ILoRA together.

    Args:
        lam: λ of iLoRA. The paper uses 1 (GPT-2, learning rate 7e-4, betas 0.7 and 0.8, weight decay 0.01).
        damping: δ of the preconditioner, above 0, as in ``ScaledAdamW``.
    """

    lam: float = 1.0
    damping: float = 0.1

    has_after = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative(self.lam, "lam")
        checks.positive(self.damping, "damping")

    def before(self, batch: Batch) -> None:
        ScaledAdamW(self.damping).before(batch)

    def after(self, batch: Batch) -> None:
        ILoRA(self.lam).after(batch)
