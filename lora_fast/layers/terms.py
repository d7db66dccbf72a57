"""The term that an adapter adds to a parameter, sums of terms, and fingerprints of values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element


class Term(NamedTuple):
    """The product that an adapter adds to a matrix: scaling · b a. A vector counts as a matrix with one column."""

    a: Tensor  # (r, d_in)
    b: Tensor  # (d_out, r)
    scaling: float


def negative(term: Term) -> Term:
    """Returns the term with which merging takes a term out again."""
    return term._replace(scaling=-term.scaling)


@torch.no_grad()
def merged_weight(weight: Tensor, terms: Iterable[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Returns weight + Σ scaling · b a, summed in float32 (float64 for a float64 weight) and rounded once to the
    weight's dtype.

    Args:
        weight: (d_out, d_in), or (d_out,) with d_in = 1.
        terms: a (r, d_in), b (d_out, r) and scaling of each adapter.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide).reshape(len(weight), -1)
    for a, b, scaling in terms:
        total = torch.addmm(total, b.to(wide), a.to(wide), alpha=scaling)
    return total.to(weight.dtype).view_as(weight)


def fingerprint(values: Tensor) -> Tensor:
    """Returns the sums of all columns and of all rows of the values' bits, as integers that wrap around: the same on
    every device, and others for every change that is no deliberate forgery."""
    bits = values.reshape(len(values), -1).view(INTEGERS[values.element_size()])
    return torch.cat([bits.sum(0, dtype=bits.dtype), bits.sum(1, dtype=bits.dtype)])
