"""dS, db and da of several layers that read the same x: one pass over all dy for dS and db, one pass over x for all da.

Math      As in grads.py. dS_m and db_m come from the member's own dy; da_m = dS_mᵀ x are columns of one product.
Grid      grad_s_b: the programs of one member after the other, each with its column chunks and token splits. grad_a:
          (column chunks of x, token splits). Chunks and splits are those of a single layer, so that sums have the same
          order and the same bits. One more launch adds the partial sums of all members.
Members   of a pass over dy have one rank, tile and alignment, and each result of theirs has one dtype
          (``s_b_passes``). A pass over x is as in group.py, with one dtype of dS.
Bytes     As in grads.py, but x is read once instead of once a member. If any partial sums are needed, each result of
          that kind has some.
Shapes    dy_m (n_tokens, d_out_m), S_m and dS_m (n_tokens, r_m), db_m (d_out_m, r_m), x (n_tokens, d_in), da_m
          (r_m, d_in). Partial sums are float32, in one buffer: those of each dS_m (chunks, n_tokens, r_m), db_m
          (splits, d_out_m, r_m), da_m (splits, r_m, d_in), at the offsets that the launches have.
"""

import math
from collections.abc import Sequence
from operator import mul

import torch
import triton
import triton.language as tl

from .. import tiles
from ..launch import Launch, allocator, precision, thin_dtype
from ..primitives import dot_wide, round_to
from .grads import store_s_b, sum_block, tile_s_b
from .group import MEMBERS, filled, of_member, passes, picker, places_of, rank_flags

_EACH = lambda *names: [f"{name}{i}" for name in names for i in range(MEMBERS)]
ALIGNMENT = 32  # elements: 128 bytes


