"""Blocked algorithms on matrices in memory, too large for one program's registers: Cholesky, its triangular solves, and
the sum of outer products that both are built from.

Math      A + δI = UᵀU (U upper triangular), then Uᵀy = rhs, U x = y. Left-looking: BLOCK rows of A, minus the
          products of U's earlier rows, are one panel in registers, eliminated row by row. The solves take blocks of
          rows the same way. Nothing is inverted, so both are backward stable without pivoting (Higham, Accuracy and
          Stability of Numerical Algorithms, 2nd ed., theorems 10.3 and 10.4).
Grid      The caller chooses it. A whole program works on one matrix, at most as wide as a constexpr power of two. A
          thread may read what another wrote only after a barrier. The functions start and end with one, so that the
          caller needs none.
Shapes    float32 (``add_products`` also float64), row-major; ``stride`` is the distance between rows.
Roofline  n³/3 operations, and 2 n² for each right-hand side, from cache; 3 n dependent row steps: latency bound. Outer
          products need a tenth of the registers of a float32 ``tl.dot``, so more programs share a multiprocessor.
          Launch with 8 warps and ``maxnreg=registers(BLOCK_N)``, because ptxas by itself spills some registers to fit
          one more program.
"""

import triton
import triton.language as tl

from ..primitives import div_rn, take_column, take_row

BLOCK = tl.constexpr(16)  # rows of a panel
UNROLL = tl.constexpr(4)


@triton.jit
def add_products(b_sum, sign, p_left, step_left, m_left, p_right, step_right, m_right, count):
    """Returns b_sum + sign Σ_k left_k right_kᵀ, k < count. left_k is read at p_left + k step_left, right_k likewise."""
    for k in tl.range(0, count, num_stages=1, loop_unroll_factor=UNROLL):
        b_left = tl.load(p_left + k * step_left, mask=m_left, other=0.0)
        b_right = tl.load(p_right + k * step_right, mask=m_right, other=0.0)
        b_sum += (sign * b_left)[:, None] * b_right[None, :]
    return b_sum


@triton.jit
def copy(source, stride_source, target, stride, n, BLOCK_N: tl.constexpr):
    """target (n, n) ← source (n, n)."""
    tl.debug_barrier()
    i_n = tl.arange(0, BLOCK_N)
    for o in tl.range(0, n, BLOCK, num_stages=1):
        i_row = o + tl.arange(0, BLOCK)
        mask = (i_row < n)[:, None] & (i_n < n)[None, :]
        b_rows = tl.load(source + i_row[:, None] * stride_source + i_n[None, :], mask=mask, other=0.0)
        tl.store(target + i_row[:, None] * stride + i_n[None, :], b_rows, mask=mask)
    tl.debug_barrier()


@triton.jit
def cholesky(matrix, upper, n, stride, damping, BLOCK_N: tl.constexpr):
    """upper ← U with UᵀU = matrix + damping I, both (n, n) with one stride and possibly the same memory, n ≤ BLOCK_N.
    The values below U's diagonal are undefined. Returns 0, or the order (from 1) of the first leading minor that is not
    positive definite; U is then undefined."""
    i_n, i_block = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK)
    bad = 0
    for o in tl.range(0, n, BLOCK, num_stages=1):
        i_row = o + i_block
        m_row, m_n = i_row < n, (i_n >= o) & (i_n < n)
        o_panel = i_row[:, None] * stride + i_n[None, :]
        m_panel = m_row[:, None] & m_n[None, :]
        tl.debug_barrier()
        b_panel = tl.load(matrix + o_panel, mask=m_panel, other=0.0)  # [BLOCK, BLOCK_N]
        b_panel += tl.where(i_row[:, None] == i_n[None, :], damping, 0.0)
        b_panel = add_products(b_panel, -1.0, upper + i_row, stride, m_row, upper + i_n, stride, m_n, o)
        for j in range(o, tl.minimum(o + BLOCK, n)):
            b_row, b_column = take_row(b_panel, i_row, j), take_column(b_panel, i_n, j)
            pivot = tl.sum(tl.where(i_row == j, b_column, 0.0), 0)
            good = (pivot > 0.0) & (pivot < float("inf"))  # False for a NaN, too
            bad = tl.where((bad == 0) & (good == 0), j + 1, bad)
            root = tl.sqrt_rn(pivot)
            b_row, b_column = div_rn(b_row, root), div_rn(b_column, root)
            later = b_panel - b_column[:, None] * b_row[None, :]
            b_panel = tl.where((i_row == j)[:, None], b_row[None, :], tl.where((i_row > j)[:, None], later, b_panel))
        tl.debug_barrier()
        tl.store(upper + o_panel, b_panel, mask=m_panel)
    tl.debug_barrier()
    return bad


