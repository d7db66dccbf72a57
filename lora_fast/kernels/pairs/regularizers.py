"""The r×r algebra of iLoRA and scale regularization: from every pair's Grams to what is added to the factors or to
their gradients, one launch for all pairs.

Math      iLoRA      D = Ka − ρ Kb,  hₓ = min(lrₓ λ, 1 / ((1+ρ) max(σ₁(a)², ρ σ₁(b)²)))  for x = a, b, with σ₁² bounded
                     by the largest absolute row sum. The step is  b += b (h_b ρ D),  a += (−h_a D) a.
          scale      ℓ = log(tr Ka / n_a) − log(tr Kb / n_b + ε)  with n the number of entries. The gradient of λ ℓ² is
          reg.       c_b b, c_a a:  c_b = −4λℓ / (tr Kb + ε n_b),  c_a = 4λℓ / tr Ka;  both are 0 where a = 0.
          Sources and equations: lora_fast/methods/ilora.py and scale_reg.py.
Grid      One program per pair. iLoRA walks the Gram in blocks of 64×64, twice: for the row sums, then for D.
Shapes    Ka, Kb float32 (n, r, r), contiguous; per-pair numbers float32 (n,). Results have a row per factor, the n rows
          for b, then the n rows for a: matrices float32 (2n, r, r), coefficients float32 (2n,). Learning rates are
          numbers or tensors on the device (LR_IN_MEMORY). Arithmetic float32.
Roofline  2 r² numbers read twice, 2 r² written: a few kilobytes a pair, bound by the launch.
"""

import torch
import triton
import triton.language as tl

from ..launch import is_on_device, launch, on_device

BLOCK = 64


@triton.jit
def largest_row_sum(p_gram, r, BLOCK_R: tl.constexpr):
    """max_i Σ_j |G_ij|."""
    largest = 0.0
    for o_row in range(0, r, BLOCK_R):
        i_row = o_row + tl.arange(0, BLOCK_R)
        b_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
        for o_col in range(0, r, BLOCK_R):
            i_col = o_col + tl.arange(0, BLOCK_R)
            mask = (i_row < r)[:, None] & (i_col < r)[None, :]
            b_gram = tl.load(p_gram + i_row[:, None] * r + i_col[None, :], mask=mask, other=0.0)  # [BLOCK_R, BLOCK_R]
            b_sum += tl.sum(tl.abs(b_gram), 1)
        largest = tl.maximum(largest, tl.max(b_sum, 0))
    return largest


