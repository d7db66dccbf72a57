"""BaLoRA (Castin, Nadjahi, Ablin, Peyré, arXiv 2605.31484): after a step, the factors of the same product that are
balanced, a aᵀ = bᵀb. Notation: the paper's A, B are b, a.

A pair whose b is 0 is left as it is: projecting it would kill both factors for good.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import checks, step
from ..stacks import Stack

TRANSPORTS = ("none", "m", "mv")


@dataclass(frozen=True)
class BaLoRA:
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

    def __post_init__(self) -> None:
        checks.count(self.every, "every")
        checks.choice(self.gauge, "gauge", step.GAUGES)
        checks.choice(self.transport, "transport", TRANSPORTS)

    def after(self, stacks: list[Stack], memory: dict) -> None:
        for stack in stacks:
            if stack.count % self.every:
                continue
            a, b = stack.a.value, stack.b.value
            t, t_inverse = step.hyperbalance(*step.grams(a, b)[:2], self.gauge)
            _left(a, t_inverse)
            _left(b.mT, t.mT)
            if self.transport != "none":
                _left(stack.a.state["exp_avg"], t.mT)
                _left(stack.b.state["exp_avg"].mT, t_inverse)
            if self.transport == "mv":
                _left(stack.a.state["exp_avg_sq"], t.mT.square())
                _left(stack.b.state["exp_avg_sq"].mT, t_inverse.square())


def _left(x: Tensor, matrices: Tensor) -> None:
    """x ← matrices x in place, (L, r, d)."""
    x.copy_(matrices @ step.wide(x))