@triton.jit
def cholesky_solve(upper, rhs, x, n, k, stride, stride_x, BLOCK_K: tl.constexpr):
    """x ← the solution of UᵀU x = rhs, U from ``cholesky``, BLOCK_K columns at a time. rhs and x are (n, k) with
    ``stride_x`` between rows, possibly the same memory. rhs None stands for the first k columns of I."""
    i_block = tl.arange(0, BLOCK)
    last = (n - 1) // BLOCK * BLOCK
    for o_k in tl.range(0, k, BLOCK_K, num_stages=1):
        i_k = o_k + tl.arange(0, BLOCK_K)
        m_k = i_k < k
        for o in tl.range(0, n, BLOCK, num_stages=1):  # Uᵀy = rhs, from the first row on
            i_row = o + i_block
            m_row = i_row < n
            o_x, m_x = i_row[:, None] * stride_x + i_k[None, :], m_row[:, None] & m_k[None, :]
            tl.debug_barrier()
            if rhs is None:
                b_x = tl.where(i_row[:, None] == i_k[None, :], 1.0, 0.0)  # [BLOCK, BLOCK_K]
            else:
                b_x = tl.load(rhs + o_x, mask=m_x, other=0.0)
            b_x = add_products(b_x, -1.0, upper + i_row, stride, m_row, x + i_k, stride_x, m_k, o)
            for j in range(o, tl.minimum(o + BLOCK, n)):
                b_u = tl.load(upper + j * stride + i_row, mask=(i_row > j) & m_row, other=0.0)
                b_solved = div_rn(take_row(b_x, i_row, j), tl.load(upper + j * (stride + 1)))
                b_x = tl.where((i_row == j)[:, None], b_solved[None, :], b_x - b_u[:, None] * b_solved[None, :])
            tl.debug_barrier()  # rhs may be x: every thread has read this block
            tl.store(x + o_x, b_x, mask=m_x)
        for o_back in tl.range(0, n, BLOCK, num_stages=1):  # U x = y, from the last row back
            o = last - o_back
            i_row = o + i_block
            m_row = i_row < n
            o_x, m_x = i_row[:, None] * stride_x + i_k[None, :], m_row[:, None] & m_k[None, :]
            tl.debug_barrier()
            b_x = tl.load(x + o_x, mask=m_x, other=0.0)
            after = o + BLOCK
            p_u, p_x = upper + i_row * stride + after, x + after * stride_x + i_k
            b_x = add_products(b_x, -1.0, p_u, 1, m_row, p_x, stride_x, m_k, tl.maximum(n - after, 0))
            end = tl.minimum(after, n)
            for back in range(1, end - o + 1):
                j = end - back
                b_u = tl.load(upper + i_row * stride + j, mask=i_row < j, other=0.0)
                b_solved = div_rn(take_row(b_x, i_row, j), tl.load(upper + j * (stride + 1)))
                b_x = tl.where((i_row == j)[:, None], b_solved[None, :], b_x - b_u[:, None] * b_solved[None, :])
            tl.debug_barrier()
            tl.store(x + o_x, b_x, mask=m_x)
    tl.debug_barrier()


def registers(block_n: int) -> int:
    """Returns the largest number of registers of a thread, ``maxnreg`` of the launch."""
    return 128 if block_n <= 128 else 255
