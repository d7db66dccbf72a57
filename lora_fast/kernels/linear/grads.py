"""Gradients of the adapter: dS and db from one pass over dy, da from one pass over x.

Math      y = x Wᵀ + scaling S bᵀ with S = (keep∘x) aᵀ gives, with dS the gradient of S,
              dS = scaling dy b        db = scaling dyᵀ S        da = dSᵀ (keep∘x)
          Both dS and db need all of dy, summed along different dimensions. One program owns a column chunk and a token
          range, so that one read of dy serves both.
Grid      (column chunks, token splits). dS is summed over column chunks and db (da) over token splits. Programs write
          float32 partial sums, and a second small launch adds them in a fixed order and rounds once. Without atomics
          the same inputs give the same bits.
Shapes    dy (n_tokens, d_out), x (n_tokens, d_in); S (n_tokens, r) in the wider dtype of x and a, dS of dy and b; db
          (d_out, r) and da (r, d_in) in the adapter's dtype.
Roofline  dy and x once each, plus partials: n_tokens·r·4·2 bytes per column chunk, d·r·4·2 per token split. The
          partials of dS grow with r. From about r = 64 on reading dy twice is cheaper, and ``strategies.py`` chooses
          cuBLAS.
"""

import math

import torch
import triton
import triton.language as tl

from .. import tiles
from ..launch import NO_MASK, DropoutMask, Launch, allocator, contiguous_rows, is_wide, on_device, precision, thin_dtype
from ..primitives import dot_wide, drop, keep_ieee, keep_mask, round_to


@triton.jit(do_not_specialize=["n_tokens", "tokens_per_split"])
def lora_grad_s_b_kernel(
    dy, s, b, ds, db,
    scaling,
    n_tokens, d_out, stride_dy, stride_b, tokens_per_split,
    R: tl.constexpr, NEED_S: tl.constexpr, NEED_B: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores partial sums ds (chunk, n_tokens, r) and db (split, d_out, r) in the dtypes of their buffers."""
    i_chunk, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    store_s_b(
        dy, s, b, ds, db, scaling, i_chunk, i_split, n_tokens, d_out, stride_dy, stride_b, tokens_per_split,
        R, NEED_S, NEED_B, ROUNDED, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_R,
    )  # fmt: skip


@triton.jit
def store_s_b(
    dy, s, b, ds, db,
    scaling, i_chunk, i_split,
    n_tokens, d_out, stride_dy, stride_b, tokens_per_split,
    R: tl.constexpr, NEED_S: tl.constexpr, NEED_B: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores what one column chunk and one token range of dy add to dS and db."""
    i_out = i_chunk * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i_r = tl.arange(0, BLOCK_R)
    m_out = i_out < d_out
    m_r = i_r < R
    m_b = m_out[:, None] & m_r[None, :]
    b_db = tl.zeros([BLOCK_OUT, BLOCK_R], dtype=tl.float32)
    if NEED_S:
        b_b = tl.load(b + i_out[:, None] * stride_b + i_r[None, :], mask=m_b, other=0.0)
        if ROUNDED:
            b_b = round_to(b_b.to(tl.float32), dy.dtype.element_ty)
    for o_t in range(0, tokens_per_split, BLOCK_T):
        i_t = i_split * tokens_per_split + o_t + tl.arange(0, BLOCK_T)
        m_t = i_t < n_tokens
        m_s = m_t[:, None] & m_r[None, :]
        p_dy = dy + i_t[:, None] * stride_dy + i_out[None, :]
        b_dy = tl.load(p_dy, mask=m_t[:, None] & m_out[None, :], other=0.0)  # [BLOCK_T, BLOCK_OUT]
        if NEED_S:
            b_ds = dot_wide(b_dy, b_b, tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32), PRECISION)
            p_ds = ds + (i_chunk * n_tokens + i_t[:, None]) * R + i_r[None, :]
            tl.store(p_ds, round_to(b_ds * scaling, ds.dtype.element_ty), mask=m_s)
        if NEED_B:
            b_s = tl.load(s + i_t[:, None] * R + i_r[None, :], mask=m_s, other=0.0)  # [BLOCK_T, BLOCK_R]
            b_db = dot_wide(tl.trans(b_dy), b_s, b_db, PRECISION)
    if NEED_B:
        p_db = db + (i_split * d_out + i_out[:, None]) * R + i_r[None, :]
        tl.store(p_db, round_to(b_db * scaling, db.dtype.element_ty), mask=m_b)


