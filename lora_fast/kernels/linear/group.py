"""S and da of several layers that read the same x: one pass over x for all of them.

Math      The rows of up to four a's are the columns of one product: S_m[t, :] = Σ_i x[t, i] a_m[:, i], and
          da_m = dS_mᵀ x. A column of the product belongs to one member (``of_member``).
Grid      project: (blocks of tokens, splits of d_in, blocks of columns), as in project.py. grad_a: (column chunks of x,
          token splits), as in grads.py, with the token splits of a single layer, so that sums have the same order; a
          second launch adds the partial sums of all members.
Members   have one dtype of a, one of dS, no dropout, and ``LARGEST_RANKS`` ranks in all. The others get a pass of their
          own (``passes``). One pass that draws a mask for each member would read 8,192 × 4,096 numbers of 16 bits once
          instead of three times (67 MB instead of 201 MB), but needs a product for each member, since each multiplies
          another x: it is left out.
Bytes     A pass reads x once instead of once a member. Partial sums take as many bytes as in the passes of the members.
Shapes    x (n_tokens, d_in), a_m (r_m, d_in), S_m and dS_m (n_tokens, r_m), partial sums of S_m (splits, n_tokens, r_m)
          float32, of all da (splits, Σ r_m, d_in) float32.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
import triton
import triton.language as tl

from .. import tiles
from ..grouping import group_by
from ..launch import Launch, allocator, is_wide, precision, thin_dtype
from ..primitives import dot_wide, round_to

MEMBERS = 4  # of one pass
LARGEST_RANKS = 256  # of all members of a pass


@triton.jit
def of_member(i_r, of0, of1, of2, of3, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr):
    """Returns the value of the member to which each column i_r belongs."""
    value = tl.where(i_r < R0 + R1, tl.where(i_r < R0, of0, of1), of2)
    return tl.where(i_r < R0 + R1 + R2, value, of3)


@triton.jit(do_not_specialize=["n_tokens"])
def lora_group_project_kernel(
    x, a0, a1, a2, a3, s0, s1, s2, s3,
    n_tokens, d_in, stride_x, stride_a0, stride_a1, stride_a2, stride_a3, d_in_per_split,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores each member's S, or its partial sum over this program's split of d_in, in the dtype of the buffer."""
    i_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_r0 = i_r.to(tl.int64)
    i_r1, i_r2, i_r3 = i_r0 - R0, i_r0 - (R0 + R1), i_r0 - (R0 + R1 + R2)
    m_t, m_r = i_t < n_tokens, i_r < R0 + R1 + R2 + R3
    p_x = x + i_t[:, None] * stride_x
    p_a = of_member(
        i_r, a0 + i_r0 * stride_a0, a1 + i_r1 * stride_a1, a2 + i_r2 * stride_a2, a3 + i_r3 * stride_a3, R0, R1, R2
    )
    b_s = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    first = tl.program_id(1) * d_in_per_split
    for o_in in range(first, first + d_in_per_split, BLOCK_IN):
        i_in = o_in + tl.arange(0, BLOCK_IN)
        m_in = i_in < d_in
        b_x = tl.load(p_x + i_in[None, :], mask=m_t[:, None] & m_in[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
        b_a = tl.load(p_a[None, :] + i_in[:, None], mask=m_in[:, None] & m_r[None, :], other=0.0)
        if ROUNDED:
            b_a = round_to(b_a.to(tl.float32), b_x.dtype)
        b_s = dot_wide(b_x, b_a, b_s, PRECISION)
    i_row = tl.program_id(1).to(tl.int64) * n_tokens + i_t
    p_s = of_member(i_r, s0 + i_r0, s1 + i_r1, s2 + i_r2, s3 + i_r3, R0, R1, R2)
    p_s = p_s[None, :] + i_row[:, None] * of_member(i_r, R0, R1, R2, R3, R0, R1, R2)[None, :]
    tl.store(p_s, round_to(b_s, s0.dtype.element_ty), mask=m_t[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["n_tokens", "tokens_per_split"])
def lora_group_grad_a_kernel(
    x, ds0, ds1, ds2, ds3, da,
    n_tokens, d_in, stride_x, tokens_per_split,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores partial sums da (split, all ranks, d_in) in float32."""
    R: tl.constexpr = R0 + R1 + R2 + R3
    i_chunk, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_in = i_chunk * BLOCK_IN + tl.arange(0, BLOCK_IN)
    i_r = tl.arange(0, BLOCK_R)
    m_in, m_r = i_in < d_in, i_r < R
    p_ds = of_member(
        i_r, ds0 + i_r, ds1 + (i_r - R0), ds2 + (i_r - (R0 + R1)), ds3 + (i_r - (R0 + R1 + R2)), R0, R1, R2
    )
    r = of_member(i_r, R0, R1, R2, R3, R0, R1, R2)
    b_da = tl.zeros([BLOCK_IN, BLOCK_R], dtype=tl.float32)
    for o_t in range(0, tokens_per_split, BLOCK_T):
        i_t = i_split * tokens_per_split + o_t + tl.arange(0, BLOCK_T)
        m_t = i_t < n_tokens
        p_x = x + i_t[:, None] * stride_x + i_in[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_in[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
        b_ds = tl.load(p_ds[None, :] + i_t[:, None] * r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0)
        b_da = dot_wide(tl.trans(b_x), b_ds, b_da, PRECISION)
    p_da = da + (i_split * R + i_r[None, :]) * d_in + i_in[:, None]
    tl.store(p_da, b_da, mask=m_in[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["n_parts"])
def lora_group_sum_kernel(
    parts, da0, da1, da2, da3,
    d_in, n_parts,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of one row of one da, in order."""
    i_row = tl.program_id(0).to(tl.int64)
    i_in = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_in = i_in < d_in
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    p_part = parts + i_row * d_in + i_in
    for _ in range(0, n_parts):
        b_sum += tl.load(p_part, mask=m_in, other=0.0)
        p_part += (R0 + R1 + R2 + R3) * d_in
    i_row1, i_row2, i_row3 = i_row - R0, i_row - (R0 + R1), i_row - (R0 + R1 + R2)
    p_da = of_member(
        i_row, da0 + i_row * d_in, da1 + i_row1 * d_in, da2 + i_row2 * d_in, da3 + i_row3 * d_in, R0, R1, R2
    )
    tl.store(p_da + i_in, round_to(b_sum, da0.dtype.element_ty), mask=m_in)


def passes(members: Sequence[int], key: Callable[[int], Hashable], rank: Callable[[int], int]) -> list[list[int]]:
    """Returns which members share a pass over x: those of one key, as long as their ranks fit. A member whose key is
    None has a pass of its own."""
    shared: list[list[int]] = []
    for common, alike in group_by(members, key).items():
        room = 0
        for i in alike:
            if common is None or room < rank(i):
                shared.append([])
                room = LARGEST_RANKS
            shared[-1].append(i)
            room -= rank(i)
    return shared


def token_steps(x: torch.Tensor, ds_dtype: torch.dtype, r: int) -> tuple[int, int]:
    """Returns the tokens of one step and of one split in the da of a single layer."""
    tile = tiles.grad_a(x, r, wide=x.dtype is not ds_dtype)
    return tile.t, tiles.splits(*x.shape, r, tile)[2]


def filled(tensors: Sequence) -> tuple:
    """Returns one tensor or number for each of ``MEMBERS``. The first stands in for those that are missing."""
    return (*tensors, *(tensors[0],) * (MEMBERS - len(tensors)))


def rank_flags(ranks: Sequence[int]) -> dict[str, int]:
    """Returns the ranks as constexprs, 0 for missing members."""
    return {f"R{i}": r for i, r in enumerate((*ranks, *(0,) * (MEMBERS - len(ranks))))}


class GroupProject:
    """Computes S of all members for one signature of x and their a's. ``rounded``, ``short`` and ``split`` are as in
    ``Project``."""

    def __init__(self, x: torch.Tensor, factors: Sequence[torch.Tensor], rounded: bool, short: bool, split: bool):
        (n_tokens, d_in), ranks = x.shape, [len(a) for a in factors]
        tile = tiles.project(x, sum(ranks), short, wide=is_wide(x, factors[0]))
        # The update adds the parts of each S: their number is that of a member's own pass.
        splits, d_in_per_split = tiles.split_of_few(n_tokens, d_in, max(ranks), tile) if split else (1, d_in)
        self.splits, dtype = splits, torch.float32 if split else thin_dtype(x, factors[0], rounded)
        shapes = [(splits, n_tokens, r) if split else (n_tokens, r) for r in ranks]
        self.empty = [allocator(shape, dtype, x.device) for shape in shapes]
        self.launch = Launch(
            lora_group_project_kernel, (triton.cdiv(n_tokens, tile.t), splits, triton.cdiv(sum(ranks), tile.r)),
            (n_tokens, d_in, x.stride(0), *filled([a.stride(0) for a in factors]), d_in_per_split),
            {**rank_flags(ranks), "ROUNDED": rounded, "PRECISION": precision(x), **tile.options()},
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, factors: Sequence[torch.Tensor], stream: int | None = None) -> list:
        ss = [empty() for empty in self.empty]
        self.launch.go(stream, (x, *filled(factors), *filled(ss)), ())
        return ss


class GroupGradA:
    """Computes da of all members by one pass over x, for one signature."""

    def __init__(self, x: torch.Tensor, ds_dtype: torch.dtype, factors: Sequence[torch.Tensor]):
        (n_tokens, d_in), ranks = x.shape, [len(a) for a in factors]
        r, (step, tokens_per_split) = sum(ranks), token_steps(x, ds_dtype, max(ranks))
        tile, splits = tiles.grad_a(x, r, x.dtype is not ds_dtype), triton.cdiv(n_tokens, tokens_per_split)
        self.empty = [allocator((len(a), d_in), a.dtype, x.device) for a in factors]
        self.empty_parts = allocator((splits, r, d_in), torch.float32, x.device)
        options = tile._replace(t=step).options(outer="BLOCK_IN")
        self.launch = Launch(
            lora_group_grad_a_kernel, (triton.cdiv(d_in, tile.outer), splits),
            (n_tokens, d_in, x.stride(0), tokens_per_split),
            {**rank_flags(ranks), "PRECISION": precision(x), **options},
        )  # fmt: skip
        self.add = Launch(
            lora_group_sum_kernel, (r, triton.cdiv(d_in, tiles.SUM_BLOCK)), (d_in, splits),
            {**rank_flags(ranks), "BLOCK": tiles.SUM_BLOCK, "num_warps": 4},
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, ds: Sequence[torch.Tensor], stream: int | None = None) -> list:
        parts, da = self.empty_parts(), [empty() for empty in self.empty]
        self.launch.go(stream, (x, *filled(ds), parts), ())
        self.add.go(stream, (parts, *filled(da)), ())
        return da
