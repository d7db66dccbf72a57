"""ScaLoRA's equations for every adapter pair: the 2r×2r Hadamard system from the Grams, and its solution.

Math      With x = [α²; β²] and every scale relative to κ = 1 (arXiv 2510.23818):
              M x = λ      M = [[Kb∘Kp, K∘K], [(K∘K)ᵀ, Kq∘Ka]]      λ = [diag Kp; diag Kq]
          column solves it (Theorem 5), scalar has one α and one β (Theorem 3), paper is column where no x is negative,
          else scalar; nnls is min ½xᵀMx − λᵀx over x ≥ 0 (linalg/nnls.py). Gradients are divided by one power of two,
          M is scaled to a unit diagonal, and a coordinate whose M_jj is at most 1e-12 of its block's largest is not
          active: its x is 0. The twin is lora_fast/ops/reference/scalora_solution.py.
Grid      One program per pair. Up to 2r = 64 the system stays in registers; above, it is in a scratch buffer of two
          matrices per pair.
Shapes    Grams float32 (n, r, r), contiguous → x float32 (n, 2r), active bool (n, 2r), info int32 (n,). A pair with a
          NaN or an Inf has x NaN, all coordinates active and info 1; no bit of the other pairs changes.
Roofline  5 r² numbers read, then (2r)³/3 operations and 4r dependent column steps a solve: latency bound. There is one
          solve where the unconstrained optimum is valid, else 2 to 8 in nearly every case tried.
"""

import torch
import triton
import triton.language as tl

from .. import limits
from ..launch import check_tensor, on_device
from ..limits import LARGEST_SCALORA_RANK, SOLVERS
from ..linalg.blocked import registers
from ..linalg.nnls import solve
from ..primitives import div_rn

NNLS, PAPER, COLUMN, SCALAR = (tl.constexpr(i) for i in range(4))
INACTIVE, COLLINEAR = tl.constexpr(limits.INACTIVE), tl.constexpr(limits.COLLINEAR)
IN_REGISTERS = 64  # rows of the largest system in registers
CHUNK = 16  # rows of a system in memory at a time
WARPS = {16: 1, 32: 4, 64: 8, 128: 8, 256: 8}  # by BLOCK_N


@triton.jit
def load_two_blocks(p_first, p_second, i_n, r, stride):
    """Returns [first; second]: r numbers of each, ``stride`` apart, zero beyond."""
    b_first = tl.load(p_first + i_n * stride, mask=i_n < r, other=0.0)
    return b_first + tl.load(p_second + (i_n - r) * stride, mask=(i_n >= r) & (i_n < 2 * r), other=0.0)


