"""Records that the kernels exchange with the code around them. This module does not import Triton."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Grams(NamedTuple):
    """The r×r Grams of L pairs: (L, r, r) in float32 (float64 for float64 pairs). The Grams with gradients are
    None where not computed."""

    ka: Tensor  # a aᵀ
    kb: Tensor  # bᵀb
    kp: Tensor | None = None  # da daᵀ
    kq: Tensor | None = None  # dbᵀdb
    k: Tensor | None = None  # da aᵀ


class Scaled(NamedTuple):
    """The scales by which n pairs are multiplied after a merge, b ← b diag(alpha) and a ← diag(beta) a, in float32.

    Attributes:
        scaling: alpha / r of each adapter, (n,), or a number and rows (R,) for one pair.
        alpha, beta: (n, R).
    """

    scaling: Tensor | float
    alpha: Tensor
    beta: Tensor


class StepWork(NamedTuple):
    """The changes that an adapter step makes to each of n factors besides AdamW, in the order of the attributes. None
    omits a change. R is the largest rank. Entries beyond a factor's own rank are ignored.

    Attributes:
        additive: c (n,), for g ← g + c p.
        matrices: M (n, R, R), for g ← M g of an a and g ← g M of a b.
        scale_p, scale_g: d and e (n, R), with one entry for each row of an a or column of a b, for p ← d p, g ← e g,
            m ← e m and v ← e² v. Both are given, or neither.
        gram: whether the Grams of the new factors are returned.
        keys: int64 (n,), with which new factors of 16 bits are rounded stochastically. The noise depends on a factor's
            key, its number of steps and the element alone. None rounds to nearest.
    """

    additive: Tensor | None = None
    matrices: Tensor | None = None
    scale_p: Tensor | None = None
    scale_g: Tensor | None = None
    gram: bool = False
    keys: Tensor | None = None


class NestedScales(NamedTuple):
    """The second quantisation of a ``FourBit``, that of its absmax."""

    code: Tensor  # float32 (256,)
    absmax: Tensor  # float32, one for each blocksize elements of the first absmax
    offset: Tensor  # float32, one element
    blocksize: int = 256


class FourBit(NamedTuple):
    """A weight W (d_out, d_in) in bitsandbytes' 4 bits."""

    packed: Tensor  # of any dtype and shape, contiguous; its bytes hold two elements each
    code: Tensor  # float32 (16,)
    absmax: Tensor  # one for each blocksize elements of W: float32, or uint8 if there is a second quantisation
    blocksize: int
    shape: tuple[int, int]
    nested: NestedScales | None = None


class AdapterTable(NamedTuple):
    """The adapters of one layer that a batch chooses among.

    Attributes:
        lora_A, lora_B: a (r, d_in) and b (d_out, r) of each adapter, contiguous, of one dtype; the ranks may differ.
        scaling: of each adapter.
        r: the largest rank.
        entries: int64 (n_adapters, 4), the table that the kernels read (kernels/batched), None for their twins.
        aligned: whether all factors start at multiples of 16 bytes, for the kernels.
    """

    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: Sequence[float]
    r: int
    entries: Tensor | None = None
    aligned: bool = False
