"""ScaLoRA's scaling of every adapter pair: the 2r×2r Hadamard system from the Grams, and the scales from its solution.

Math      With x = [α²; β²] and every scale relative to κ = 1 (arXiv 2510.23818; lora_fast/reference_scalora.py):
              M x = λ      M = [[Kb∘Kp, K∘K], [(K∘K)ᵀ, Kq∘Ka]]      λ = [diag Kp; diag Kq]
          column solves it (Theorem 5), scalar has one α and one β (Theorem 3), paper is column where no x is negative,
          else scalar; nnls is min ½xᵀMx − λᵀx over x ≥ 0. Gradients are divided by one power of two, M is scaled to a
          unit diagonal with a ridge of 1e-7, and a coordinate whose M_jj is at most 1e-12 of its block's largest is
          dead: it has no say, its x is 0.
          nnls exchanges coordinates between free and 0: solve on the free ones, exchange every one whose value or slope
          has the wrong sign; when their number has not fallen for three rounds, only the last one, which ends after
          finitely many rounds (Júdice & Pires, Comput. Oper. Res. 1994; Kim & Park, SIAM J. Sci. Comput. 2011). A slope
          within rounding of 0 is right. Where M is singular to rounding, its factorization breaks down: the ridge is
          then ten times as large.
Grid      one program per pair. Up to 2r = 64 the system stays in registers and is factored LDLᵀ, column by column;
          above, it lies in a scratch of two matrices and blocked.py factors it. ``scales``: one program per 256 scales.
Shapes    Grams float32 (n, r, r), contiguous → x float32 (n, 2r), alive bool (n, 2r), info int32 (n,). A pair with a
          NaN or an Inf: x NaN, all alive, info 1; its neighbours do not change by a bit.
Roofline  5 r² numbers read, then (2r)³/3 operations and 4r dependent column steps a solve: latency bound. One solve
          where the unconstrained optimum is valid; else 2 to 8 in nearly every case tried.
"""

import torch
import triton
import triton.language as tl

from .blocked import cholesky, cholesky_solve, registers
from .launch import on_device
from .primitives import over, row

SOLVERS = ("nnls", "paper", "column", "scalar")
NNLS, PAPER, COLUMN, SCALAR = (tl.constexpr(i) for i in range(4))
LARGEST = 128  # rank
RIDGE = tl.constexpr(1e-7)  # RIDGE, DEAD, COLLINEAR: as in the twin
DEAD = tl.constexpr(1e-12)
COLLINEAR = tl.constexpr(1e-6)
ROUNDING = tl.constexpr(1e-6)  # a slope's, relative to the sum of its terms' sizes: 8 units in the last place
TRIES, ROUNDS = tl.constexpr(3), tl.constexpr(100)
IN_REGISTERS = 64  # size of the largest system there
CHUNK = 16  # rows of a system in memory at a time
WARPS = {16: 1, 32: 4, 64: 8, 128: 8, 256: 8}  # by BLOCK_N
BLOCK = 256  # scales of one program


@triton.jit
def two_blocks(p_first, p_second, i_n, r, stride):
    """[first; second]: r numbers of each, ``stride`` apart, zero beyond."""
    b_first = tl.load(p_first + i_n * stride, mask=i_n < r, other=0.0)
    return b_first + tl.load(p_second + (i_n - r) * stride, mask=(i_n >= r) & (i_n < 2 * r), other=0.0)


