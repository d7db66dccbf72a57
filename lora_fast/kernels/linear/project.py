"""S = (keep∘x) aᵀ, the adapter's down-projection (Hu et al., arXiv 2106.09685, eq. 3).

Math      S[t, :] = Σ_i keep[t, i] x[t, i] a[:, i]; keep is the dropout mask. scaling, which contains 1/(1-p), is
          applied to float32 sums where S is used (gemm.py, grads.py).
Grid      (blocks of BLOCK_T tokens, splits of d_in, blocks of BLOCK_R ranks). Usually there is one split and one block
          of ranks, and a program walks all of d_in for all ranks: x is read once, a once per program (from L2). Few
          tokens give few programs. In that case d_in and ranks beyond 64 are split between programs, and the float32
          partial sums are added where S is used (``lora_update_kernel``).
Shapes    x (n_tokens, d_in) f16/bf16/f32, a (r, d_in) any float, S (n_tokens, r) in the wider of both dtypes, float32
          at most; partial sums (splits, n_tokens, r) float32. Sums are float32, with one rounding at the store.
Backward  grads.py (dS, da) and gemm.py (dx). S is saved; the mask is computed again.
Roofline  n_tokens·d_in elements read against 2·n_tokens·d_in·r operations: memory bound up to r of about 200.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..launch import NO_MASK, DropoutMask, Launch, allocator, contiguous_rows, is_wide, on_device, precision, thin_dtype
from ..primitives import dot_wide, drop, keep_ieee, keep_mask, round_to


@triton.jit(do_not_specialize=["seed", "in_memory", "drop_level", "n_tokens"])
def lora_project_kernel(
    x, a, s,
    seed: tl.int64, in_memory: tl.int32, drop_level: tl.int32,
    n_tokens, d_in, stride_x, stride_a, d_in_per_split,
    R: tl.constexpr, DROPOUT: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores S, or its partial sum over this program's split of d_in, in the dtype of the buffer."""
    i_split = tl.program_id(1).to(tl.int64)
    i_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_t = i_t < n_tokens
    m_r = i_r < R
    p_x = x + i_t[:, None] * stride_x
    p_a = a + i_r[None, :].to(tl.int64) * stride_a
    b_s = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    first = tl.program_id(1) * d_in_per_split
    for o_in in range(first, first + d_in_per_split, BLOCK_IN):
        i_in = o_in + tl.arange(0, BLOCK_IN)
        m_in = i_in < d_in
        b_x = tl.load(p_x + i_in[None, :], mask=m_t[:, None] & m_in[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
        b_a = tl.load(p_a + i_in[:, None], mask=m_in[:, None] & m_r[None, :], other=0.0)  # [BLOCK_IN, BLOCK_R]
        if DROPOUT:
            b_x = drop(b_x, keep_mask(seed, in_memory, drop_level, i_t, o_in, BLOCK_IN))
            if b_x.dtype == tl.float32:
                b_x = keep_ieee(b_x)
        if ROUNDED:
            b_a = round_to(b_a.to(tl.float32), b_x.dtype)
        b_s = dot_wide(b_x, b_a, b_s, PRECISION)
    p_s = s + (i_split * n_tokens + i_t[:, None]) * R + i_r[None, :]
    tl.store(p_s, round_to(b_s, s.dtype.element_ty), mask=m_t[:, None] & m_r[None, :])


class Project:
    """Computes S for one signature of x and a.

    Args:
        dropout: whether a mask is applied to x.
        rounded: whether a is rounded to x's dtype, which S then has (as under autocast).
        short: whether the tile has small blocks of tokens, which give more programs if there are few tokens.
        split: whether d_in is split between programs. A call then returns float32 partial sums (splits, n_tokens, r),
            which ``lora_update_kernel`` adds.
    """

    def __init__(
        self, x: torch.Tensor, lora_A: torch.Tensor, dropout: bool, rounded: bool, short: bool, split: bool = False
    ):
        (n_tokens, d_in), r = x.shape, lora_A.shape[0]
        dtype = thin_dtype(x, lora_A, rounded)
        tile = tiles.project(x, r, short, wide=is_wide(x, lora_A))
        splits, d_in_per_split = tiles.split_of_few(n_tokens, d_in, r, tile) if split else (1, d_in)
        self.splits = splits
        self.empty = allocator(
            (splits, n_tokens, r) if split else (n_tokens, r), torch.float32 if split else dtype, x.device
        )
        self.launch = Launch(
            lora_project_kernel, (triton.cdiv(n_tokens, tile.t), splits, triton.cdiv(r, tile.r)),
            (n_tokens, d_in, x.stride(0), lora_A.stride(0), d_in_per_split),
            {"R": r, "DROPOUT": dropout, "ROUNDED": rounded, "PRECISION": precision(x), **tile.options()},
        )  # fmt: skip

    def __call__(
        self, x: torch.Tensor, lora_A: torch.Tensor, keep: DropoutMask | None = None, stream: int | None = None
    ) -> torch.Tensor:
        s = self.empty()
        self.launch.go(stream, (x, lora_A, s), keep or NO_MASK)
        return s


def project(
    x: torch.Tensor, lora_A: torch.Tensor, keep: DropoutMask | None = None, rounded: bool = False
) -> torch.Tensor:
    """Returns S (n_tokens, r) for x (n_tokens, d_in) and lora_A (r, d_in), in the wider of their dtypes. If
    ``rounded``, a is rounded to x's dtype, which S then has. Twin: ``reference.linear.project``."""
    x, lora_A = contiguous_rows(x), contiguous_rows(lora_A)
    if len(x) == 0:
        return torch.empty((0, len(lora_A)), dtype=thin_dtype(x, lora_A, rounded), device=x.device)
    with on_device(x):
        return Project(x, lora_A, keep is not None, rounded, len(x) <= tiles.SHORT)(x, lora_A, keep)
