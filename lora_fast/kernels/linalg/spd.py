"""Batches of symmetric positive definite (SPD) systems: solutions, or inverses, with damping.

Math      A + δI = L D Lᵀ (L unit lower triangular), then L y = rhs, Lᵀ x = D⁻¹ y; above rank 64 blocked Cholesky
          (blocked.py). Backward stable without pivoting, because A is SPD. At the first pivot that is not positive (or
          is NaN), info is its order, from 1, and x is NaN. RETRY: a Gram that rounding left indefinite has a second
          attempt with r ε tr A more damping, since rounding moves its eigenvalues by no more.
Grid      Up to rank 64 one program per matrix (and per BLOCK_K columns of the right-hand side), the matrix in
          registers. Above, up to SLOTS programs loop over the matrices, each with U in its slot of a scratch buffer
          that stays in L2. A matrix that is not SPD does not affect the others.
Shapes    (n, r, r) float32 contiguous, r from 1 to 256; n any number.
Roofline  r³ operations on 4 r² bytes, one dependent step per column: latency bound. Other programs hide the latency.
"""

import torch
import triton
import triton.language as tl

from ..launch import check_square, launch, on_device
from ..primitives import div_rn, take_column, take_row
from .blocked import cholesky, cholesky_solve, copy, registers

IN_REGISTERS = 64  # largest rank whose matrix a program holds
SLOTS = 512  # largest number of programs that work in memory
WARPS = {16: 1, 32: 4, 64: 8}  # of a matrix in registers, by its padded rank
RHS = 64  # largest number of columns of the right-hand side in registers
EPS = tl.constexpr(2.0**-23)  # of float32


@triton.jit
def load_rhs(rhs, i_row, i_k, r, k, INVERSE: tl.constexpr):
    """Returns columns i_k of a right-hand side, or of I with INVERSE: [rows, columns], zero beyond row r."""
    mask = (i_row < r)[:, None] & (i_k < k)[None, :]
    if INVERSE:
        b_rhs = tl.where((i_row[:, None] == i_k[None, :]) & mask, 1.0, 0.0)
    else:
        b_rhs = tl.load(rhs + i_row[:, None] * k + i_k[None, :], mask=mask, other=0.0)
    return b_rhs


@triton.jit
def eliminate(matrix, b_x, i_r, r, damping, MORE: tl.constexpr):
    """Returns L (below the diagonal of its block), D, L⁻¹ b_x and info for matrix + damping I; with MORE, r ε tr more
    damping."""
    i_row, i_col = i_r[:, None], i_r[None, :]
    b_a = tl.load(matrix + i_row * r + i_col, mask=(i_row < r) & (i_col < r), other=0.0)  # [BLOCK_R, BLOCK_R]
    if MORE:
        damping += r * EPS * tl.sum(tl.sum(tl.where(i_row == i_col, b_a, 0.0), 1), 0)
    b_a += tl.where(i_row == i_col, tl.where(i_row < r, damping, 1.0), 0.0)  # padded with I
    b_d = tl.zeros_like(i_r).to(tl.float32) + 1.0
    bad = 0
    for j in range(0, r):
        b_column = take_column(b_a, i_r, j)
        pivot = tl.sum(tl.where(i_r == j, b_column, 0.0), 0)
        good = (pivot > 0.0) & (pivot < float("inf"))
        bad = tl.where((bad == 0) & (good == 0), j + 1, bad)
        b_d = tl.where(i_r == j, pivot, b_d)
        b_l = tl.where(i_r > j, div_rn(b_column, pivot), 0.0)  # L's column below 1
        update = b_a - b_l[:, None] * tl.where(i_r > j, b_column, 0.0)[None, :]
        b_a = tl.where(i_col > j, update, tl.where(i_col == j, b_l[:, None], b_a))
        b_x -= b_l[:, None] * take_row(b_x, i_r, j)[None, :]
    return b_a, b_d, b_x, bad


# do_not_specialize: sizes of 1 or multiples of 16 would otherwise compile further kernels.
@triton.jit(do_not_specialize=["r", "k"])
def lora_spd_solve_kernel(
    matrices, rhs, solutions, info,
    damping, r, k,
    INVERSE: tl.constexpr, RETRY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """INVERSE: the right-hand side is I, and ``rhs`` is not read."""
    i_matrix = tl.program_id(0).to(tl.int64)
    i_r, i_row = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_R)[:, None]
    i_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    matrix, o_rhs = matrices + i_matrix * r * r, i_matrix * r * k
    b_x = load_rhs(None if INVERSE else rhs + o_rhs, i_r, i_k, r, k, INVERSE)  # [BLOCK_R, BLOCK_K]
    b_l, b_d, b_x, bad = eliminate(matrix, b_x, i_r, r, damping, False)
    if RETRY:  # noqa: SIM102 - a jit function evaluates both sides of an `and`
        if bad != 0:
            b_x = load_rhs(None if INVERSE else rhs + o_rhs, i_r, i_k, r, k, INVERSE)
            b_l, b_d, b_x, bad = eliminate(matrix, b_x, i_r, r, damping, True)
    b_x = tl.div_rn(b_x, b_d[:, None] + tl.zeros_like(b_x))
    for back in range(1, r + 1):
        j = r - back
        b_column = tl.where(i_r > j, take_column(b_l, i_r, j), 0.0)
        solved = tl.sum(b_column[:, None] * b_x, 0)
        b_x = tl.where(i_row == j, b_x - solved[None, :], b_x)
    b_x = tl.where(bad == 0, b_x, float("nan"))
    tl.store(solutions + o_rhs + i_row * k + i_k[None, :], b_x, mask=(i_row < r) & (i_k < k)[None, :])
    if tl.program_id(1) == 0:
        tl.store(info + i_matrix, bad)


