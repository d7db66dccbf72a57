"""Nonnegative least squares of one program: min ½zᵀMz − rhsᵀz over z ≥ 0, M positive semidefinite with a unit diagonal.

Math      Block pivoting: solve on the free coordinates (with a ridge of 1e-7), then exchange between free and 0 every
          coordinate whose value or slope has the wrong sign. When their number has not fallen for three rounds, only
          the last such coordinate is exchanged, which ends after finitely many rounds (Júdice & Pires, Comput. Oper.
          Res. 1994; Kim & Park, SIAM J. Sci. Comput. 2011). A slope within rounding of 0 counts as 0. Where M is
          singular to rounding, its factorization breaks down, and the round is repeated with ten times the ridge.
Grid      A whole program solves one system; the caller chooses the grid (pairs/scalora_system.py).
Shapes    M (n, n) float32, either a block [BLOCK_N, BLOCK_N] in registers, factored LDLᵀ column by column, or in memory
          with a second matrix for its factor, which blocked.py computes.
Roofline  n³/3 operations and 2 n dependent column steps a solve: latency bound.
"""

import triton
import triton.language as tl

from .. import limits
from ..primitives import div_rn, take_row
from .blocked import cholesky, cholesky_solve

RIDGE = tl.constexpr(limits.RIDGE)
ROUNDING = tl.constexpr(1e-6)  # of a slope, relative to the sum of its terms' sizes: 8 units in the last place
TRIES, ROUNDS = tl.constexpr(3), tl.constexpr(100)


@triton.jit
def solve_in_registers(b_unit, b_rhs, free, ridge, n, BLOCK_N: tl.constexpr):
    """Returns the solution on the free coordinates, 0 on the others, and whether the factorization broke down.

    The factorization is LDLᵀ, right-looking: afterwards row j of b_a, from its diagonal on, is the row of D Lᵀ.
    """
    i_n = tl.arange(0, BLOCK_N)
    b_a = tl.where((free[:, None] > 0) & (free[None, :] > 0), b_unit, 0.0)
    b_a = tl.where(i_n[:, None] == i_n[None, :], 1.0 + ridge, b_a)  # [BLOCK_N, BLOCK_N]
    b_z = tl.where(free > 0, b_rhs, 0.0)
    bad = 0
    for j in range(0, n):
        b_row = take_row(b_a, i_n, j)
        pivot = tl.sum(tl.where(i_n == j, b_row, 0.0), 0)
        bad = tl.where(pivot > 0.0, bad, 1)
        b_row = tl.where(i_n > j, b_row, 0.0)
        b_l = div_rn(b_row, pivot)
        b_a -= b_l[:, None] * b_row[None, :]
        b_z -= b_l * tl.sum(tl.where(i_n == j, b_z, 0.0), 0)
    for back in range(1, n + 1):
        j = n - back
        b_row = take_row(b_a, i_n, j)
        pivot = tl.sum(tl.where(i_n == j, b_row, 0.0), 0)
        solved = tl.sum(tl.where(i_n > j, b_row * b_z, 0.0), 0)
        b_z = tl.where(i_n == j, div_rn(b_z - solved, pivot), b_z)
    return b_z, bad


