"""Scale regularization (Tan, "Scale Regularization for Stable Low-Rank Adaptation"): λ Σ ℓ² added to the loss, with

    ℓ = log(‖a‖² / (r d_in)) − log(‖b‖² / (r d_out) + ε)
    da += 4 λ ℓ a / ‖a‖²        db −= 4 λ ℓ b / (‖b‖² + ε r d_out)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import checks, step
from ..stacks import Stack


@dataclass(frozen=True)
class ScaleReg:
    """Pulls the mean squares of the two factors together.

    Args:
        lam: λ.
        eps: ε, above 0.
        decoupled: subtract the learning rate times this gradient from the factors after AdamW, outside its moments. In
            the loss, Adam's first step moves every entry of a by about the learning rate whatever λ is.
    """

    lam: float = 1e-3
    eps: float = 1e-6
    decoupled: bool = False

    def __post_init__(self) -> None:
        checks.nonnegative(self.lam, "lam")
        checks.positive(self.eps, "eps")
        checks.flag(self.decoupled, "decoupled")

    def before(self, stacks: list[Stack], memory: dict) -> None:
        if self.decoupled:
            return
        for stack in stacks:
            da, db = stack.gradients()
            c_a, c_b = self._coefficients(stack)
            da += c_a * stack.a.value
            db += c_b * stack.b.value

    def after(self, stacks: list[Stack], memory: dict) -> None:
        if not self.decoupled:
            return
        for stack in stacks:
            c_a, c_b = self._coefficients(stack)
            stack.a.value *= 1 - stack.a.settings["lr"] * c_a
            stack.b.value *= 1 - stack.b.settings["lr"] * c_b

    def _coefficients(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """(L, 1, 1) each: the gradient of λ ℓ² is c_a a, c_b b. 0 for a factor that is 0."""
        a, b = step.wide(stack.a.value), step.wide(stack.b.value)
        size_a, size_b = a.flatten(1).square().sum(-1)[:, None, None], b.flatten(1).square().sum(-1)[:, None, None]
        per_a, per_b = a[0].numel(), b[0].numel()
        tilt = 4 * self.lam * ((size_a / per_a).log() - (size_b / per_b + self.eps).log())
        c_a = (tilt / size_a).masked_fill(size_a == 0, 0.0)
        c_b = (-tilt / (size_b + self.eps * per_b)).masked_fill(size_a == 0, 0.0)
        return c_a, c_b
