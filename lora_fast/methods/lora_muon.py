"""LoRA-Muon (Cesista, Simal, Crowson, Biderman, arXiv 2606.12921, algorithm 1): steepest descent of the product b a in
the spectral norm. Notation: the paper's A, Bᵀ are b, a.

    m ← β m + (1−β) g for both factors        R = (a aᵀ)^-½        T = R (R m_bᵀ m_b R)^-½ R
    b ← (1 − η w) b − (η/2) m_b T             a likewise, with bᵀb, m_a m_aᵀ, and T m_a

m_b R R a is m_b's part of the product's momentum, and −(η/2) m_b T a its orthogonal factor, of spectral norm η/2: each
side takes half of the step. The momentum is the paper's, an average without Nesterov's look-ahead. While b = 0, a does
not move.

Three things differ from the paper. Its weight decay multiplies both factors by √(1 − η w) and their moves by the
inverse, so that the product decays by 1 − η w; here each factor decays as AdamW's do, and the product by (1 − η w)².
Its roots are Newton–Schulz iterations with a small diagonal term; here they are exact for Grams with ``damping`` times
their trace on the diagonal. Its optional rebalancing of the factors, which does not change the product's step, is left
out.

The damping matters: only the first order of the product's step is bounded. A direction in which b has the singular
value σ lets a move by η/(2σ), and Δb Δa, the second order, grows without bound as σ falls, as after a first step whose
gradient has not full rank. With damping ρ, a moves by at most η / (2 √ρ ‖b‖), and b likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..batches.batch import Batch, Shapes
from ..batches.pairs import Pair
from .method import Method


@dataclass(frozen=True)
class LoRAMuon(Method):
    """Orthogonalised momentum of the product, with the optimizer's learning rate and weight decay; its betas and eps
    are not used. The state is the momentum alone, half of AdamW's.

    The learning rate η is the spectral norm of a step of b a, so the effective weight moves by s η: between ranks, keep
    s = alpha / r.

    Args:
        beta: β of the momentum, from 0 to below 1.
        damping: what is added to the diagonals of the four Grams, relative to their traces; at least 16 ε. The
            default is this library's.
    """

    beta: float = 0.95
    damping: float = 3e-4

    replaces_adamw = True

    def __post_init__(self) -> None:
        checks.beta(self.beta)
        checks.positive(self.damping, "damping")

    def layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        return {"exp_avg": (pair.a.shape, pair.a.dtype)}, {"exp_avg": (pair.b.shape, pair.b.dtype)}

    def update(self, batch: Batch) -> None:
        grams = batch.momentum(self.beta)
        batch.move(batch.ops.muon(*grams[:4], batch.settings_a["lr"], batch.settings_b["lr"], self.damping))
