"""Records passed between the kernels and the code around them. This module does not import Triton."""

from typing import NamedTuple

from torch import Tensor


class Grams(NamedTuple):
    """The r×r Gram matrices of L pairs, each (L, r, r) in float32 (in float64 for float64 pairs). A Gram that was not
    requested is None."""

    ka: Tensor | None  # a aᵀ
    kb: Tensor | None  # bᵀb
    kp: Tensor | None = None  # da daᵀ
    kq: Tensor | None = None  # dbᵀdb
    k: Tensor | None = None  # da aᵀ


class StepWork(NamedTuple):
    """The operations that an adapter step applies to each of n factors before AdamW, in this order.

    None skips an operation. R is the largest rank of the n factors; values beyond a factor's own rank are ignored.

    Attributes:
        additive: c (n,): g ← g + c p.
        matrices: M (n, R, R): g ← M g for an a, g ← g M for a b.
        scale_p, scale_g: d and e (n, R), one number for each row of an a and each column of a b: p ← d p, g ← e g,
            m ← e m, v ← e² v. Either both are given or neither.
        gram: whether the step returns the Grams of the new factors.
    """

    additive: Tensor | None = None
    matrices: Tensor | None = None
    scale_p: Tensor | None = None
    scale_g: Tensor | None = None
    gram: bool = False
