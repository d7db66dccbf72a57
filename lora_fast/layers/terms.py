"""The term that an adapter adds to a parameter, sums of terms, and fingerprints of values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element


class Term(NamedTuple):
    """The product that an adapter adds to a matrix: scaling · b a. A vector counts as a matrix with one column.

    DoRA's term also scales the sum of both, so that the matrix has no other one.
    """

    a: Tensor  # (r, d_in)
    b: Tensor  # (d_out, r)
    scaling: float
    scale: Tensor | None = None  # DoRA's, (d_out, 1), or (1, d_in) for a matrix that is stored transposed

    def copied(self) -> Term:
        """Returns a copy that later changes of the adapter do not reach."""
        scale = None if self.scale is None else self.scale.clone()
        return Term(self.a.detach().clone(), self.b.detach().clone(), self.scaling, scale)


@torch.no_grad()
def merged_weight(weight: Tensor, terms: Iterable[Term]) -> Tensor:
    """Returns weight + Σ scaling · b a, or DoRA's scale∘(weight + scaling · b a), computed in float32 (float64 for a
    float64 weight) and rounded once to the weight's dtype.

    Args:
        weight: (d_out, d_in), or (d_out,) with d_in = 1.
        terms: one for each adapter.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide).reshape(len(weight), -1)
    for a, b, scaling, scale in terms:
        total = torch.addmm(total, b.to(wide), a.to(wide), alpha=scaling)
        if scale is not None:
            total = total * scale.to(wide)
    return total.to(weight.dtype).view_as(weight)


@torch.no_grad()
def without_terms(weight: Tensor, terms: Iterable[Term]) -> Tensor:
    """Returns the weight from which ``merged_weight`` gives this one, up to rounding, by PEFT's arithmetic."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide).reshape(len(weight), -1)
    for a, b, scaling, scale in terms:
        if scale is not None:
            total = total / scale.to(wide)
        total = torch.addmm(total, b.to(wide), a.to(wide), alpha=-scaling)
    return total.to(weight.dtype).view_as(weight)


def fingerprint(values: Tensor) -> Tensor:
    """Returns the sums of all columns and of all rows of the values' bits, as integers that wrap around: the same on
    every device, and others for every change that is no deliberate forgery."""
    bits = values.reshape(len(values), -1).view(INTEGERS[values.element_size()])
    return torch.cat([bits.sum(0, dtype=bits.dtype), bits.sum(1, dtype=bits.dtype)])