@triton.jit(do_not_specialize=["seed", "in_memory", "drop_level", "n_tokens", "tokens_per_split"])
def lora_grad_a_kernel(
    x, ds, da,
    seed: tl.int64, in_memory: tl.int32, drop_level: tl.int32,
    n_tokens, d_in, stride_x, tokens_per_split,
    R: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores partial sums da (split, r, d_in) in the dtype of the buffer."""
    i_chunk, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_in = i_chunk * BLOCK_IN
    i_in = o_in + tl.arange(0, BLOCK_IN)
    i_r = tl.arange(0, BLOCK_R)
    m_in = i_in < d_in
    m_r = i_r < R
    b_da = tl.zeros([BLOCK_IN, BLOCK_R], dtype=tl.float32)
    for o_t in range(0, tokens_per_split, BLOCK_T):
        i_t = i_split * tokens_per_split + o_t + tl.arange(0, BLOCK_T)
        m_t = i_t < n_tokens
        p_x = x + i_t[:, None] * stride_x + i_in[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_in[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
        b_ds = tl.load(ds + i_t[:, None] * R + i_r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0)
        if DROPOUT:
            b_x = drop(b_x, keep_mask(seed, in_memory, drop_level, i_t, o_in, BLOCK_IN))
            if b_x.dtype == tl.float32:
                b_x = keep_ieee(b_x)
        b_da = dot_wide(tl.trans(b_x), b_ds, b_da, PRECISION)
    p_da = da + (i_split * R + i_r[None, :]) * d_in + i_in[:, None]
    tl.store(p_da, round_to(b_da, da.dtype.element_ty), mask=m_in[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["n_partials0", "n_partials1"])
def lora_sum_partials_kernel(
    partial0, total0, partial1, total1,
    numel0, n_partials0, numel1, n_partials1,
    ACCUMULATE0: tl.constexpr, ACCUMULATE1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes total[i] = Σ_k partial[k, i], k ascending, for two buffers in one launch. A total that accumulates is
    added to the sum in float32, before its one rounding."""
    i_block = tl.program_id(0)
    n_blocks0 = tl.cdiv(numel0, BLOCK)
    if i_block < n_blocks0:
        sum_block(partial0, total0, numel0, n_partials0, i_block, ACCUMULATE0, BLOCK)
    else:
        sum_block(partial1, total1, numel1, n_partials1, i_block - n_blocks0, ACCUMULATE1, BLOCK)


@triton.jit
def sum_block(partial, total, numel, n_partials, i_block, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    i = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = i < numel
    p_partial = partial + i
    # The casts are for a tensor, of any dtype, that stands in where there are no partial sums. No program loads it, but
    # the code must compile. A sum that started from 0 would make a -0 of one part to 0.
    b_total = tl.load(p_partial, mask=m_i, other=0.0).to(tl.float32)
    for _ in range(1, n_partials):
        p_partial += numel
        b_total += tl.load(p_partial, mask=m_i, other=0.0).to(tl.float32)
    if ACCUMULATE:
        b_total += tl.load(total + i, mask=m_i, other=0.0).to(tl.float32)
    tl.store(total + i, round_to(b_total, total.dtype.element_ty), mask=m_i)


class Split:
    """The buffers of a result that a kernel writes as ``count`` float32 partial sums, for one signature. If there is
    one partial sum, the kernel writes the result itself. If it is not ``needed``, there are no buffers."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, count: int, device: torch.device, needed: bool = True
    ):
        self.needed, self.in_parts = needed, needed and count > 1
        self.sizes = (math.prod(shape), count) if self.in_parts else (0, 0)
        self.empty = allocator(shape, dtype, device)
        self.empty_parts = allocator((count, *shape), torch.float32, device)


def sum_launch(
    first: tuple[int, int], second: tuple[int, int] = (0, 0), accumulate: tuple[bool, bool] = (False, False)
) -> Launch | None:
    """Returns the launch that adds the partial sums of one or two results, given the number of elements and of partial
    sums of each, or None if there are no partial sums. ``accumulate``: whether each is added to what its result
    holds."""
    (numel0, _), (numel1, _) = first, second
    n_blocks = triton.cdiv(numel0, tiles.SUM_BLOCK) + triton.cdiv(numel1, tiles.SUM_BLOCK)
    options = {"ACCUMULATE0": accumulate[0], "ACCUMULATE1": accumulate[1], "BLOCK": tiles.SUM_BLOCK, "num_warps": 4}
    return Launch(lora_sum_partials_kernel, (n_blocks,), (*first, *second), options) if n_blocks else None


def tile_s_b(dy: torch.Tensor, s: torch.Tensor, lora_B: torch.Tensor) -> tiles.Tile:
    """Returns the tile of dS and db of a single layer."""
    return tiles.grad_s_b(dy, lora_B.shape[1], wide=is_wide(dy, s) or is_wide(dy, lora_B))


class GradSB:
    """Computes dS and db by one pass over dy, for one signature.

    Args:
        needs: whether dS and db are needed; a call returns None for one that is not.
        rounded: whether b is rounded to dy's dtype, which dS then has (as under autocast).
    """

    def __init__(
        self, dy: torch.Tensor, s: torch.Tensor, lora_B: torch.Tensor, needs: tuple[bool, bool], rounded: bool = False
    ):
        (n_tokens, d_out), r, tile = dy.shape, lora_B.shape[1], tile_s_b(dy, s, lora_B)
        n_chunks, n_splits, tokens_per_split = tiles.splits(n_tokens, d_out, r, tile)
        self.ds = Split((n_tokens, r), thin_dtype(dy, lora_B, rounded), n_chunks, dy.device, needs[0])
        self.db = Split((d_out, r), lora_B.dtype, n_splits, dy.device, needs[1])
        flags = {"R": r, "NEED_S": needs[0], "NEED_B": needs[1], "ROUNDED": rounded, "PRECISION": precision(dy)}
        self.launch = Launch(
            lora_grad_s_b_kernel, (n_chunks, n_splits),
            (n_tokens, d_out, dy.stride(0), lora_B.stride(0), tokens_per_split),
            {**flags, **tile.options()},
        )  # fmt: skip
        self.add = sum_launch(self.ds.sizes, self.db.sizes)

    def __call__(self, dy, s, lora_B, scaling: float, stream: int | None = None):
        # dy stands in for a result that is not needed: the kernel takes a pointer, but does not write to it.
        ds = ds_parts = self.ds.empty() if self.ds.needed else dy
        db = db_parts = self.db.empty() if self.db.needed else dy
        if self.ds.in_parts:
            ds_parts = self.ds.empty_parts()
        if self.db.in_parts:
            db_parts = self.db.empty_parts()
        self.launch.go(stream, (dy, s, lora_B, ds_parts, db_parts), (scaling,))
        if self.add is not None:
            self.add.go(stream, (ds_parts, ds, db_parts, db), ())
        return ds if self.ds.needed else None, db if self.db.needed else None


class GradA:
    """Computes da by one pass over x, for one signature."""

    def __init__(self, x: torch.Tensor, ds_dtype: torch.dtype, lora_A: torch.Tensor, dropout: bool):
        (n_tokens, d_in), r = x.shape, lora_A.shape[0]
        tile = tiles.grad_a(x, r, wide=x.dtype is not ds_dtype)
        n_chunks, n_splits, tokens_per_split = tiles.splits(n_tokens, d_in, r, tile)
        self.da = Split((r, d_in), lora_A.dtype, n_splits, x.device)
        self.launch = Launch(
            lora_grad_a_kernel, (n_chunks, n_splits),
            (n_tokens, d_in, x.stride(0), tokens_per_split),
            {"R": r, "DROPOUT": dropout, "PRECISION": precision(x), **tile.options(outer="BLOCK_IN")},
        )  # fmt: skip
        self.add = sum_launch(self.da.sizes)

    def __call__(self, x, ds, lora_A, keep: DropoutMask | None = None, stream: int | None = None):
        da = parts = self.da.empty()
        if self.add is not None:
            parts = self.da.empty_parts()
        self.launch.go(stream, (x, ds, parts), keep or NO_MASK)
        if self.add is not None:
            self.add.go(stream, (parts, da, parts, da), ())
        return da


def grad_s_b(
    dy: torch.Tensor, s: torch.Tensor, lora_B: torch.Tensor, scaling: float, need_s: bool = True, need_b: bool = True,
    rounded: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Returns dS = scaling · dy b (n_tokens, r) and db = scaling · dyᵀ S (d_out, r), each None if not needed. dS has
    the wider of dy's and lora_B's dtypes, or dy's if ``rounded``, which also rounds b to it; db has lora_B's dtype.
    Twin: ``reference.linear.grad_s_b``."""
    dy, lora_B = contiguous_rows(dy), contiguous_rows(lora_B)
    (n_tokens, d_out), r = dy.shape, lora_B.shape[1]
    if n_tokens == 0 or d_out == 0:
        ds = torch.empty((n_tokens, r), dtype=thin_dtype(dy, lora_B, rounded), device=dy.device)
        return (ds if need_s else None), (torch.zeros_like(lora_B) if need_b else None)
    with on_device(dy):
        return GradSB(dy, s, lora_B, (need_s, need_b), rounded)(dy, s, lora_B, float(scaling))


def grad_a(x: torch.Tensor, ds: torch.Tensor, lora_A: torch.Tensor, keep: DropoutMask | None = None) -> torch.Tensor:
    """Returns da = dSᵀ (keep∘x) (r, d_in) in lora_A's dtype. Twin: ``reference.linear.grad_a``."""
    x = contiguous_rows(x)
    if x.numel() == 0:
        return torch.zeros_like(lora_A)
    with on_device(x):
        return GradA(x, ds.dtype, lora_A, keep is not None)(x, ds, lora_A, keep)
