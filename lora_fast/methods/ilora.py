"""iLoRA, "Imbalance-Regularized LoRA" (Zhu, Wu, Gu, Cevher), equations (4), (5): after AdamW, outside its moments,

    D = a aᵀ − ρ bᵀb        a −= h D a        b += h ρ b D        h = lr · λ, each factor's own learning rate

both from the factors AdamW left. Notation: the paper's A, B, m, n are a, b, d_out, d_in. h is clipped to where the step
is stable: h (1+ρ) max(σ₁(a)², ρ σ₁(b)²) ≤ 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks, step
from ..stacks import Stack


@dataclass(frozen=True)
class ILoRA:
    """Decoupled regularisation of the imbalance between the factors.

    Args:
        lam: λ; its effect is lr · λ a step. The paper uses 10 (GPT-2) and 0.01 to 100 (Mistral).
        rho: ρ; None for ``rho_scale`` · (r / d_out) ** ``rho_exponent``, of which the paper's is r / d_out.
    """

    lam: float = 0.1
    rho: float | None = None
    rho_scale: float = 1.0
    rho_exponent: float = 1.0

    def __post_init__(self) -> None:
        checks.nonnegative(self.lam, "lam")
        if self.rho is not None:
            checks.positive(self.rho, "rho")
        checks.positive(self.rho_scale, "rho_scale")
        checks.nonnegative(self.rho_exponent, "rho_exponent")

    def ratio(self, r: int, d_out: int) -> float:
        return self.rho_scale * (r / d_out) ** self.rho_exponent if self.rho is None else self.rho

    def after(self, stacks: list[Stack], memory: dict) -> None:
        for stack in stacks:
            a, b = stack.a.value, stack.b.value
            h_a, h_b = stack.a.settings["lr"] * self.lam, stack.b.settings["lr"] * self.lam
            step.imbalance_step_(a, b, self.ratio(*b.shape[:0:-1]), h_a, h_b)