@triton.jit(do_not_specialize=["p_lr_a", "p_lr_b"])
def lora_imbalance_kernel(
    ka, kb, rho, matrices, p_lr_a, p_lr_b,
    lr_a, lr_b, lam, n_pairs, r,
    LR_IN_MEMORY: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_pair = tl.program_id(0).to(tl.int64)
    p_ka, p_kb = ka + i_pair * r * r, kb + i_pair * r * r
    p_b, p_a = matrices + i_pair * r * r, matrices + (n_pairs + i_pair) * r * r
    ratio = tl.load(rho + i_pair)
    largest = tl.maximum(largest_row_sum(p_ka, r, BLOCK_R), ratio * largest_row_sum(p_kb, r, BLOCK_R))
    bound = 1.0 / ((1.0 + ratio) * largest)  # infinite for a pair of zeros, whose D is 0: h stays lr λ
    if LR_IN_MEMORY:
        lr_a, lr_b = tl.load(p_lr_a).to(tl.float32), tl.load(p_lr_b).to(tl.float32)
    h_a, h_b = tl.minimum(lr_a * lam, bound), tl.minimum(lr_b * lam, bound)
    for o_row in range(0, r, BLOCK_R):
        i_row = o_row + tl.arange(0, BLOCK_R)
        for o_col in range(0, r, BLOCK_R):
            i_col = o_col + tl.arange(0, BLOCK_R)
            mask = (i_row < r)[:, None] & (i_col < r)[None, :]
            o_block = i_row[:, None] * r + i_col[None, :]
            b_ka = tl.load(p_ka + o_block, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_R], as all that follows
            b_d = b_ka - ratio * tl.load(p_kb + o_block, mask=mask, other=0.0)
            tl.store(p_b + o_block, h_b * ratio * b_d, mask=mask)
            tl.store(p_a + o_block, -h_a * b_d, mask=mask)


@triton.jit
def trace(p_gram, r, BLOCK_R: tl.constexpr):
    i_r = tl.arange(0, BLOCK_R)
    return tl.sum(tl.load(p_gram + i_r * r + i_r, mask=i_r < r, other=0.0), 0)


@triton.jit
def lora_scale_reg_kernel(
    ka, kb, entries_a, entries_b, coefficients,
    lam, eps, n_pairs, r,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_pair = tl.program_id(0).to(tl.int64)
    size_a, size_b = trace(ka + i_pair * r * r, r, BLOCK_R), trace(kb + i_pair * r * r, r, BLOCK_R)
    n_a, n_b = tl.load(entries_a + i_pair), tl.load(entries_b + i_pair)
    tilt = 4.0 * lam * (tl.log(size_a / n_a) - tl.log(size_b / n_b + eps))
    tl.store(coefficients + i_pair, tl.where(size_a == 0.0, 0.0, -tilt / (size_b + eps * n_b)))
    tl.store(coefficients + n_pairs + i_pair, tl.where(size_a == 0.0, 0.0, tilt / size_a))


def learning_rates(
    first: float | torch.Tensor, second: float | torch.Tensor, placeholder: torch.Tensor
) -> tuple[bool, tuple[torch.Tensor, torch.Tensor], tuple[float, float]]:
    """Returns whether kernels read both rates from memory (LR_IN_MEMORY), the tensors that they read, and the numbers
    that they get otherwise. A rate on ``placeholder``'s device is not copied to the host; where only one is there, the
    other is written to the device in float64. Without rates in memory the kernel gets ``placeholder`` as a pointer that
    it does not read."""
    device = placeholder.device
    rates = first, second
    if not any(is_on_device(lr, device) for lr in rates):
        return False, (placeholder, placeholder), (float(first), float(second))
    to_tensor = lambda lr: lr if is_on_device(lr, device) else torch.full((), lr, dtype=torch.float64, device=device)
    return True, (to_tensor(first), to_tensor(second)), (0.0, 0.0)


def imbalance(
    ka: torch.Tensor,
    kb: torch.Tensor,
    rho: torch.Tensor,
    lr_a: float | torch.Tensor,
    lr_b: float | torch.Tensor,
    lam: float,
) -> torch.Tensor:
    """Computes iLoRA's step from the Grams of the factors after AdamW. Twin: ``reference.pairs.imbalance``.

    Args:
        ka, kb: float32 (n, r, r).
        rho: float32 (n,).
        lr_a, lr_b: numbers, or 0-d tensors on the device, which the kernel reads there.
        lam: λ.

    Returns:
        float32 (2n, r, r), the matrices that ``transform.transform_`` adds: n for b, then n for a.
    """
    n, r, _ = ka.shape
    matrices = torch.empty((2 * n, r, r), dtype=torch.float32, device=ka.device)
    if n:
        in_memory, rates, numbers = learning_rates(lr_a, lr_b, matrices)
        options = {"LR_IN_MEMORY": in_memory, "BLOCK_R": min(BLOCK, triton.next_power_of_2(r)), "num_warps": 4}
        with on_device(ka):
            tensors = ka, kb, rho, matrices, *rates
            launch(lora_imbalance_kernel, (n,), tensors, (*numbers, float(lam)), (n, r), options)
    return matrices


def scale_reg(
    ka: torch.Tensor, kb: torch.Tensor, entries_a: torch.Tensor, entries_b: torch.Tensor, lam: float, eps: float
) -> torch.Tensor:
    """Computes scale regularization's coefficients: the gradient of λ ℓ² is coefficient · factor. Twin:
    ``reference.pairs.scale_reg``.

    Args:
        ka, kb: float32 (n, r, r).
        entries_a, entries_b: float32 (n,), the number of entries of each factor.
        lam, eps: λ and ε.

    Returns:
        float32 (2n,): n for b, then n for a.
    """
    n, r, _ = ka.shape
    coefficients = torch.empty(2 * n, dtype=torch.float32, device=ka.device)
    if n:
        options = {"BLOCK_R": triton.next_power_of_2(r), "num_warps": 1}
        with on_device(ka):
            tensors = ka, kb, entries_a, entries_b, coefficients
            launch(lora_scale_reg_kernel, (n,), tensors, (float(lam), float(eps)), (n, r), options)
    return coefficients
