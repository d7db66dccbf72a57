"""πLoRA (Zhu, Wu, Gu, Cevher): scaled AdamW, then the step of iLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..stacks import Stack
from .ilora import ILoRA
from .scaled_adamw import ScaledAdamW


@dataclass(frozen=True)
class PiLoRA:
    """Gradients in the metric of the other factor, and regularisation of the imbalance; as ScaledAdamW and ILoRA.

    Args:
        lam: λ of iLoRA; the paper uses 1 (GPT-2, learning rate 7e-4, betas 0.7 and 0.8, weight decay 0.01).
        damping: δ of the preconditioner, above 0.
    """

    lam: float = 1.0
    damping: float = 1e-6

    def __post_init__(self) -> None:
        checks.nonnegative(self.lam, "lam")
        checks.positive(self.damping, "damping")

    def before(self, stacks: list[Stack], memory: dict) -> None:
        ScaledAdamW(self.damping).before(stacks, memory)

    def after(self, stacks: list[Stack], memory: dict) -> None:
        ILoRA(self.lam).after(stacks, memory)