@triton.jit
def solve_in_memory(unit, upper, x, b_rhs, free, ridge, n, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """Returns what ``solve_in_registers`` does, for a system in memory. The solution is also stored at x (n,)."""
    i_n = tl.arange(0, BLOCK_N)
    m_n = i_n < n
    tl.debug_barrier()
    tl.store(x + i_n, free.to(tl.float32), mask=m_n)  # through memory, so that every thread can read any part of it
    tl.debug_barrier()
    for o in tl.range(0, n, CHUNK, num_stages=1):
        i_row = o + tl.arange(0, CHUNK)
        mask = (i_row < n)[:, None] & m_n[None, :]
        free_row = tl.load(x + i_row, mask=i_row < n, other=0.0)
        o_row = i_row[:, None] * n + i_n[None, :]
        b_a = tl.load(unit + o_row, mask=mask, other=0.0)  # [CHUNK, BLOCK_N]
        b_a = tl.where((free_row[:, None] > 0) & (free[None, :] > 0), b_a, 0.0)
        tl.store(upper + o_row, tl.where(i_row[:, None] == i_n[None, :], 1.0, b_a), mask=mask)
    tl.debug_barrier()
    tl.store(x + i_n, tl.where(free > 0, b_rhs, 0.0), mask=m_n)
    bad = cholesky(upper, upper, n, n, ridge, BLOCK_N)
    cholesky_solve(upper, x, x, n, 1, n, 1, 16)
    return tl.load(x + i_n, mask=m_n, other=0.0), bad


@triton.jit
def times_in_registers(b_unit, b_z):
    """Returns M z and Σ_j |M_ij z_j|; M is symmetric."""
    b_terms = b_unit * b_z[:, None]
    return tl.sum(b_terms, 0), tl.sum(tl.abs(b_terms), 0)


@triton.jit
def times_in_memory(unit, x, n, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """Returns what ``times_in_registers`` does, for M and z in memory."""
    i_n = tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([CHUNK, BLOCK_N], dtype=tl.float32)
    b_size = tl.zeros_like(b_sum)
    for o in tl.range(0, n, CHUNK, num_stages=1):
        i_row = o + tl.arange(0, CHUNK)
        mask = (i_row < n)[:, None] & (i_n < n)[None, :]
        b_terms = tl.load(unit + i_row[:, None] * n + i_n[None, :], mask=mask, other=0.0)
        b_terms *= tl.load(x + i_row, mask=i_row < n, other=0.0)[:, None]
        b_sum += b_terms
        b_size += tl.abs(b_terms)
    return tl.sum(b_sum, 0), tl.sum(b_size, 0)


@triton.jit
def solve(
    unit, upper, x,
    b_rhs, finite, n,
    EXCHANGE: tl.constexpr, REGISTERS: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Returns the z ≥ 0 with the least ½zᵀMz − rhsᵀz, or without EXCHANGE the unconstrained optimum with negative
    values set to 0; and 1 where the unconstrained optimum has a negative value or a number is not finite, else 0."""
    i_n = tl.arange(0, BLOCK_N)
    b_z = tl.zeros_like(b_rhs)
    free = (i_n < n).to(tl.int32)
    unfinished = finite.to(tl.int32)
    invalid, first, rounds = 1 - unfinished, 1, 0
    fewest, tries, ridge = n + 1, TRIES + 0, RIDGE + 0.0
    while (unfinished > 0) & (rounds < ROUNDS):
        if REGISTERS:
            b_z, bad = solve_in_registers(unit, b_rhs, free, ridge, n, BLOCK_N)
            b_mz, b_size = times_in_registers(unit, b_z)
        else:
            b_z, bad = solve_in_memory(unit, upper, x, b_rhs, free, ridge, n, BLOCK_N, CHUNK)
            b_mz, b_size = times_in_memory(unit, x, n, BLOCK_N, CHUNK)
        m_enters = b_rhs - b_mz > (tl.abs(b_rhs) + b_size) * ROUNDING
        wrong = tl.where(free > 0, b_z < 0.0, m_enters).to(tl.int32)
        n_wrong = tl.sum(wrong, 0)
        rounds += 1
        if bad > 0:
            ridge *= 10.0
        else:
            invalid = tl.where(first > 0, tl.minimum(n_wrong, 1), invalid)
            first = 0
            tries = tl.where(n_wrong < fewest, TRIES, tries - 1)
            fewest = tl.minimum(fewest, n_wrong)
            last = tl.max(tl.where(wrong > 0, i_n, -1), 0)
            free = tl.where((tries >= 0) | (i_n == last), free ^ wrong, free)
            unfinished = tl.where((n_wrong > 0) & EXCHANGE, 1, 0)
    return tl.where(b_z < 0.0, 0.0, b_z), invalid
