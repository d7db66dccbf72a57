"""The room that a norm-bounded layer leaves below its bound for the rounding of 16-bit products, so that the norm of ΔW
as the layer applies it, layer(I) with a zero weight, is within the bound.

Math      Three roundings lie between the factors and the output: a (or S = x aᵀ), b and the output. With u the unit
          roundoff, each lengthens an entry by at most u, so rounding that lengthens all entries alike takes (1 + u)³.
          Rounding errors of different sizes and signs hardly change the spectral and the Frobenius norm. But those of
          the output are a matrix of full rank, of Frobenius norm 0.42 u ‖ΔW‖_F. With m the smaller side of ΔW they add
          up to 0.38 u √m ‖sv‖_F to the nuclear norm. ‖sv‖_F is at most ‖sv‖_*, or ‖sv‖_* / √r if all sv are equal.
          float16 has a least spacing s, 2⁻²⁴. Errors of up to s / 2 in m × n entries, whatever their size, add up to
          0.29 s (√m + √n), 0.29 s √(m n) and 0.25 s m √n to the three norms. A bound that is not well above that cannot
          hold; the room for it is at most half of the bound.
Source    Measured at ranks from 1 to 64 and sides from 32 to 2048, for equal, decaying, few and single sv: together at
          most 1.1 u (spectral), 0.4 u (Frobenius), and (nuclear) 0.32 u √m with one to three sv, 0.38 u √(m / r) with r
          equal ones.
"""

from __future__ import annotations

import torch

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LEAST_SPACING = {torch.float16: 2.0**-24}  # bfloat16's is that of float32, far below any bound
OUTPUT = 0.3  # of u √m: with (1 + u)³ as much nuclear norm as the output's rounding adds, relative to ‖sv‖_F


def usable_bound(dtype: torch.dtype, bound: float, power: float, sides: tuple[int, int], equal_values: int) -> float:
    """Returns the bound on the exact ΔW with which the applied ΔW is within ``bound``.

    Args:
        dtype: in which the layer's products run.
        bound, power: of the layer; power is 1/p of the norm.
        sides: d_in and d_out.
        equal_values: r where all singular values are fixed to equal shares of the bound, else 1.
    """
    u, spacing = UNIT_ROUNDOFF.get(dtype, 0.0), LEAST_SPACING.get(dtype, 0.0)
    m, n = sorted(sides)
    spread = OUTPUT * u * (m / equal_values) ** 0.5 if power == 1 else 0.0
    added = {0.0: m**0.5 + n**0.5, 0.5: (m * n) ** 0.5, 1.0: m * n**0.5}[power]
    return bound / ((1.0 + u) ** 3 * (1.0 + spread)) - min(0.3 * spacing * added, 0.5 * bound)