@triton.jit(do_not_specialize=["n", "r", "k"])
def lora_spd_solve_blocked_kernel(
    matrices, rhs, solutions, info, uppers,
    damping, n, r, k,
    INVERSE: tl.constexpr, RETRY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes what ``lora_spd_solve_kernel`` does, with the matrix in memory."""
    i_r = tl.arange(0, BLOCK_R)
    upper = uppers + tl.program_id(0).to(tl.int64) * BLOCK_R * BLOCK_R
    for i_matrix in tl.range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0), num_stages=1):
        matrix, solution = matrices + i_matrix * r * r, solutions + i_matrix * r * k
        copy(matrix, r, upper, BLOCK_R, r, BLOCK_R)
        bad = cholesky(upper, upper, r, BLOCK_R, damping, BLOCK_R)
        if RETRY:  # noqa: SIM102 - as above
            if bad != 0:
                trace = tl.sum(tl.load(matrix + i_r * (r + 1), mask=i_r < r, other=0.0), 0)
                copy(matrix, r, upper, BLOCK_R, r, BLOCK_R)
                bad = cholesky(upper, upper, r, BLOCK_R, damping + r * EPS * trace, BLOCK_R)
        if INVERSE:
            cholesky_solve(upper, None, solution, r, k, BLOCK_R, k, BLOCK_K)
        else:
            cholesky_solve(upper, rhs + i_matrix * r * k, solution, r, k, BLOCK_R, k, BLOCK_K)
        if bad != 0:
            for i in range(0, r):
                for o_k in range(0, k, BLOCK_K):
                    i_k = o_k + tl.arange(0, BLOCK_K)
                    tl.store(solution + i * k + i_k, tl.full([BLOCK_K], float("nan"), tl.float32), mask=i_k < k)
        tl.store(info + i_matrix, bad)


def spd_solve(matrices: torch.Tensor, rhs: torch.Tensor, damping: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Solves (matrices + damping I) x = rhs. Twin: ``reference.pairs.spd_solve``.

    Args:
        matrices: float32 (n, r, r), r from 1 to 256.
        rhs: float32 (n, r, k).
        damping: δ.

    Returns:
        x: float32 (n, r, k); NaN for a matrix that is not positive definite.
        info: int32 (n,), 0, or the order of the first leading minor that is not positive definite.
    """
    n, r = check_square("matrices", matrices)
    assert rhs.ndim == 3 and rhs.shape[:2] == (n, r) and rhs.dtype == torch.float32, (
        f"rhs: expected float32 ({n}, {r}, k), got {rhs.dtype} {tuple(rhs.shape)}"
    )
    return _launch(matrices, rhs.contiguous(), damping, retry=False)


def spd_inverse(matrices: torch.Tensor, damping: float) -> torch.Tensor:
    """Computes (matrices + damping I)⁻¹ of Grams, float32 (n, r, r). A Gram that rounding left indefinite gets r ε tr
    more damping, in the same launch; its inverse is NaN where that does not make it definite. Twin:
    ``reference.pairs.spd_inverse``."""
    check_square("matrices", matrices)
    return _launch(matrices, None, damping, retry=True)[0]


def _launch(
    matrices: torch.Tensor, rhs: torch.Tensor | None, damping: float, retry: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rhs`` None stands for I."""
    n, r, _ = matrices.shape
    k = r if rhs is None else rhs.shape[2]
    x = torch.empty((n, r, k), dtype=torch.float32, device=matrices.device)
    info = torch.empty(n, dtype=torch.int32, device=matrices.device)
    if n == 0:
        return x, info
    matrices, block_r = matrices.contiguous(), max(16, triton.next_power_of_2(r))
    block_k = max(16, triton.next_power_of_2(max(1, k)))
    options = {"INVERSE": rhs is None, "RETRY": retry, "BLOCK_R": block_r}
    tensors = matrices, matrices if rhs is None else rhs, x, info  # with INVERSE the kernel does not read the second
    with on_device(matrices):
        if r <= IN_REGISTERS:
            options |= {"BLOCK_K": min(RHS, block_k), "num_warps": WARPS[block_r], "maxnreg": 255}
            grid: tuple[int, ...] = n, max(1, triton.cdiv(k, options["BLOCK_K"]))
            launch(lora_spd_solve_kernel, grid, tensors, (float(damping),), (r, k), options)
        else:
            options |= {"BLOCK_K": min(block_r, block_k), "num_warps": 8, "maxnreg": registers(block_r)}
            uppers = torch.empty((min(n, SLOTS), block_r, block_r), dtype=torch.float32, device=matrices.device)
            grid = (len(uppers),)
            launch(lora_spd_solve_blocked_kernel, grid, (*tensors, uppers), (float(damping),), (n, r, k), options)
    return x, info
