"""LoRA-RITE (Yen et al., arXiv 2410.20625): an update that does not depend on how the product is split.

With aᵀ = U_a R_a and b = U_b R_b (QR), for a (and for bᵀ with the roles exchanged):

    g = R_b⁻ᵀ da, clipped together with all others to norm 1        P = U_bᵀ U_b,old
    V = β₂ P V Pᵀ + (1−β₂) g gᵀ/d_in        m = β₁ P m + (1−β₁) (V^½ + ε)⁻¹ g        a −= lr (R_b⁻¹ m + wd a)

betas bias-corrected: β (1−β^{t−1}) / (1−βᵗ); inverses are pseudo-inverses, so that b = 0 gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..batches.batch import Shapes
from ..batches.pairs import Pair
from ..batches.stacked import Factor, StackedBatch
from ..ops import pairs as pair_ops
from ..ops.pairs import at_least_float32
from .method import Method


@dataclass(frozen=True)
class LoRARITE(Method):
    """An update of its own, with the optimizer's learning rate, betas and weight decay.

    Args:
        eps: ε, in the place of the optimizer's.
        clip: global norm to which the unmagnified gradients are clipped.
    """

    eps: float = 1e-6
    clip: float = 1.0

    replaces_adamw = True
    needs_stacks = True

    def __post_init__(self) -> None:
        checks.positive(self.eps, "eps")
        checks.positive(self.clip, "clip")

    def layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        dtype = torch.promote_types(pair.a.dtype, torch.float32)
        r, d_in, d_out = pair.rank, pair.a.shape[1], pair.b.shape[0]
        each = (pair.experts,) if pair.experts > 1 else ()
        square = ((*each, r, r), dtype)
        return (
            {"exp_avg": (pair.a.shape, dtype), "second_moment": square, "basis": ((*each, d_out, r), dtype)},
            {"exp_avg": (pair.b.shape, dtype), "second_moment": square, "basis": ((*each, d_in, r), dtype)},
        )

    def before_all(self, stacks: list[StackedBatch], memory: dict) -> None:
        sides = []  # factor, its settings, its (L, r, d) value, gradient and moment, the other factor's U and R⁻¹
        for stack in stacks:
            a, b = stack.a, stack.b
            da, db = a.gradient(), b.gradient()
            u_b, _, inverse_b = pair_ops.rite_factor(b.value)
            u_a, _, inverse_a = pair_ops.rite_factor(a.value.mT)
            moment_a, moment_b = a.state["exp_avg"], b.state["exp_avg"].mT
            settings_a, settings_b = stack.settings_a, stack.settings_b
            sides.append((a, settings_a, a.value, inverse_b.mT @ at_least_float32(da), moment_a, u_b, inverse_b))
            sides.append((b, settings_b, b.value.mT, inverse_a.mT @ at_least_float32(db).mT, moment_b, u_a, inverse_a))
        device = sides[0][3].device
        norm = torch.stack([side[3].square().sum().to(device) for side in sides]).sum().sqrt()
        clip = (self.clip / norm).clamp(max=1.0)
        for factor, settings, value, g, *rest in sides:
            self._move(factor, settings, value, g * clip.to(g.device), *rest)

    def _move(self, factor: Factor, settings: dict, value, g, moment, u, inverse) -> None:
        lr, weight_decay = settings["lr"], settings["weight_decay"]
        count = factor.steps.double()[:, None, None]
        betas = [beta * (1 - beta ** (count - 1)) / (1 - beta**count) for beta in settings["betas"]]
        state = factor.state
        m, v = pair_ops.rite_update(g, moment, state["second_moment"], u, state["basis"], *betas, self.eps)
        moment.copy_(m)
        state["second_moment"].copy_(v)
        state["basis"].copy_(u)
        value -= (lr * (inverse @ m + weight_decay * at_least_float32(value))).to(value.dtype)
