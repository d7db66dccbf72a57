"""Records that cross the border between the kernels and the code around them, readable without Triton."""

from typing import NamedTuple

from torch import Tensor


class Grams(NamedTuple):
    """The r×r Grams of L pairs, each (L, r, r) in float32 (float64 of float64 pairs), or None where not computed."""

    ka: Tensor | None  # a aᵀ
    kb: Tensor | None  # bᵀb
    kp: Tensor | None = None  # da daᵀ
    kq: Tensor | None = None  # dbᵀdb
    k: Tensor | None = None  # da aᵀ


class StepWork(NamedTuple):
    """What an adapter step does to each of n factors besides AdamW, in this order. None leaves a part out. R is the
    largest rank. Numbers beyond a factor's own rank are ignored.

    Attributes:
        additive: c (n,): g ← g + c p.
        matrices: M (n, R, R): g ← M g for an a, g ← g M for a b.
        scale_p, scale_g: d and e (n, R), one number for each rank row of an a and each column of a b: p ← d p, g ← e g,
            m ← e m, v ← e² v. Both are given, or neither.
        gram: whether the Grams of the new factors are returned.
    """

    additive: Tensor | None = None
    matrices: Tensor | None = None
    scale_p: Tensor | None = None
    scale_g: Tensor | None = None
    gram: bool = False
