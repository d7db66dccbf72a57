"""LoRA-Muon's r×r algebra: from every pair's Grams to the matrices that turn momenta into moves, in one launch.

Math      T = (X # Y)⁻¹, the inverse of the geometric mean: the SPD solution of T X T = Y⁻¹ and T Y T = X⁻¹. In Muon's
          notation T = R (R Y R)^-½ R with R = X^-½. For b, X = a aᵀ and Y = m_bᵀ m_b; for a, X = bᵀb and Y = m_a m_aᵀ.
          The momenta are multiplied by −(η/2) T (lora_fast/methods/lora_muon.py). Each Gram is divided by its trace,
          and ``damping``, at least 16 ε, is added to its diagonal. Then the scaled product iteration (Denman and
          Beavers; Higham, Functions of Matrices, 2008, equations 6.15 and 6.28, here started at Y⁻¹ instead of I)
              X ← ½ (μ X + (μ P)⁻¹)    P ← ½ (μ P + (μ X)⁻¹)    from P = Y⁻¹; X → X # Y, P → T
          with μ⁴ = ‖X⁻¹‖ ‖P⁻¹‖ / (‖X‖ ‖P‖) (Frobenius). The damping keeps the eigenvalues of X P between 2⁻¹⁹ and 2¹⁹,
          so that STEPS are enough for every pair and no branch depends on a value. Inverses are computed column by
          column (Gauss-Jordan) in registers and by Cholesky in memory, where blocked Gauss-Jordan would lose the
          small eigenvalues. T is 0 where a Gram is 0; a NaN stays in its factor.
Error     ‖T^-½ (T' − T) T^-½‖₂ ≤ ε (32 + 4 κ), with κ the larger condition of the two damped Grams, at most
          1/damping. The singular values of a move's product are off by no more, relative to η/2.
Grid      Up to rank 64 one program for each factor, the matrices in registers. Above, up to SLOTS programs loop over
          the factors, each with five matrices in its slot of a scratch buffer that stays in L2.
Shapes    Grams float32 (n, r, r), contiguous, r from 1 to 256. Matrices float32 (2n, r, r), n for b, then n for a, the
          order of ``Batch.move``. Learning rates are numbers or 0-d float tensors on the device (LR_IN_MEMORY).
Roofline  16 inversions a factor, 2 r³ operations each, on 12 r² bytes, with 8 r dependent steps of both inversions at
          once: latency bound. Other programs of the batch hide the latency.
"""

import torch
import triton
import triton.language as tl

from ..launch import MOST_REGISTERS, check_square, check_tensor, launch, on_device
from ..limits import MUON_DAMPING_ULPS
from ..linalg.blocked import BLOCK, cholesky, cholesky_solve
from ..linalg.inverse import eliminate_pivot
from ..linalg.spd import IN_REGISTERS, WARPS
from ..primitives import div_rn
from .regularizers import learning_rates

STEPS = tl.constexpr(8)
LEAST_DAMPING = MUON_DAMPING_ULPS * 2.0**-23  # of float32
SLOTS = 192  # largest number of programs that work in memory; a multiprocessor runs one at a time


@triton.jit
def choose_grams(ka, kb, kp, kq, i_factor, n_pairs, r):
    """Returns the pointers to X and Y of a factor."""
    is_b, o_gram = i_factor < n_pairs, i_factor % n_pairs * r * r
    return tl.where(is_b, ka, kb) + o_gram, tl.where(is_b, kq, kp) + o_gram


@triton.jit
def load_traces(gram_x, gram_y, r, i_r):
    """Returns tr X and tr Y, both 1 where one of them is 0, and whether one is."""
    trace_x = tl.sum(tl.load(gram_x + i_r * (r + 1), mask=i_r < r, other=0.0), 0)
    trace_y = tl.sum(tl.load(gram_y + i_r * (r + 1), mask=i_r < r, other=0.0), 0)
    zero = (trace_x == 0.0) | (trace_y == 0.0)
    return tl.where(zero, 1.0, trace_x), tl.where(zero, 1.0, trace_y), zero


@triton.jit
def load_damped(gram, trace, damping, r, i_row, i_col):
    """Returns rows i_row of gram / trace + damping I: [rows, columns], 0 beyond the rank."""
    inside = (i_row < r)[:, None] & (i_col < r)[None, :]
    b_gram = div_rn(tl.load(gram + i_row[:, None] * r + i_col[None, :], mask=inside, other=0.0), trace)
    return b_gram + tl.where(inside & (i_row[:, None] == i_col[None, :]), damping, 0.0)


@triton.jit
def coefficient(p_lr_a, p_lr_b, lr_a, lr_b, trace_x, trace_y, is_b, LR_IN_MEMORY: tl.constexpr):
    """Returns −(η/2) / √(tr X tr Y), which multiplies the T of Grams divided by their traces."""
    if LR_IN_MEMORY:
        lr_a, lr_b = tl.load(p_lr_a).to(tl.float32), tl.load(p_lr_b).to(tl.float32)
    lr = tl.where(is_b, lr_b, lr_a)
    return -0.5 * lr / tl.sqrt_rn(trace_x) / tl.sqrt_rn(trace_y)