@triton.jit
def inverse_power(b_size):
    """2^-e, with 4^e nearest the largest: what divides gradients whose squares have these sizes."""
    exponent = (tl.max(b_size.to(tl.int32, bitcast=True), 0) >> 23) - 126
    return ((127 - (exponent >> 1)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def system_in_registers(ka, kb, kp, kq, k, b_d, power, r, BLOCK_N: tl.constexpr):
    """M scaled to a unit diagonal, [BLOCK_N, BLOCK_N]; Σ|entries|, NaN or Inf where one is; ΣM₁₁, ΣM₂₂, ΣM₁₂."""
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
    ka, kb, kp, kq, k, d, unit, power, r, STORE: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr
):
    """As above, to ``unit`` (2r, 2r); d in memory."""
    tl.debug_barrier()
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
def solve_in_registers(b_unit, b_rhs, free, ridge, n, BLOCK_N: tl.constexpr):
    """The solution on the free coordinates, 0 on the others; and whether the factorization broke down.

    LDLᵀ, right-looking: what is left in b_a's row j, from its diagonal on, is that of D Lᵀ.
    """
    i_n = tl.arange(0, BLOCK_N)
    b_a = tl.where((free[:, None] > 0) & (free[None, :] > 0), b_unit, 0.0)
    b_a = tl.where(i_n[:, None] == i_n[None, :], 1.0 + ridge, b_a)  # [BLOCK_N, BLOCK_N]
    b_z = tl.where(free > 0, b_rhs, 0.0)
    bad = 0
    for j in range(0, n):
        b_row = row(b_a, i_n, j)
        pivot = tl.sum(tl.where(i_n == j, b_row, 0.0), 0)
        bad = tl.where(pivot > 0.0, bad, 1)
        b_row = tl.where(i_n > j, b_row, 0.0)
        b_l = over(b_row, pivot)
        b_a -= b_l[:, None] * b_row[None, :]
        b_z -= b_l * tl.sum(tl.where(i_n == j, b_z, 0.0), 0)
    for back in range(1, n + 1):
        j = n - back
        b_row = row(b_a, i_n, j)
        pivot = tl.sum(tl.where(i_n == j, b_row, 0.0), 0)
        rest = tl.sum(tl.where(i_n > j, b_row * b_z, 0.0), 0)
        b_z = tl.where(i_n == j, over(b_z - rest, pivot), b_z)
    return b_z, bad


@triton.jit
def solve_in_memory(unit, upper, x, b_rhs, free, ridge, n, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """As above; the solution is also left in x (n,)."""
    i_n = tl.arange(0, BLOCK_N)
    m_n = i_n < n
    tl.debug_barrier()
    tl.store(x + i_n, free.to(tl.float32), mask=m_n)
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
    """M z, and Σ_j |M_ij z_j|; M is symmetric."""
    b_terms = b_unit * b_z[:, None]
    return tl.sum(b_terms, 0), tl.sum(tl.abs(b_terms), 0)


@triton.jit
def times_in_memory(unit, x, n, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """As above, of the z in memory."""
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
    unit, upper, x, b_rhs, finite, n, EXCHANGE: tl.constexpr, BLOCK_N: tl.constexpr, REGISTERS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """z ≥ 0 with the least ½zᵀMz − rhsᵀz; the unconstrained optimum, its negative values cut off, where not EXCHANGE.
    1 where the unconstrained optimum has a negative value or a number is not finite, else 0."""
    i_n = tl.arange(0, BLOCK_N)
    b_z = tl.zeros_like(b_rhs)
    free = (i_n < n).to(tl.int32)
    going = finite.to(tl.int32)
    invalid, first, rounds = 1 - going, 1, 0
    fewest, tries, ridge = n + 1, TRIES + 0, RIDGE + 0.0
    while (going > 0) & (rounds < ROUNDS):
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
            going = tl.where((n_wrong > 0) & EXCHANGE, 1, 0)
    return tl.where(b_z < 0.0, 0.0, b_z), invalid


@triton.jit
def scalar(b_lam, sum_aa, sum_bb, sum_ab, i_n, r):
    """Theorem 3: α² for i_n < r, β² beyond."""
    p_a, p_b = tl.sum(tl.where(i_n < r, b_lam, 0.0), 0), tl.sum(tl.where(i_n < r, 0.0, b_lam), 0)
    c_a, c_b = p_a * sum_bb - p_b * sum_ab, p_b * sum_aa - p_a * sum_ab
    det = sum_aa * sum_bb - sum_ab * sum_ab
    only_a, only_b = (c_a > 0) & (c_b <= 0), (c_b > 0) & (c_a <= 0)
    both = (c_a >= 0) & (c_b >= 0) & (det > sum_aa * sum_bb * COLLINEAR) & (only_a == 0) & (only_b == 0)
    only_a = only_a | ((both == 0) & (only_b == 0) & (sum_aa > 0))
    b_zero = tl.zeros_like(b_lam)
    b_alpha = tl.where(both, over(b_zero + c_a, det), tl.where(only_a, over(b_zero + p_a, sum_aa), 0.0))
    b_beta = tl.where(both, over(b_zero + c_b, det), tl.where(only_a, 0.0, over(b_zero + p_b, sum_bb)))
    return tl.where(i_n < r, b_alpha, b_beta)


@triton.jit(do_not_specialize=["r"])
def lora_scalora_solve_kernel(
    ka, kb, kp, kq, k, x, alive, info, scratch, r, SOLVER: tl.constexpr, BLOCK_N: tl.constexpr,
    REGISTERS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_pair, n = tl.program_id(0).to(tl.int64), 2 * r
    o_gram = i_pair * r * r
    ka, kb, kp, kq, k = ka + o_gram, kb + o_gram, kp + o_gram, kq + o_gram, k + o_gram
    x, alive = x + i_pair * n, alive + i_pair * n
    i_n = tl.arange(0, BLOCK_N)
    m_n = i_n < n
    b_lam = two_blocks(kp, kq, i_n, r, r + 1)  # [BLOCK_N], as all that follows
    power = inverse_power(b_lam)
    b_lam = b_lam * power * power
    b_diagonal = two_blocks(kb, ka, i_n, r, r + 1) * b_lam
    largest_a, largest_b = tl.max(tl.where(i_n < r, b_diagonal, 0.0), 0), tl.max(tl.where(i_n < r, 0.0, b_diagonal), 0)
    m_alive = (b_diagonal <= tl.where(i_n < r, largest_a, largest_b) * DEAD) == 0
    b_root = tl.sqrt_rn(tl.where(m_alive, b_diagonal, 1.0))
    b_d = tl.where(m_alive, tl.div_rn(tl.full([BLOCK_N], 1.0, tl.float32), b_root), 0.0)
    unit, upper = scratch, scratch
    if REGISTERS:
        unit, size, sum_aa, sum_bb, sum_ab = system_in_registers(ka, kb, kp, kq, k, b_d, power, r, BLOCK_N)
    else:
        tl.store(x + i_n, b_d, mask=m_n)
        if SOLVER != SCALAR:
            unit = scratch + i_pair * 2 * n * n
            upper = unit + n * n
        size, sum_aa, sum_bb, sum_ab = system_in_memory(
            ka, kb, kp, kq, k, x, unit, power, r, SOLVER != SCALAR, BLOCK_N // 2, CHUNK
        )
    finite = size < float("inf")
    invalid = tl.where(finite, 0, 1)
    if SOLVER != SCALAR:
        b_z, invalid = solve(unit, upper, x, b_d * b_lam, finite, n, SOLVER == NNLS, BLOCK_N, REGISTERS, CHUNK)
        b_x = b_d * b_z
    if SOLVER == SCALAR:
        b_x = scalar(b_lam, sum_aa, sum_bb, sum_ab, i_n, r)
    elif SOLVER == PAPER:
        b_x = tl.where(invalid > 0, scalar(b_lam, sum_aa, sum_bb, sum_ab, i_n, r), b_x)
    elif SOLVER == COLUMN:
        m_alive = m_alive & (invalid == 0)
    m_alive = m_alive | (finite == 0)
    b_x = tl.where(finite, tl.where(m_alive, b_x, 0.0), float("nan"))
    tl.debug_barrier()  # x was also a scratch
    tl.store(x + i_n, b_x, mask=m_n)
    tl.store(alive + i_n, m_alive, mask=m_n)
    tl.store(info + i_pair, invalid)


@triton.jit
def scale(x, alive, i, b_kappa, low, high, mask):
    """√(x / κ) between low and high, 1 where it has no say; a NaN stays one: float32 [BLOCK]."""
    b_x = tl.load(x + i, mask=mask, other=0.0)
    b_scale = tl.sqrt_rn(tl.div_rn(b_x, b_kappa))
    b_scale = tl.where(b_scale < low, low, b_scale)
    b_scale = tl.where(b_scale > high, high, b_scale)
    kept = (tl.load(alive + i, mask=mask, other=0) == 0) | (b_kappa <= 0.0)
    return tl.where(kept, 1.0, b_scale)


@triton.jit(do_not_specialize=["size", "r"])
def lora_scales_kernel(
    x, alive, kappa, scaling, scale_p, scale_g, rest, low, high, size, r, KAPPA_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b_kappa = tl.zeros([BLOCK], dtype=tl.float32)
    if KAPPA_IN_MEMORY:
        b_kappa += tl.load(kappa).to(tl.float32)
    else:
        b_kappa += kappa
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_pair, mask = i // r, i < size
    o_alpha = i + i_pair * r
    b_alpha = scale(x, alive, o_alpha, b_kappa, low, high, mask)
    b_beta = scale(x, alive, o_alpha + r, b_kappa, low, high, mask)
    tl.store(scale_p + i, b_alpha, mask=mask)
    tl.store(scale_p + size + i, b_beta, mask=mask)
    tl.store(scale_g + i, b_beta, mask=mask)
    tl.store(scale_g + size + i, b_alpha, mask=mask)
    b_scaling = tl.load(scaling + i_pair, mask=mask, other=0.0)
    tl.store(rest + i, b_scaling * (1.0 - b_alpha * b_beta), mask=mask)


def scalora_solve(
    ka: torch.Tensor, kb: torch.Tensor, kp: torch.Tensor, kq: torch.Tensor, k: torch.Tensor, solver: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (n, 2r) for κ = 1, α² then β²; which of its entries have a say, bool (n, 2r): the others' x is 0; info (n,), 0
    where the unconstrained optimum has no negative value, else 1 ("scalar": 0). Five float32 (n, r, r) Grams,
    contiguous, r from 1 to 128. With "column" an invalid pair has no say at all. Twin:
    ``reference_scalora.scalora_solve``."""
    if solver not in SOLVERS:
        raise ValueError(f"lora_fast: solver: expected one of {SOLVERS}, got {solver!r}")
    n, r = _check_grams({"ka": ka, "kb": kb, "kp": kp, "kq": kq, "k": k})
    x = torch.empty((n, 2 * r), dtype=torch.float32, device=ka.device)
    alive = torch.empty((n, 2 * r), dtype=torch.bool, device=ka.device)
    info = torch.empty(n, dtype=torch.int32, device=ka.device)
    if n == 0:
        return x, alive, info
    block_n = max(16, triton.next_power_of_2(2 * r))
    in_registers, scratch = block_n <= IN_REGISTERS, None
    if not in_registers and solver != "scalar":
        scratch = torch.empty((n, 2, 2 * r, 2 * r), dtype=torch.float32, device=ka.device)
    with on_device(ka):
        lora_scalora_solve_kernel[(n,)](
            ka, kb, kp, kq, k, x, alive, info, scratch, r, SOLVER=SOLVERS.index(solver), BLOCK_N=block_n,
            REGISTERS=in_registers, CHUNK=CHUNK, num_warps=WARPS[block_n],
            maxnreg=255 if in_registers else registers(block_n),  # see blocked.py
        )  # fmt: skip
    return x, alive, info


def scales(
    x: torch.Tensor,
    alive: torch.Tensor,
    kappa: float | torch.Tensor,
    scaling: torch.Tensor,
    low: float,
    high: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the step and the merge take, from ``scalora_solve``'s x and alive (n, 2r) and the pairs' scaling, float32
    (n,): scale = √(x / κ) between ``low`` and ``high`` (None: no limit), 1 where it has no say or κ ≤ 0.

    kappa: a number, or a 0-d float64 tensor on the device. Returns scale_p (2n, r), what multiplies the factors, b's
    first: [α; β]; scale_g (2n, r), what multiplies their gradients and moments: [β; α]; rest (n, r) = scaling (1 − αβ),
    what is merged into W with the factors as they were. A NaN in x is one in all three."""
    n, r = x.shape[0], x.shape[1] // 2
    _check("x", x, (n, 2 * r), torch.float32)
    _check("alive", alive, (n, 2 * r), torch.bool)
    _check("scaling", scaling, (n,), torch.float32)
    in_memory = isinstance(kappa, torch.Tensor)
    if in_memory:
        _check("kappa", kappa, (), torch.float64)
    scale_p = torch.empty((2 * n, r), dtype=torch.float32, device=x.device)
    scale_g, rest = torch.empty_like(scale_p), torch.empty_like(scale_p[:n])
    if x.numel():
        with on_device(x):
            lora_scales_kernel[(triton.cdiv(n * r, BLOCK),)](
                x, alive, kappa if in_memory else float(kappa), scaling, scale_p, scale_g, rest, float(low),
                float("inf") if high is None else float(high), n * r, r, KAPPA_IN_MEMORY=in_memory, BLOCK=BLOCK,
                num_warps=4,
            )  # fmt: skip
    return scale_p, scale_g, rest


def _check_grams(grams: dict[str, torch.Tensor]) -> tuple[int, int]:
    shape = tuple(grams["ka"].shape)
    if len(shape) != 3 or shape[1] != shape[2] or not 1 <= shape[1] <= LARGEST:
        raise ValueError(f"lora_fast: ka: expected (n, r, r), r from 1 to {LARGEST}, got {shape}")
    for name, gram in grams.items():
        _check(name, gram, shape, torch.float32)
    return shape[:2]


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"lora_fast: {name}: expected contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
