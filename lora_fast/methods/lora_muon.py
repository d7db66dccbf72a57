"""LoRA-Muon (Cesista, Simal, Crowson, Biderman, arXiv 2606.12921, algorithm 1): steepest descent of the product b a in
the spectral norm. Notation: the paper's A, Bᵀ are b, a.

    m ← β m + (1−β) g for both factors        R = (a aᵀ)^-½        T = R (R m_bᵀ m_b R)^-½ R
    b ← (1 − η w) b − (η/2) m_b T             likewise for a, with bᵀb, m_a m_aᵀ and T m_a

m_b R R a is the part of the product's momentum that belongs to m_b. −(η/2) m_b T a is η/2 times its orthogonal factor,
so each factor contributes half of the step. The momentum is the paper's, an average without Nesterov's look-ahead.
While b = 0, a does not move.

Three things differ from the paper. The paper's weight decay multiplies both factors by √(1 − η w) and their changes by
the inverse, so that the product decays by 1 − η w; here each factor decays as in AdamW, and the product by (1 − η w)².
The paper's roots are Newton–Schulz iterations with a small diagonal term; here they are exact for Grams with
``damping`` times their trace on the diagonal. The paper's optional rebalancing of the factors, which does not change
the product's step, is omitted.

The damping is needed because only the first order of the product's step is bounded. Along a direction in which b has
the singular value σ, a moves by up to η/(2σ). The second order, Δb Δa, then grows without bound as σ falls, for example
after a first step whose gradient does not have full rank. With damping ρ, a moves by at most η / (2 √ρ ‖b‖), and
likewise b.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..batches.batch import Batch, Shapes
from ..batches.pairs import Pair
from .method import Method


@dataclass(frozen=True)
class LoRAMuon(Method):
    """Orthogonalised momentum of the product, with the optimizer's learning rate and weight decay. The optimizer's
    betas and eps are not used. The state is the momentum alone, half of AdamW's.

    The learning rate η is the spectral norm of a step of b a, so a step changes the effective weight by s η. Keep
    s = alpha / r constant when the rank changes.

    Args:
        beta: β of the momentum, from 0 to below 1.
        damping: the term that is added to the diagonals of the four Grams, relative to their traces; values below 16 ε
            count as 16 ε. The default is this library's choice.
    """

    beta: float = 0.95
    damping: float = 3e-4

    replaces_adamw = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.beta(self.beta)
        checks.positive(self.damping, "damping")

    def layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        return {"exp_avg": (pair.a.shape, pair.a.dtype)}, {"exp_avg": (pair.b.shape, pair.b.dtype)}

    def update(self, batch: Batch) -> None:
        grams = batch.momentum(self.beta)
        lr_a, lr_b = batch.settings_a["lr"], batch.settings_b["lr"]
        batch.move(batch.ops.muon(grams.ka, grams.kb, grams.kp, grams.kq, lr_a, lr_b, self.damping))