@triton.jit
def sum_of_squares(b_matrix):
    return tl.sum(tl.sum(b_matrix * b_matrix, 1), 0)


@triton.jit
def scale_from_squares(x, x_inverse, p, p_inverse):
    """Returns μ from the sums of squares of X, X⁻¹, P, P⁻¹."""
    return tl.sqrt_rn(tl.sqrt_rn(tl.sqrt_rn(x_inverse / x) * tl.sqrt_rn(p_inverse / p)))


@triton.jit
def average(b_first, b_second, mu):
    """Returns ½ (μ first + second / μ)."""
    return 0.5 * mu * b_first + 0.5 / mu * b_second


@triton.jit
def invert_both(b_first, b_second, i_r, r):
    for j in range(0, r):
        b_first, b_second = eliminate_pivot(b_first, i_r, i_r, j), eliminate_pivot(b_second, i_r, i_r, j)
    return b_first, b_second


@triton.jit
def iterate(b_x, b_x_inverse, b_p, b_p_inverse):
    """Returns the next X and P."""
    squares_x, squares_p = sum_of_squares(b_x), sum_of_squares(b_p)
    mu = scale_from_squares(squares_x, sum_of_squares(b_x_inverse), squares_p, sum_of_squares(b_p_inverse))
    return average(b_x, b_p_inverse, mu), average(b_p, b_x_inverse, mu)


@triton.jit(do_not_specialize=["p_lr_a", "p_lr_b", "n_pairs", "r"])
def lora_muon_kernel(
    ka, kb, kp, kq, matrices, p_lr_a, p_lr_b,
    lr_a, lr_b, damping, n_pairs, r,
    LR_IN_MEMORY: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_factor, i_r = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_R)
    gram_x, gram_y = choose_grams(ka, kb, kp, kq, i_factor, n_pairs, r)
    trace_x, trace_y, zero = load_traces(gram_x, gram_y, r, i_r)
    b_x = load_damped(gram_x, trace_x, damping, r, i_r, i_r)  # [BLOCK_R, BLOCK_R], as all that follows
    b_y = load_damped(gram_y, trace_y, damping, r, i_r, i_r)
    b_x_inverse, b_p = invert_both(b_x, b_y, i_r, r)
    b_x, b_p = iterate(b_x, b_x_inverse, b_p, b_y)
    for _ in range(1, STEPS):
        b_x_inverse, b_p_inverse = invert_both(b_x, b_p, i_r, r)
        b_x, b_p = iterate(b_x, b_x_inverse, b_p, b_p_inverse)
    b_p *= coefficient(p_lr_a, p_lr_b, lr_a, lr_b, trace_x, trace_y, i_factor < n_pairs, LR_IN_MEMORY)
    o_matrix = i_factor * r * r + i_r[:, None] * r + i_r[None, :]
    inside = (i_r < r)[:, None] & (i_r < r)[None, :]
    tl.store(matrices + o_matrix, tl.where(zero, 0.0, b_p), mask=inside)


@triton.jit
def load_rows(matrix, o_rows, mask):
    return tl.load(matrix + o_rows, mask=mask, other=0.0)


@triton.jit
def iterate_in_memory(x, x_inverse, p, p_inverse, r, BLOCK_R: tl.constexpr):
    """Computes the next X and P in memory. It starts and ends with a barrier."""
    i_r, i_block = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    squares_x, squares_x_inverse, squares_p, squares_p_inverse = 0.0, 0.0, 0.0, 0.0
    tl.debug_barrier()
    for o in tl.range(0, r, BLOCK, num_stages=1):
        o_rows = (o + i_block)[:, None] * BLOCK_R + i_r[None, :]
        mask = (o + i_block < r)[:, None] & (i_r < r)[None, :]
        squares_x += sum_of_squares(load_rows(x, o_rows, mask))
        squares_x_inverse += sum_of_squares(load_rows(x_inverse, o_rows, mask))
        squares_p += sum_of_squares(load_rows(p, o_rows, mask))
        squares_p_inverse += sum_of_squares(load_rows(p_inverse, o_rows, mask))
    mu = scale_from_squares(squares_x, squares_x_inverse, squares_p, squares_p_inverse)
    for o in tl.range(0, r, BLOCK, num_stages=1):
        o_rows = (o + i_block)[:, None] * BLOCK_R + i_r[None, :]
        mask = (o + i_block < r)[:, None] & (i_r < r)[None, :]
        b_x = average(load_rows(x, o_rows, mask), load_rows(p_inverse, o_rows, mask), mu)  # [BLOCK, BLOCK_R]
        b_p = average(load_rows(p, o_rows, mask), load_rows(x_inverse, o_rows, mask), mu)
        tl.debug_barrier()
        tl.store(x + o_rows, b_x, mask=mask)
        tl.store(p + o_rows, b_p, mask=mask)
    tl.debug_barrier()


