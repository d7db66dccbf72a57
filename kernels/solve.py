"""Batches of small matrices: SPD solves with damping, and inverses without pivoting.

Math      spd_solve: A + δI = L D Lᵀ (L unit lower triangular), then L y = rhs, Lᵀ x = D⁻¹ y. Backward stable without
          pivoting, because A is SPD; the first pivot that is not positive (or is NaN) ends it: info is its order, from
          1, and x is NaN.
          small_inverse: Gauss-Jordan without pivoting, where the symmetric part is at least I every pivot is at least
          1; then one refinement W ← 2W − W M W.
Grid      one program per matrix (and per BLOCK_K columns of the right-hand side), the matrix in registers. A bad
          matrix cannot touch its neighbours.
Shapes    (n, r, r) float32 contiguous, r up to 64; n any number. Larger matrices: torch.linalg (the twins).
Roofline  r³ operations on 4 r² bytes, one dependent step per column: latency bound; the batch hides it.
"""

import torch
import triton
import triton.language as tl

from .launch import on_device
from .primitives import dot

LARGEST = 64  # rank whose matrix fits in registers
RHS = 64  # columns of the right-hand side of one program, at most


@triton.jit
def column(b_matrix, i_col, j):
    """Column j of a block, by a sum of one term: [rows]."""
    return tl.sum(tl.where(i_col[None, :] == j, b_matrix, 0.0), 1)


@triton.jit
def row(b_matrix, i_row, j):
    return tl.sum(tl.where(i_row[:, None] == j, b_matrix, 0.0), 0)


@triton.jit
def product(lhs, rhs, r, BLOCK_R: tl.constexpr):
    """lhs @ rhs: float32 [BLOCK_R, BLOCK_R]. At 64, where a dot would spill, column by row."""
    b_product = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    if BLOCK_R < 64:
        b_product = dot(lhs, rhs, b_product, "ieee")
    else:
        i_r = tl.arange(0, BLOCK_R)
        for j in range(0, r):
            b_product += column(lhs, i_r, j)[:, None] * row(rhs, i_r, j)[None, :]
    return b_product


@triton.jit
def lora_spd_solve_kernel(
    matrices, rhs, solutions, info, ranks, damping, r, k,
    INVERSE: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """INVERSE: the right-hand side is I. RANKS: matrix i counts up to ranks[i], beyond it the solution is 0."""
    i_matrix = tl.program_id(0).to(tl.int64)
    i_r, i_row = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_R)[:, None]
    i_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    own = tl.load(ranks + i_matrix) if RANKS else r
    inside = (i_row < own) & (i_r[None, :] < own)
    p_matrix = matrices + i_matrix * r * r + i_row * r + i_r[None, :]
    b_a = tl.load(p_matrix, mask=inside, other=0.0)  # [BLOCK_R, BLOCK_R]
    b_a += tl.where(i_row == i_r[None, :], tl.where(i_row < own, damping, 1.0), 0.0)
    m_rhs = (i_row < own) & (i_k < k)[None, :]
    if INVERSE:
        b_x = tl.where((i_row == i_k[None, :]) & m_rhs, 1.0, 0.0)  # [BLOCK_R, BLOCK_K]
    else:
        b_x = tl.load(rhs + (i_matrix * r + i_row) * k + i_k[None, :], mask=m_rhs, other=0.0)
    b_d = tl.zeros([BLOCK_R], dtype=tl.float32) + 1.0  # D
    bad = 0
    for j in range(0, own):
        b_column = column(b_a, i_r, j)
        pivot = tl.sum(tl.where(i_r == j, b_column, 0.0), 0)
        good = (pivot > 0.0) & (pivot < float("inf"))
        bad = tl.where((bad == 0) & (good == 0), j + 1, bad)
        b_d = tl.where(i_r == j, pivot, b_d)
        b_l = tl.where(i_r > j, tl.div_rn(b_column, tl.zeros_like(b_column) + pivot), 0.0)  # L's column below 1
        below = i_r[None, :] > j
        update = b_a - b_l[:, None] * tl.where(i_r > j, b_column, 0.0)[None, :]
        b_a = tl.where(below, update, tl.where(i_r[None, :] == j, b_l[:, None], b_a))
        b_x -= b_l[:, None] * row(b_x, i_r, j)[None, :]
    b_x = tl.div_rn(b_x, b_d[:, None] + tl.zeros_like(b_x))
    for back in range(1, own + 1):
        j = own - back
        b_l = tl.where(i_r > j, column(b_a, i_r, j), 0.0)
        solved = tl.sum(b_l[:, None] * b_x, 0)
        b_x = tl.where(i_row == j, b_x - solved[None, :], b_x)
    b_x = tl.where((bad == 0) | (i_row >= own), b_x, float("nan"))
    m_x = (i_row < r) & (i_k < k)[None, :]
    tl.store(solutions + (i_matrix * r + i_row) * k + i_k[None, :], b_x, mask=m_x)
    if tl.program_id(1) == 0:
        tl.store(info + i_matrix, bad)


