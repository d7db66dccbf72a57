"""LoRA-RITE (Yen et al., arXiv 2410.20625): an update that does not depend on how the product is split into factors.

With aᵀ = U_a R_a and b = U_b R_b (QR), for a (and for bᵀ with the roles exchanged):

    g = R_b⁻ᵀ da, clipped to norm 1 over all g together        P = U_bᵀ U_b,old
    V = β₂ P V Pᵀ + (1−β₂) g gᵀ/d_in        m = β₁ P m + (1−β₁) (V^½ + ε)⁻¹ g        a −= lr (R_b⁻¹ m + wd a)

The betas are bias-corrected, β (1−β^{t−1}) / (1−βᵗ). The inverses are pseudo-inverses, so that b = 0 gives 0. Singular
values below 1e-3 of the largest (7.8e-3 in bfloat16) count as 0. They may be rounding errors, and a division by them
moves a so far that Δb Δa exceeds the step. R_b is (k, r) with k = min(r, d_out), V is (k, k) and m is (k, d_in).

A pair whose gradients, factors or state are not finite becomes NaN. It is left out of the common norm, so that the
other pairs step as if it had no gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..batches.batch import Shapes
from ..batches.pairs import Pair
from ..batches.stacked import Factor, StackedBatch
from ..ops.pairs import at_least_float32, rite_factor, rite_update
from .method import Method


@dataclass(frozen=True)
class LoRARITE(Method):
    """LoRA-RITE's update, with the optimizer's learning rate, betas and weight decay.

    Args:
        eps: ε; the optimizer's is not used.
        clip: the global norm to which the unmagnified gradients g are clipped.
    """

    eps: float = 1e-6
    clip: float = 1.0

    replaces_adamw = True
    needs_stacks = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive(self.eps, "eps")
        checks.positive(self.clip, "clip")

    def layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        dtype = torch.promote_types(pair.a.dtype, torch.float32)
        r, d_in, d_out = pair.rank, pair.a.shape[1], pair.b.shape[0]
        experts = (pair.experts,) if pair.experts > 1 else ()

        def state(p: Tensor, moment: tuple[int, int], d_other: int, k: int) -> Shapes:
            """Returns the state of a factor p, with k = min(r, d_other)."""
            shapes = {
                "exp_avg": p.shape if k == r else (*experts, *moment),  # where they agree, p's form is torch's
                "second_moment": (*experts, k, k),
                "basis": (*experts, d_other, k),
            }
            return {name: (shape, dtype) for name, shape in shapes.items()}

        k_b, k_a = min(r, d_out), min(r, d_in)
        return state(pair.a, (k_b, d_in), d_out, k_b), state(pair.b, (d_out, k_a), d_in, k_a)

    def before_all(self, batches: list[Any], memory: dict) -> None:
        """Updates all factors here, since the gradients of all pairs are clipped together. The batches are stacks,
        since the method needs them."""
        stacks = [_sides(stack) for stack in batches]
        device = stacks[0][0].g.device  # a model may be spread over devices
        norm = torch.stack([_squared_norm(sides).to(device) for sides in stacks]).sum().sqrt()
        clip = (self.clip / norm).clamp(max=1.0)
        for side in chain(*stacks):
            self._move(side, side.g * clip.to(side.g.device))

    def _move(self, side: Side, g: Tensor) -> None:
        lr, weight_decay = side.settings["lr"], side.settings["weight_decay"]
        # In float64, since 1 − β₂ has few digits in float32. At the first step both betas are 0.
        count = side.factor.steps.double()[:, None, None]
        beta1, beta2 = (beta * (1 - beta ** (count - 1)) / (1 - beta**count) for beta in side.settings["betas"])
        state = side.factor.state
        m, v = rite_update(g, side.moment, state["second_moment"], side.basis, state["basis"], beta1, beta2, self.eps)
        value, factor = at_least_float32(side.value), side.factor
        value = value - lr * (side.inverse @ m + weight_decay * value)
        changes = (side.moment, m), (state["second_moment"], v), (state["basis"], side.basis)
        for stack, values in (*changes, (factor.value, factor.round(value if factor.is_a else value.mT))):
            factor.write(stack, values)


class Side(NamedTuple):
    """The tensors of one factor of a stack. Those of b are transposed, so that both factors have one formula.

    Attributes:
        factor: the a or b of the stack. settings: lr, betas, eps and weight_decay of its parameter group.
        value: the factor, (L, r, d), a view. g: its unmagnified gradient, (L, k, d), where k is the smaller of r and
            the other factor's d. moment: its state m, a view, (L, k, d).
        basis, inverse: U (L, the other factor's d, k) and R⁻¹ (L, r, k) of the other factor.
    """

    factor: Factor
    settings: dict
    value: Tensor
    g: Tensor
    moment: Tensor
    basis: Tensor
    inverse: Tensor


def _sides(stack: StackedBatch) -> tuple[Side, Side]:
    """Returns the sides of a and of b. A moment's transposed view shares its memory, so that writing to it is
    enough."""
    a, b = stack.a, stack.b
    u_b, inverse_b = rite_factor(b.value)
    u_a, inverse_a = rite_factor(a.value.mT)
    g_a = inverse_b.mT @ at_least_float32(a.gradient())
    g_b = inverse_a.mT @ at_least_float32(b.gradient()).mT
    return (
        Side(a, stack.settings_a, a.value, g_a, a.state["exp_avg"], u_b, inverse_b),
        Side(b, stack.settings_b, b.value.mT, g_b, b.state["exp_avg"].mT, u_a, inverse_a),
    )


def _squared_norm(sides: tuple[Side, Side]) -> Tensor:
    """Returns the sum of squares, in float64, of all entries of g of a stack. A product whose g or state is not finite
    in both factors counts as 0, so that it does not change the steps of the others."""
    squares = sum(torch.linalg.vector_norm(side.g, dim=(1, 2), dtype=torch.float64).square() for side in sides)
    states = [x.sum((1, 2)) for side in sides for x in (side.moment, side.factor.state["second_moment"])]
    return torch.where((squares + sum(states)).isfinite(), squares, 0.0).sum()