@triton.jit(do_not_specialize=["n_tokens", *_EACH("tokens_per_split")])
def lora_group_grad_s_b_kernel(
    dy0, dy1, dy2, dy3, s0, s1, s2, s3, b0, b1, b2, b3, ds0, ds1, ds2, ds3, db0, db1, db2, db3,
    scaling0, scaling1, scaling2, scaling3,
    n_tokens, tokens_per_split0, tokens_per_split1, tokens_per_split2, tokens_per_split3,
    d_out0, d_out1, d_out2, d_out3, stride_dy0, stride_dy1, stride_dy2, stride_dy3,
    stride_b0, stride_b1, stride_b2, stride_b3, o_ds0, o_ds1, o_ds2, o_ds3, o_db0, o_db1, o_db2, o_db3,
    R: tl.constexpr, NEED_S: tl.constexpr, NEED_B: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores each member's partial sums, or its dS and db, at the offsets of the buffers, in their dtypes. A missing
    member has a d_out of 0."""
    i = tl.program_id(0)
    n0 = tl.cdiv(d_out0, BLOCK_OUT) * tl.cdiv(n_tokens, tokens_per_split0)
    n1 = tl.cdiv(d_out1, BLOCK_OUT) * tl.cdiv(n_tokens, tokens_per_split1)
    n2 = tl.cdiv(d_out2, BLOCK_OUT) * tl.cdiv(n_tokens, tokens_per_split2)
    i_own = i - of_member(i, 0, n0, n0 + n1, n0 + n1 + n2, n0, n1, n2)
    d_out = of_member(i, d_out0, d_out1, d_out2, d_out3, n0, n1, n2)
    n_chunks = tl.cdiv(d_out, BLOCK_OUT)
    store_s_b(
        of_member(i, dy0, dy1, dy2, dy3, n0, n1, n2), of_member(i, s0, s1, s2, s3, n0, n1, n2),
        of_member(i, b0, b1, b2, b3, n0, n1, n2),
        of_member(i, ds0 + o_ds0, ds1 + o_ds1, ds2 + o_ds2, ds3 + o_ds3, n0, n1, n2),
        of_member(i, db0 + o_db0, db1 + o_db1, db2 + o_db2, db3 + o_db3, n0, n1, n2),
        of_member(i, scaling0, scaling1, scaling2, scaling3, n0, n1, n2),
        (i_own % n_chunks).to(tl.int64), (i_own // n_chunks).to(tl.int64), n_tokens, d_out,
        of_member(i, stride_dy0, stride_dy1, stride_dy2, stride_dy3, n0, n1, n2),
        of_member(i, stride_b0, stride_b1, stride_b2, stride_b3, n0, n1, n2),
        of_member(i, tokens_per_split0, tokens_per_split1, tokens_per_split2, tokens_per_split3, n0, n1, n2),
        R, NEED_S, NEED_B, ROUNDED, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "tokens_per_split"])
def lora_group_grad_a_kernel(
    x, ds0, ds1, ds2, ds3, da0, da1, da2, da3,
    n_tokens, d_in, stride_x, tokens_per_split, o_da0, o_da1, o_da2, o_da3,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores each member's partial sums da (split, r, d_in), or its da, at the offsets of the buffers, in their
    dtype."""
    i_chunk, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_in = i_chunk * BLOCK_IN + tl.arange(0, BLOCK_IN)
    i_r = tl.arange(0, BLOCK_R)
    m_in, m_r = i_in < d_in, i_r < R0 + R1 + R2 + R3
    i_own = i_r - of_member(i_r, 0, R0, R0 + R1, R0 + R1 + R2, R0, R1, R2)
    r = of_member(i_r, R0, R1, R2, R3, R0, R1, R2)
    p_ds = of_member(i_r, ds0 + i_own, ds1 + i_own, ds2 + i_own, ds3 + i_own, R0, R1, R2)
    b_da = tl.zeros([BLOCK_IN, BLOCK_R], dtype=tl.float32)
    for o_t in range(0, tokens_per_split, BLOCK_T):
        i_t = i_split * tokens_per_split + o_t + tl.arange(0, BLOCK_T)
        m_t = i_t < n_tokens
        p_x = x + i_t[:, None] * stride_x + i_in[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_in[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
        b_ds = tl.load(p_ds[None, :] + i_t[:, None] * r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0)
        b_da = dot_wide(tl.trans(b_x), b_ds, b_da, PRECISION)
    o_row = (i_split * r + i_own) * d_in
    p_da = of_member(
        i_r, da0 + (o_da0 + o_row), da1 + (o_da1 + o_row), da2 + (o_da2 + o_row), da3 + (o_da3 + o_row), R0, R1, R2
    )
    p_da = p_da[None, :] + i_in[:, None]
    tl.store(p_da, round_to(b_da, da0.dtype.element_ty), mask=m_in[:, None] & m_r[None, :])


@triton.jit
def sum_member(
    parts, total0, total1, total2, total3,
    i, numel0, numel1, numel2, numel3, n_parts0, n_parts1, n_parts2, n_parts3, o0, o1, o2, o3,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of block i of the members' totals, in order."""
    n0, n1, n2 = tl.cdiv(numel0, BLOCK), tl.cdiv(numel1, BLOCK), tl.cdiv(numel2, BLOCK)
    sum_block(
        parts + of_member(i, o0, o1, o2, o3, n0, n1, n2),
        of_member(i, total0, total1, total2, total3, n0, n1, n2),
        of_member(i, numel0, numel1, numel2, numel3, n0, n1, n2),
        of_member(i, n_parts0, n_parts1, n_parts2, n_parts3, n0, n1, n2),
        i - of_member(i, 0, n0, n0 + n1, n0 + n1 + n2, n0, n1, n2), False, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=_EACH("n_parts", "n_parts_b"))
def lora_group_sum_kernel(
    parts, total0, total1, total2, total3, total_b0, total_b1, total_b2, total_b3,
    numel0, numel1, numel2, numel3, n_parts0, n_parts1, n_parts2, n_parts3, o0, o1, o2, o3,
    numel_b0, numel_b1, numel_b2, numel_b3, n_parts_b0, n_parts_b1, n_parts_b2, n_parts_b3, o_b0, o_b1, o_b2, o_b3,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of one or two results of each member: those of dS and of db, or of da alone."""
    i = tl.program_id(0)
    n = tl.cdiv(numel0, BLOCK) + tl.cdiv(numel1, BLOCK) + tl.cdiv(numel2, BLOCK) + tl.cdiv(numel3, BLOCK)
    if i < n:
        sum_member(
            parts, total0, total1, total2, total3,
            i, numel0, numel1, numel2, numel3, n_parts0, n_parts1, n_parts2, n_parts3, o0, o1, o2, o3, BLOCK,
        )  # fmt: skip
    else:
        sum_member(
            parts, total_b0, total_b1, total_b2, total_b3,
            i - n, numel_b0, numel_b1, numel_b2, numel_b3, n_parts_b0, n_parts_b1, n_parts_b2, n_parts_b3,
            o_b0, o_b1, o_b2, o_b3, BLOCK,
        )  # fmt: skip


class Results:
    """One result of each member of a pass. A kernel writes all of them as ``counts`` float32 partial sums, unless each
    has one alone; it then writes the results themselves. If they are not ``needed``, there is nothing to write."""

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, counts: Sequence[int], device: torch.device,
        needed: bool = True,
    ):  # fmt: skip
        self.needed, self.in_parts = needed, needed and max(counts) > 1
        self.empty = [allocator(shape, dtype, device) for shape in shapes] if needed else []
        sizes = zip(shapes, counts, strict=True) if self.in_parts else ()
        self.sizes = [(math.prod(shape), count) for shape, count in sizes]  # elements and partial sums


class Parts:
    """The buffer of all partial sums of a pass, and the launch that adds them, which is None if there are none. The
    launch takes the buffer and the results that are in parts. ``offsets`` are those of each kind of results."""

    def __init__(self, kinds: Sequence[Results], device: torch.device):
        self.size, blocks, sizes, self.offsets = 0, 0, [], []
        for kind in kinds:
            offsets = []
            for numel, count in kind.sizes:
                offsets.append(self.size)
                self.size += triton.cdiv(numel * count, ALIGNMENT) * ALIGNMENT
                blocks += triton.cdiv(numel, tiles.SUM_BLOCK)
            zeros = [0] * (MEMBERS - len(offsets))
            numels, counts = zip(*kind.sizes, strict=True) if kind.sizes else ((), ())
            self.offsets.append((*offsets, *zeros))
            sizes += *numels, *zeros, *counts, *zeros, *offsets, *zeros
        sizes += [0] * (6 * MEMBERS - len(sizes))
        self.empty, self.add = allocator((self.size,), torch.float32, device), None
        if blocks:
            buffer, *totals = places_of(1, *[len(kind.sizes) for kind in kinds], *[0] * (2 - len(kinds)))
            places = 0, *(totals[0] or buffer), *(totals[1] or buffer)
            options = {"BLOCK": tiles.SUM_BLOCK, "num_warps": 4}
            self.add = Launch(lora_group_sum_kernel, (blocks,), tuple(sizes), options, places=places)


def s_b_passes(
    members: Sequence[int], dys: Sequence, ss: Sequence, factors: Sequence[torch.Tensor], needs: dict
) -> list[list[int]]:
    """Returns which members share a pass over dy, given what each needs (dS, db)."""

    def key(i: int) -> tuple:
        dy, s, b = dys[i], ss[i], factors[i]
        # A member whose rows are not aligned to 16 bytes would make the loads of all others as narrow as its own.
        aligned = [t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (dy, b)]
        return tile_s_b(dy, s, b), b.shape[1], s.dtype, b.dtype, needs[i], *aligned, dy.shape[1] % 16 == 0

    return passes(members, key)


class GroupGradSB:
    """Computes dS and db of all members of a pass over dy, for one signature. ``needs`` and ``rounded`` are as in
    ``GradSB``. ``where``: the members' places in the sequences of a call, which are all of them by default."""

    def __init__(
        self, dys: Sequence[torch.Tensor], ss: Sequence[torch.Tensor], factors: Sequence[torch.Tensor],
        needs: tuple[bool, bool], rounded: bool = False, where: Sequence[int] | None = None,
    ):  # fmt: skip
        dy, r, tile = dys[0], factors[0].shape[1], tile_s_b(dys[0], ss[0], factors[0])
        d_outs = [dy.shape[1] for dy in dys]
        chunks, splits, tokens = zip(*[tiles.splits(*dy.shape, r, tile) for dy in dys], strict=True)
        ds_dtype = thin_dtype(dy, factors[0], rounded)
        self.ds = Results([(len(dy), r) for dy in dys], ds_dtype, chunks, dy.device, needs[0])
        self.db = Results([(d_out, r) for d_out in d_outs], factors[0].dtype, splits, dy.device, needs[1])
        self.parts, n, self.none = Parts((self.ds, self.db), dy.device), len(dys), [None] * len(dys)
        self.pick, self.pick_filled = picker(where, n), picker(filled(range(n) if where is None else where), MEMBERS)
        written = [n * (kind.needed and not kind.in_parts) for kind in (self.ds, self.db)]
        of_dy, of_b, of_s, of_parts, *of_results = places_of(n, n, n * needs[1], bool(self.parts.size), *written)
        # dy stands in for what is not needed: the kernel takes a pointer, but does not use it.
        into = [
            of_parts if k.in_parts else of_k or of_dy for k, of_k in zip((self.ds, self.db), of_results, strict=True)
        ]
        strides = (filled([t.stride(0) for t in tensors]) for tensors in (dys, factors))
        flags = {"R": r, "NEED_S": needs[0], "NEED_B": needs[1], "ROUNDED": rounded, "PRECISION": precision(dy)}
        self.launch = Launch(
            lora_group_grad_s_b_kernel, (sum(map(mul, chunks, splits)),),
            (
                len(dy), *filled(tokens), *d_outs, *[0] * (MEMBERS - n),
                *next(strides), *next(strides), *self.parts.offsets[0], *self.parts.offsets[1],
            ),
            {**flags, **tile.options()}, places=(*of_dy, *(of_s or of_dy), *of_b, *into[0], *into[1]),
        )  # fmt: skip

    def __call__(
        self, dys: Sequence, ss: Sequence, factors: Sequence, scalings: Sequence, stream: int | None = None,
        buffer: torch.Tensor | None = None,
    ):  # fmt: skip
        """Returns each dS and each db, or None for each if they are not needed. ``buffer``: room for the partial
        sums."""
        dss, dbs = [empty() for empty in self.ds.empty], [empty() for empty in self.db.empty]
        pick, add, added, written = self.pick, self.parts.add, (), (*dss, *dbs)
        if add is not None:
            buffer = self.parts.empty() if buffer is None else buffer
            added = buffer, *(dss if self.ds.in_parts else ()), *(dbs if self.db.in_parts else ())
            written = buffer, *(() if self.ds.in_parts else dss), *(() if self.db.in_parts else dbs)
        tensors = *pick(dys), *pick(factors), *(pick(ss) if dbs else ()), *written
        self.launch.go(stream, tensors, self.pick_filled(scalings))
        if add is not None:
            add.go(stream, added, ())
        return dss or self.none, dbs or self.none


def token_steps(x: torch.Tensor, ds_dtype: torch.dtype, r: int) -> tuple[int, int]:
    """Returns the tokens of one step and of one split in the da of a single layer."""
    tile = tiles.grad_a(x, r, wide=x.dtype is not ds_dtype)
    return tile.t, tiles.splits(*x.shape, r, tile)[2]


class GroupGradA:
    """Computes da of all members of a pass over x, for one signature. ``where``: the members' places in the sequence of
    a call, which are all of them by default."""

    def __init__(
        self, x: torch.Tensor, ds_dtype: torch.dtype, factors: Sequence[torch.Tensor],
        where: Sequence[int] | None = None,
    ):  # fmt: skip
        (n_tokens, d_in), ranks = x.shape, [len(a) for a in factors]
        step, tokens_per_split = token_steps(x, ds_dtype, max(ranks))
        tile, splits = tiles.grad_a(x, sum(ranks), x.dtype is not ds_dtype), triton.cdiv(n_tokens, tokens_per_split)
        self.da = Results([(r, d_in) for r in ranks], factors[0].dtype, [splits] * len(ranks), x.device)
        self.parts, self.pick, n = Parts((self.da,), x.device), picker(where, len(factors)), len(factors)
        of_ds, of_da = places_of(n, 1 if self.parts.size else n)
        options = tile._replace(t=step).options(outer="BLOCK_IN")
        self.launch = Launch(
            lora_group_grad_a_kernel, (triton.cdiv(d_in, tile.outer), splits),
            (n_tokens, d_in, x.stride(0), tokens_per_split, *self.parts.offsets[0]),
            {**rank_flags(ranks), "PRECISION": precision(x), **options}, places=(-1, *of_ds, *of_da),
        )  # fmt: skip

    def __call__(
        self, x: torch.Tensor, ds: Sequence[torch.Tensor], stream: int | None = None, buffer: torch.Tensor | None = None
    ) -> list:
        """Returns each da. ``buffer``: room for the partial sums."""
        das, add = [empty() for empty in self.da.empty], self.parts.add
        if add is None:
            self.launch.go(stream, (*self.pick(ds), *das, x), ())
        else:
            buffer = self.parts.empty() if buffer is None else buffer
            self.launch.go(stream, (*self.pick(ds), buffer, x), ())
            add.go(stream, (buffer, *das), ())
        return das
