"""What the kernels of several layers that read the same x share, and their S: one pass over x for all of them.

Math      The rows of up to four a's are the columns of one product: S_m[t, :] = Σ_i x[t, i] a_m[:, i]. A column of the
          product belongs to one member (``of_member``).
Grid      (blocks of tokens, splits of d_in, blocks of columns), as in project.py
Members   have one dtype of a, no dropout, and ``LARGEST_RANKS`` ranks in all. The others get a pass of their own
          (``passes``). One pass that draws a mask for each member would read 8,192 × 4,096 numbers of 16 bits once
          instead of three times (67 MB instead of 201 MB), but needs a product for each member, since each multiplies
          another x: it is left out.
Bytes     The pass reads x once instead of once a member.
Shapes    x (n_tokens, d_in), a_m (r_m, d_in), S_m (n_tokens, r_m), its partial sums (splits, n_tokens, r_m) float32
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter

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
def of_member(i, of0, of1, of2, of3, n0, n1, n2):
    """Returns the value of the member to which each index i belongs. The first n0 belong to the first member."""
    value = tl.where(i < n0 + n1, tl.where(i < n0, of0, of1), of2)
    return tl.where(i < n0 + n1 + n2, value, of3)


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


def passes(
    members: Sequence[int], key: Callable[[int], Hashable], rank: Callable[[int], int] = lambda i: 0
) -> list[list[int]]:
    """Returns which members share a pass: those of one key, as long as their ranks fit. A member whose key is None has
    a pass of its own."""
    shared: list[list[int]] = []
    for common, alike in group_by(members, key).items():
        room = -1
        for i in alike:
            if common is None or room < rank(i):
                shared.append([])
                room = LARGEST_RANKS
            shared[-1].append(i)
            room -= rank(i)
    return shared


def filled(tensors: Sequence) -> tuple:
    """Returns one tensor or number for each of ``MEMBERS``. The first stands in for those that are missing."""
    return (*tensors, *(tensors[0],) * (MEMBERS - len(tensors)))


def picker(where: Sequence[int] | None, count: int) -> Callable[[Sequence], Sequence]:
    """Returns a function that returns the items of a sequence at these places, or at the first ``count`` if None."""
    return itemgetter(*(range(count) if where is None else where))


def places_of(*counts: int) -> list[tuple[int, ...]]:
    """Returns the places of each run of tensors, one run after the other with these numbers of them, ``filled``. A run
    without tensors has no places."""
    ends = itertools.accumulate(counts)
    return [filled(range(end - count, end)) if count else () for count, end in zip(counts, ends, strict=True)]


def rank_flags(ranks: Sequence[int]) -> dict[str, int]:
    """Returns the ranks as constexprs, 0 for missing members."""
    return {f"R{i}": r for i, r in enumerate((*ranks, *(0,) * (MEMBERS - len(ranks))))}


class GroupProject:
    """Computes S of all members of a pass, for one signature of x and their a's. ``rounded``, ``short`` and ``split``
    are as in ``Project``. ``where``: the members' places among the factors of a call, which are all of them by
    default."""

    def __init__(
        self, x: torch.Tensor, factors: Sequence[torch.Tensor], rounded: bool, short: bool, split: bool,
        where: Sequence[int] | None = None,
    ):  # fmt: skip
        (n_tokens, d_in), ranks = x.shape, [len(a) for a in factors]
        tile = tiles.project(x, sum(ranks), short, wide=is_wide(x, factors[0]))
        # The update adds the parts of each S: their number is that of a member's own pass.
        splits, d_in_per_split = tiles.split_of_few(n_tokens, d_in, max(ranks), tile) if split else (1, d_in)
        self.splits, dtype = splits, torch.float32 if split else thin_dtype(x, factors[0], rounded)
        shapes = [(splits, n_tokens, r) if split else (n_tokens, r) for r in ranks]
        self.empty = [allocator(shape, dtype, x.device) for shape in shapes]
        self.pick, places = picker(where, len(factors)), places_of(len(factors), len(factors))
        self.launch = Launch(
            lora_group_project_kernel, (triton.cdiv(n_tokens, tile.t), splits, triton.cdiv(sum(ranks), tile.r)),
            (n_tokens, d_in, x.stride(0), *filled([a.stride(0) for a in factors]), d_in_per_split),
            {**rank_flags(ranks), "ROUNDED": rounded, "PRECISION": precision(x), **tile.options()},
            places=(-1, *places[0], *places[1]),
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, factors: Sequence[torch.Tensor], stream: int | None = None) -> list:
        ss = [empty() for empty in self.empty]
        self.launch.go(stream, (*self.pick(factors), *ss, x), ())
        return ss