@triton.jit
def invert(matrix, upper, inverse, r, BLOCK_R: tl.constexpr):
    """inverse ← matrix⁻¹, with U in ``upper``. It starts and ends with a barrier."""
    cholesky(matrix, upper, r, BLOCK_R, 0.0, BLOCK_R)
    cholesky_solve(upper, None, inverse, r, r, BLOCK_R, BLOCK_R, BLOCK_R // 2)


@triton.jit(do_not_specialize=["p_lr_a", "p_lr_b", "n_pairs", "r"])
def lora_muon_blocked_kernel(
    ka, kb, kp, kq, matrices, p_lr_a, p_lr_b, scratch,
    lr_a, lr_b, damping, n_pairs, r,
    LR_IN_MEMORY: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Computes what ``lora_muon_kernel`` does, with X, X⁻¹, P, P⁻¹ and a Cholesky factor in memory."""
    SIZE: tl.constexpr = BLOCK_R * BLOCK_R
    i_slot, i_r, i_block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    x = scratch + i_slot * 5 * SIZE
    x_inverse, p, p_inverse, upper = x + SIZE, x + 2 * SIZE, x + 3 * SIZE, x + 4 * SIZE
    for i_factor in tl.range(i_slot, 2 * n_pairs, tl.num_programs(0), num_stages=1):
        gram_x, gram_y = choose_grams(ka, kb, kp, kq, i_factor, n_pairs, r)
        trace_x, trace_y, zero = load_traces(gram_x, gram_y, r, i_r)
        tl.debug_barrier()
        for o in tl.range(0, r, BLOCK, num_stages=1):
            o_rows = (o + i_block)[:, None] * BLOCK_R + i_r[None, :]
            mask = (o + i_block < r)[:, None] & (i_r < r)[None, :]
            b_x = load_damped(gram_x, trace_x, damping, r, o + i_block, i_r)  # [BLOCK, BLOCK_R]
            b_y = load_damped(gram_y, trace_y, damping, r, o + i_block, i_r)
            tl.store(x + o_rows, b_x, mask=mask)
            tl.store(p_inverse + o_rows, b_y, mask=mask)
        for step in tl.range(0, STEPS, num_stages=1):
            invert(x, upper, x_inverse, r, BLOCK_R)
            first = step == 0  # the first step inverts Y, which is P⁻¹, to P; later steps invert P to P⁻¹
            invert(tl.where(first, p_inverse, p), upper, tl.where(first, p, p_inverse), r, BLOCK_R)
            iterate_in_memory(x, x_inverse, p, p_inverse, r, BLOCK_R)
        factor = coefficient(p_lr_a, p_lr_b, lr_a, lr_b, trace_x, trace_y, i_factor < n_pairs, LR_IN_MEMORY)
        for o in tl.range(0, r, BLOCK, num_stages=1):
            mask = (o + i_block < r)[:, None] & (i_r < r)[None, :]
            b_p = factor * load_rows(p, (o + i_block)[:, None] * BLOCK_R + i_r[None, :], mask)
            o_matrix = i_factor * r * r + (o + i_block)[:, None] * r + i_r[None, :]
            tl.store(matrices + o_matrix, tl.where(zero, 0.0, b_p), mask=mask)


def muon(
    ka: torch.Tensor,
    kb: torch.Tensor,
    kp: torch.Tensor,
    kq: torch.Tensor,
    lr_a: float | torch.Tensor,
    lr_b: float | torch.Tensor,
    damping: float,
) -> torch.Tensor:
    """Computes the matrices by which LoRA-Muon multiplies m_b from the right and m_a from the left. Twin:
    ``reference.pairs.muon``.

    Args:
        ka, kb, kp, kq: a aᵀ, bᵀb, m_a m_aᵀ and m_bᵀ m_b, float32 (n, r, r), contiguous.
        lr_a, lr_b: numbers, or 0-d tensors on the device.
        damping: relative to the traces; at least 16 ε is used.

    Returns:
        float32 (2n, r, r): n matrices for b, then n for a.
    """
    n, r = check_square("ka", ka)
    for name, gram in (("ka", ka), ("kb", kb), ("kp", kp), ("kq", kq)):
        check_tensor(name, gram, (n, r, r), torch.float32)
    matrices = torch.empty((2 * n, r, r), dtype=torch.float32, device=ka.device)
    if n == 0:
        return matrices
    in_memory, rates, rate_numbers = learning_rates(lr_a, lr_b, matrices)
    numbers = *rate_numbers, max(float(damping), LEAST_DAMPING)
    block_r = max(16, triton.next_power_of_2(r))
    options = {"LR_IN_MEMORY": in_memory, "BLOCK_R": block_r, "maxnreg": MOST_REGISTERS}
    tensors = ka, kb, kp, kq, matrices, *rates
    with on_device(ka):
        if r <= IN_REGISTERS:
            launch(lora_muon_kernel, (2 * n,), tensors, numbers, (n, r), options | {"num_warps": WARPS[block_r]})
        else:
            slots = min(2 * n, SLOTS)
            scratch = torch.empty((slots, 5, block_r, block_r), dtype=torch.float32, device=ka.device)
            launch(lora_muon_blocked_kernel, (slots,), (*tensors, scratch), numbers, (n, r), options | {"num_warps": 8})
    return matrices