@triton.jit
def inverse_power(b_size):
    """Returns 2^-e, with 4^e nearest the largest of these squared sizes: a power of two scales gradients exactly."""
    # The exponent field of a float32 starts at bit 23; its bias is 127.
    exponent = (tl.max(b_size.to(tl.int32, bitcast=True), 0) >> 23) - 126
    return ((127 - (exponent >> 1)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def system_in_registers(ka, kb, kp, kq, k, b_d, power, r, BLOCK_N: tl.constexpr):
    """Returns M scaled to a unit diagonal, [BLOCK_N, BLOCK_N]; Σ|entries|, which is NaN or Inf where an entry is; ΣM₁₁,
    ΣM₂₂, ΣM₁₂."""
    i_row, i_col = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
    m_first, m_second = (i_row < r) & (i_col < r), (i_row >= r) & (i_col >= r) & (i_row < 2 * r) & (i_col < 2 * r)
    m_cross = (i_row < r) & (i_col >= r) & (i_col < 2 * r)
    o_cross = i_row * r + i_col - r
    o_block, m_block = tl.where(m_first, i_row * r + i_col, o_cross - r * r), m_first | m_second
    b_factor = tl.load(tl.where(m_first, kb, ka) + o_block, mask=m_block, other=0.0)  # [BLOCK_N, BLOCK_N]
    b_gradient = tl.load(tl.where(m_first, kp, kq) + o_block, mask=m_block, other=0.0)
    b_cross = tl.load(k + o_cross, mask=m_cross, other=0.0) * power
    b_cross *= b_cross
    b_m = b_factor * (b_gradient * power * power)
    b_sums, i_n = tl.sum(b_m, 0), tl.arange(0, BLOCK_N)
    sum_aa, sum_bb = tl.sum(tl.where(i_n < r, b_sums, 0.0), 0), tl.sum(tl.where(i_n < r, 0.0, b_sums), 0)
    sum_ab = tl.sum(tl.sum(b_cross, 0), 0)
    b_unit = b_d[:, None] * (b_m + b_cross + tl.trans(b_cross)) * b_d[None, :]
    size = tl.sum(tl.sum(tl.abs(b_unit), 0), 0)
    return tl.where(i_row == i_col, 1.0, b_unit), size, sum_aa, sum_bb, sum_ab


@triton.jit
def system_in_memory(
    ka, kb, kp, kq, k, d, unit,
    power, r,
    STORE: tl.constexpr,
    BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Computes the system of ``system_in_registers`` with d in memory. STORE: M is stored at ``unit`` (2r, 2r). Returns
    the sums."""
    tl.debug_barrier()  # d was stored by other threads
    i_col, n = tl.arange(0, BLOCK_R), 2 * r
    b_aa = tl.zeros([CHUNK, BLOCK_R], dtype=tl.float32)
    b_bb, b_ab, b_size = tl.zeros_like(b_aa), tl.zeros_like(b_aa), tl.zeros_like(b_aa)
    d_a, d_b = tl.load(d + i_col, mask=i_col < r, other=0.0), tl.load(d + r + i_col, mask=i_col < r, other=0.0)
    for o in tl.range(0, r, CHUNK, num_stages=1):
        i_row = o + tl.arange(0, CHUNK)
        mask = (i_row < r)[:, None] & (i_col < r)[None, :]
        diagonal = i_row[:, None] == i_col[None, :]
        o_gram, o_unit = i_row[:, None] * r + i_col[None, :], i_row[:, None] * n + i_col[None, :]
        row_a, row_b = tl.load(d + i_row, mask=i_row < r, other=0.0), tl.load(d + r + i_row, mask=i_row < r, other=0.0)
        b_m = tl.load(kp + o_gram, mask=mask, other=0.0) * power * power  # [CHUNK, BLOCK_R], as all that follows
        b_m *= tl.load(kb + o_gram, mask=mask, other=0.0)
        b_unit = row_a[:, None] * b_m * d_a[None, :]
        b_aa += b_m
        b_size += tl.abs(b_unit)
        if STORE:
            tl.store(unit + o_unit, tl.where(diagonal, 1.0, b_unit), mask=mask)
        b_m = tl.load(kq + o_gram, mask=mask, other=0.0) * power * power
        b_m *= tl.load(ka + o_gram, mask=mask, other=0.0)
        b_unit = row_b[:, None] * b_m * d_b[None, :]
        b_bb += b_m
        b_size += tl.abs(b_unit)
        if STORE:
            tl.store(unit + r * (n + 1) + o_unit, tl.where(diagonal, 1.0, b_unit), mask=mask)
        b_m = tl.load(k + o_gram, mask=mask, other=0.0) * power
        b_m *= b_m
        b_unit = row_a[:, None] * b_m * d_b[None, :]
        b_ab += b_m
        b_size += tl.abs(b_unit)
        if STORE:
            tl.store(unit + r + o_unit, b_unit, mask=mask)
            tl.store(unit + (r + i_col)[None, :] * n + i_row[:, None], b_unit, mask=mask)
    size = tl.sum(tl.sum(b_size, 1), 0)
    return size, tl.sum(tl.sum(b_aa, 1), 0), tl.sum(tl.sum(b_bb, 1), 0), tl.sum(tl.sum(b_ab, 1), 0)


@triton.jit
def solve_scalar(b_lam, sum_aa, sum_bb, sum_ab, i_n, r):
    """Solves Theorem 3: α² for i_n < r, β² beyond."""
    p_a, p_b = tl.sum(tl.where(i_n < r, b_lam, 0.0), 0), tl.sum(tl.where(i_n < r, 0.0, b_lam), 0)
    c_a, c_b = p_a * sum_bb - p_b * sum_ab, p_b * sum_aa - p_a * sum_ab
    det = sum_aa * sum_bb - sum_ab * sum_ab
    only_a, only_b = (c_a > 0) & (c_b <= 0), (c_b > 0) & (c_a <= 0)
    both = (c_a >= 0) & (c_b >= 0) & (det > sum_aa * sum_bb * COLLINEAR) & (only_a == 0) & (only_b == 0)
    only_a = only_a | ((both == 0) & (only_b == 0) & (sum_aa > 0))
    b_zero = tl.zeros_like(b_lam)
    b_alpha = tl.where(both, div_rn(b_zero + c_a, det), tl.where(only_a, div_rn(b_zero + p_a, sum_aa), 0.0))
    b_beta = tl.where(both, div_rn(b_zero + c_b, det), tl.where(only_a, 0.0, div_rn(b_zero + p_b, sum_bb)))
    return tl.where(i_n < r, b_alpha, b_beta)


@triton.jit(do_not_specialize=["r"])
def lora_scalora_solve_kernel(
    ka, kb, kp, kq, k, x, active, info, scratch,
    r,
    SOLVER: tl.constexpr, REGISTERS: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_pair, n = tl.program_id(0).to(tl.int64), 2 * r
    o_gram = i_pair * r * r
    ka, kb, kp, kq, k = ka + o_gram, kb + o_gram, kp + o_gram, kq + o_gram, k + o_gram
    x, active = x + i_pair * n, active + i_pair * n
    i_n = tl.arange(0, BLOCK_N)
    m_n = i_n < n
    b_lam = load_two_blocks(kp, kq, i_n, r, r + 1)  # [BLOCK_N], as all that follows
    power = inverse_power(b_lam)
    b_lam = b_lam * power * power
    b_diagonal = load_two_blocks(kb, ka, i_n, r, r + 1) * b_lam
    largest_a, largest_b = tl.max(tl.where(i_n < r, b_diagonal, 0.0), 0), tl.max(tl.where(i_n < r, 0.0, b_diagonal), 0)
    m_active = (b_diagonal <= tl.where(i_n < r, largest_a, largest_b) * INACTIVE) == 0
    b_root = tl.sqrt_rn(tl.where(m_active, b_diagonal, 1.0))
    b_d = tl.where(m_active, tl.div_rn(tl.full([BLOCK_N], 1.0, tl.float32), b_root), 0.0)
    unit, upper = scratch, scratch
    if REGISTERS:
        unit, size, sum_aa, sum_bb, sum_ab = system_in_registers(ka, kb, kp, kq, k, b_d, power, r, BLOCK_N)
    else:
        tl.store(x + i_n, b_d, mask=m_n)  # x holds the diagonal scaling until the solution is known
        if SOLVER != SCALAR:
            unit = scratch + i_pair * 2 * n * n
            upper = unit + n * n
        size, sum_aa, sum_bb, sum_ab = system_in_memory(
            ka, kb, kp, kq, k, x, unit,
            power, r,
            SOLVER != SCALAR,
            BLOCK_N // 2, CHUNK,
        )  # fmt: skip
    finite = size < float("inf")  # False for a NaN, too
    invalid = tl.where(finite, 0, 1)
    if SOLVER != SCALAR:
        b_z, invalid = solve(unit, upper, x, b_d * b_lam, finite, n, SOLVER == NNLS, REGISTERS, BLOCK_N, CHUNK)
        b_x = b_d * b_z
    if SOLVER == SCALAR:
        b_x = solve_scalar(b_lam, sum_aa, sum_bb, sum_ab, i_n, r)
    elif SOLVER == PAPER:
        b_x = tl.where(invalid > 0, solve_scalar(b_lam, sum_aa, sum_bb, sum_ab, i_n, r), b_x)
    elif SOLVER == COLUMN:
        m_active = m_active & (invalid == 0)
    m_active = m_active | (finite == 0)
    b_x = tl.where(finite, tl.where(m_active, b_x, 0.0), float("nan"))
    tl.debug_barrier()  # x was also scratch memory, which other threads may still read
    tl.store(x + i_n, b_x, mask=m_n)
    tl.store(active + i_n, m_active, mask=m_n)
    tl.store(info + i_pair, invalid)


def scalora_solve(
    ka: torch.Tensor, kb: torch.Tensor, kp: torch.Tensor, kq: torch.Tensor, k: torch.Tensor, solver: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solves ScaLoRA's equations of every pair. Twin: ``reference.scalora_solution.scalora_solve``.

    Args:
        ka, kb, kp, kq, k: Grams, float32 (n, r, r), contiguous, r from 1 to 128.
        solver: one of ``SOLVERS``.

    Returns:
        x: float32 (n, 2r), α² then β² for κ = 1.
        active: bool (n, 2r). Where it is False, x is 0 and the scale stays 1. With "column" no coordinate of an invalid
            pair is active.
        info: int32 (n,), 0 where the unconstrained optimum has no negative value, else 1; 0 with "scalar".
    """
    assert solver in SOLVERS, f"solver: expected one of {SOLVERS}, got {solver!r}"
    n, r = _check_grams({"ka": ka, "kb": kb, "kp": kp, "kq": kq, "k": k})
    x = torch.empty((n, 2 * r), dtype=torch.float32, device=ka.device)
    active = torch.empty((n, 2 * r), dtype=torch.bool, device=ka.device)
    info = torch.empty(n, dtype=torch.int32, device=ka.device)
    if n == 0:
        return x, active, info
    block_n = max(16, triton.next_power_of_2(2 * r))
    in_registers, scratch = block_n <= IN_REGISTERS, None
    if not in_registers and solver != "scalar":
        scratch = torch.empty((n, 2, 2 * r, 2 * r), dtype=torch.float32, device=ka.device)
    with on_device(ka):
        lora_scalora_solve_kernel[(n,)](
            ka, kb, kp, kq, k, x, active, info, scratch,
            r,
            SOLVER=SOLVERS.index(solver), REGISTERS=in_registers,
            BLOCK_N=block_n, CHUNK=CHUNK, num_warps=WARPS[block_n],
            maxnreg=255 if in_registers else registers(block_n),  # see linalg/blocked.py
        )  # fmt: skip
    return x, active, info


def _check_grams(grams: dict[str, torch.Tensor]) -> tuple[int, int]:
    shape = tuple(grams["ka"].shape)
    assert len(shape) == 3 and shape[1] == shape[2] and 1 <= shape[1] <= LARGEST_SCALORA_RANK, (
        f"ka: expected (n, r, r), r from 1 to {LARGEST_SCALORA_RANK}, got {shape}"
    )
    for name, gram in grams.items():
        check_tensor(name, gram, shape, torch.float32)
    return shape[:2]
