"""RefLoRA (Zhang, Li, Giannakis, NeurIPS 2025, arXiv 2505.18877): the gradients that the balanced factors of the same
product would have, while the factors stay as they are. Notation: the paper's A, Bᵀ are b, a.

    S = Kb⁻¹ # Ka, the SPD solution of S Kb S = Ka        da ← S da        db ← db S⁻¹        then AdamW

To first order, a step of gradient descent then moves the product in the same way whatever b X, X⁻¹ a it is split into.
The balanced factors are BaLoRA's b T, T⁻¹ a with T Tᵀ = S. A pair's gradients stay as they are while b = 0 or a has not
full rank. The authors' code can leave out a number of first steps (100 in its example), apply S every few steps only,
and has a variant with a scalar S, which moves the factors; this has none of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..batches.batch import Batch
from ..ops import pairs as pair_ops
from .method import Method


@dataclass(frozen=True)
class RefLoRA(Method):
    """AdamW on the gradients of the balanced factors."""

    def before(self, batch: Batch) -> None:
        ka, kb, *_ = batch.grams()
        s, s_inverse = pair_ops.refactor(ka, kb)
        batch.transform_gradients(torch.cat([s_inverse, s]))