@triton.jit
def lora_small_inverse_kernel(matrices, inverses, r, BLOCK_R: tl.constexpr):
    i_matrix = tl.program_id(0).to(tl.int64)
    i_r, i_row, i_col = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_R)[None, :]
    o_matrix = i_matrix * r * r + i_row * r + i_col
    inside = (i_row < r) & (i_col < r)
    b_matrix = tl.load(matrices + o_matrix, mask=inside, other=0.0)  # [BLOCK_R, BLOCK_R], as all that follows
    b_matrix = tl.where(inside, b_matrix, tl.where(i_row == i_col, 1.0, 0.0))
    b_w = b_matrix
    for j in range(0, r):
        b_column, b_row = column(b_w, i_r, j), row(b_w, i_r, j)
        reciprocal = 1.0 / tl.sum(tl.where(i_r == j, b_row, 0.0), 0)
        b_row = tl.where(i_r == j, reciprocal, b_row * reciprocal)
        rest = tl.where(i_col == j, 0.0, b_w) - b_column[:, None] * b_row[None, :]
        b_w = tl.where(i_row == j, b_row[None, :], rest)
    b_residual = tl.where(i_row == i_col, 2.0, 0.0) - product(b_matrix, b_w, r, BLOCK_R)
    tl.store(inverses + o_matrix, product(b_w, b_residual, r, BLOCK_R), mask=inside)


def spd_solve(
    matrices: torch.Tensor,
    rhs: torch.Tensor | None = None,
    damping: float = 0.0,
    ranks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x with (matrices + damping I) x = rhs: (n, r, r), (n, r, k) → (n, r, k), info int32 (n,). ``rhs`` None: the
    inverses (n, r, r). ``ranks``, int32 (n,): the rank of each matrix, padded to r; x is 0 beyond.
    Twin: ``reference_step.spd_solve``."""
    n, r = _check("matrices", matrices)
    if rhs is not None and (rhs.shape[:2] != (n, r) or rhs.ndim != 3 or rhs.dtype != torch.float32):
        raise ValueError(f"lora_fast: rhs: expected float32 ({n}, {r}, k), got {rhs.dtype} {tuple(rhs.shape)}")
    k = r if rhs is None else rhs.shape[2]
    x = torch.empty((n, r, k), dtype=torch.float32, device=matrices.device)
    info = torch.empty(n, dtype=torch.int32, device=matrices.device)
    if n == 0:
        return x, info
    block_r, block_k = max(16, triton.next_power_of_2(r)), min(RHS, max(16, triton.next_power_of_2(max(1, k))))
    with on_device(matrices):
        lora_spd_solve_kernel[(n, max(1, triton.cdiv(k, block_k)))](
            matrices.contiguous(), None if rhs is None else rhs.contiguous(), x, info, ranks, float(damping), r, k,
            INVERSE=rhs is None, RANKS=ranks is not None, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=_warps(block_r),
        )  # fmt: skip
    return x, info


def small_inverse(matrices: torch.Tensor) -> torch.Tensor:
    """Inverses of (n, r, r) whose symmetric part is at least I. Twin: ``reference_step.small_inverse``."""
    n, r = _check("matrices", matrices)
    inverses = torch.empty((n, r, r), dtype=torch.float32, device=matrices.device)
    if n == 0:
        return inverses
    block_r = max(16, triton.next_power_of_2(r))
    with on_device(matrices):
        lora_small_inverse_kernel[(n,)](
            matrices.contiguous(), inverses, r, BLOCK_R=block_r, num_warps=_warps(block_r)
        )  # fmt: skip
    return inverses


def _warps(block_r: int) -> int:
    return {16: 1, 32: 4, 64: 8}[block_r]


def _check(name: str, matrices: torch.Tensor) -> tuple[int, int]:
    n, *sides = matrices.shape
    if len(sides) != 2 or sides[0] != sides[1] or not 1 <= sides[0] <= LARGEST or matrices.dtype != torch.float32:
        raise ValueError(
            f"lora_fast: {name}: expected float32 (n, r, r), r from 1 to {LARGEST}, "
            f"got {matrices.dtype} {tuple(matrices.shape)}"
        )
    return n, sides[0]
