"""The room that a norm-bounded layer leaves below its bound for the rounding of 16-bit products, so that the norm of ΔW
as the layer applies it, layer(I) with a zero weight, is within the bound.

Math      Three roundings lie between the factors and the output: a (or S = x aᵀ), b and the output. With u the unit
          roundoff, each lengthens an entry by at most u, so rounding that lengthens all entries alike takes (1 + u)³.
          Rounding errors of different sizes and signs hardly change the spectral and the Frobenius norm. But those of
          the output are a matrix of full rank, of Frobenius norm 0.42 u ‖ΔW‖_F. With m the smaller side of ΔW they add
          up to 0.38 u √m ‖sv‖_F to the nuclear norm. ‖sv‖_F is at most ‖sv‖_*, or ‖sv‖_* / √r if all sv are equal.
Source    Measured at ranks from 1 to 64 and sides from 32 to 2048, for equal, decaying, few and single sv: together at
          most 1.1 u (spectral), 0.4 u (Frobenius), and (nuclear) 0.32 u √m with one to three sv, 0.38 u √(m / r) with r
          equal ones.
"""

from __future__ import annotations

import torch

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OUTPUT = 0.3  # of u √m: with (1 + u)³ as much nuclear norm as the output's rounding adds, relative to ‖sv‖_F


def usable_share(dtype: torch.dtype, nuclear: bool, smaller_side: int, equal_values: int) -> float:
    """Returns the share of the bound that the exact ΔW may use.

    Args:
        dtype: in which the layer's products run.
        nuclear: whether the bound is on the nuclear norm.
        smaller_side: the smaller of d_in and d_out.
        equal_values: r where all singular values are fixed to equal shares of the bound, else 1.
    """
    u = UNIT_ROUNDOFF.get(dtype, 0.0)
    spread = OUTPUT * u * (smaller_side / equal_values) ** 0.5 if nuclear else 0.0
    return 1.0 / ((1.0 + u) ** 3 * (1.0 + spread))
