"""RefLoRA (Zhang, Li, Giannakis, NeurIPS 2025, arXiv 2505.18877): AdamW gets the gradients that the balanced factors of
the same product would have. The factors are not changed. Notation: the paper's A, Bᵀ are b, a.

    S = Kb⁻¹ # Ka, the SPD solution of S Kb S = Ka        da ← S da        db ← db S⁻¹        then AdamW

To first order, a step of gradient descent then changes the product in the same way for every split b X, X⁻¹ a of it.
The balanced factors are BaLoRA's b T, T⁻¹ a with T Tᵀ = S. A pair's gradients are not changed while b = 0 or while a
does not have full rank. The authors' code has three options that are not implemented here: it can skip a number of
first steps (100 in its example), apply S every few steps only, and use a scalar S, which changes the factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..batches.batch import Batch
from ..ops.pairs import refactor
from .method import Method


@dataclass(frozen=True)
class RefLoRA(Method):
    """AdamW on the gradients of the balanced factors."""

    def before(self, batch: Batch) -> None:
        ka, kb, *_ = batch.grams()
        s, s_inverse = refactor(ka, kb)
        batch.transform_gradients(torch.cat([s_inverse, s]))
