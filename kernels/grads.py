"""Gradients of the adapter: dS and db in one pass over dy, da in one pass over x.

Math      y = x Wᵀ + scaling S bᵀ with S = (keep∘x) aᵀ gives, with dS the gradient of S,
              dS = scaling dy b        db = scaling dyᵀ S        da = dSᵀ (keep∘x)
          Both dS and db need all of dy, along different dimensions: one program owns a column chunk and a token range,
          so that one read of dy serves both.
Grid      (column chunks, token splits). dS is summed over column chunks and db (da) over token splits: programs write
          float32 partial sums, a second small launch adds them in a fixed order and rounds once. No atomics: the same
          inputs give the same bits.
Shapes    dy (n_tokens, d_out), x (n_tokens, d_in), S and dS (n_tokens, r) in dy's dtype; db (d_out, r) and da (r, d_in)
          in the adapter's dtype.
Roofline  dy and x once each, plus partials: n_tokens·r·4·2 bytes per column chunk, d·r·4·2 per token split.
"""

import torch
import triton
import triton.language as tl

from . import tiles
from .launch import Keep, on_device, precision, rows
from .primitives import cast, dot, drop, keep_mask, round_to, settled


@triton.jit
def lora_grad_s_b_kernel(
    dy,
    s,
    b,
    ds,
    db,
    n_tokens,
    d_out,
    stride_dy,
    stride_b,
    tokens_per_split,
    scaling,
    R: tl.constexpr,
    NEED_S: tl.constexpr,
    NEED_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial ds (chunk, n_tokens, r) and db (split, d_out, r), in the dtypes of their buffers."""
    dtype: tl.constexpr = dy.dtype.element_ty
    i_chunk, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_out = i_chunk * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i_r = tl.arange(0, BLOCK_R)
    m_out = i_out < d_out
    m_r = i_r < R
    m_b = m_out[:, None] & m_r[None, :]
    b_db = tl.zeros([BLOCK_OUT, BLOCK_R], dtype=tl.float32)
    if NEED_S:
        b_b = cast(tl.load(b + i_out[:, None] * stride_b + i_r[None, :], mask=m_b, other=0.0), dtype)
    for o_t in range(0, tokens_per_split, BLOCK_T):
        i_t = i_split * tokens_per_split + o_t + tl.arange(0, BLOCK_T)
        m_t = i_t < n_tokens
        m_s = m_t[:, None] & m_r[None, :]
        p_dy = dy + i_t[:, None] * stride_dy + i_out[None, :]
        b_dy = tl.load(p_dy, mask=m_t[:, None] & m_out[None, :], other=0.0)  # [BLOCK_T, BLOCK_OUT]
        if NEED_S:
            b_ds = dot(b_dy, b_b, tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32), PRECISION)
            p_ds = ds + (i_chunk * n_tokens + i_t[:, None]) * R + i_r[None, :]
            tl.store(p_ds, round_to(b_ds * scaling, ds.dtype.element_ty), mask=m_s)
        if NEED_B:
            b_s = tl.load(s + i_t[:, None] * R + i_r[None, :], mask=m_s, other=0.0)  # [BLOCK_T, BLOCK_R]
            b_db = dot(tl.trans(b_dy), b_s, b_db, PRECISION)
    if NEED_B:
        p_db = db + (i_split * d_out + i_out[:, None]) * R + i_r[None, :]
        tl.store(p_db, round_to(b_db * scaling, db.dtype.element_ty), mask=m_b)


@triton.jit(do_not_specialize=["seed", "drop_level"])
def lora_grad_a_kernel(
    x,
    ds,
    da,
    n_tokens,
    d_in,
    stride_x,
    tokens_per_split,
    seed,
    drop_level,
    R: tl.constexpr,
    DROPOUT: tl.constexpr,
    SEED_IN_MEMORY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial da (split, r, d_in), in the dtype of its buffer."""
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
            b_x = drop(b_x, keep_mask(seed, i_t, o_in, drop_level, SEED_IN_MEMORY, BLOCK_IN))
            if b_x.dtype == tl.float32:
                b_x = settled(b_x)
        b_da = dot(tl.trans(b_x), b_ds, b_da, PRECISION)
    p_da = da + (i_split * R + i_r[None, :]) * d_in + i_in[:, None]
    tl.store(p_da, round_to(b_da, da.dtype.element_ty), mask=m_in[:, None] & m_r[None, :])


@triton.jit
def lora_sum_partials_kernel(
    partial0,
    total0,
    numel0,
    n_partials0,
    partial1,
    total1,
    numel1,
    n_partials1,
    BLOCK: tl.constexpr,
):
    """total[i] = Σ_k partial[k, i], k ascending, for two buffers in one launch."""
    i_block = tl.program_id(0)
    n_blocks0 = tl.cdiv(numel0, BLOCK)
    if i_block < n_blocks0:
        sum_block(partial0, total0, numel0, n_partials0, i_block, BLOCK)
    else:
        sum_block(partial1, total1, numel1, n_partials1, i_block - n_blocks0, BLOCK)


@triton.jit
def sum_block(partial, total, numel, n_partials, i_block, BLOCK: tl.constexpr):
    i = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = i < numel
    b_total = tl.zeros([BLOCK], dtype=tl.float32)
    p_partial = partial + i
    for _ in range(0, n_partials):
        b_total += tl.load(p_partial, mask=m_i, other=0.0)
        p_partial += numel
    tl.store(total + i, round_to(b_total, total.dtype.element_ty), mask=m_i)


def grad_s_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    need_s: bool = True,
    need_b: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dS = scaling · dy b (n_tokens, r) in dy's dtype and db = scaling · dyᵀ S (d_out, r) in lora_B's, each
    None where not needed.
    Twin: ``reference.grad_s_b``."""
    dy, lora_B = rows(dy), rows(lora_B)
    (n_tokens, d_out), r = dy.shape, lora_B.shape[1]
    ds = torch.empty((n_tokens, r), dtype=dy.dtype, device=dy.device) if need_s else None
    db = torch.empty((d_out, r), dtype=lora_B.dtype, device=dy.device) if need_b else None
    if n_tokens == 0 or d_out == 0:
        return ds, db if db is None else db.zero_()
    tile = tiles.grad_s_b(dy, r)
    n_chunks, n_splits, tokens_per_split = _splits(n_tokens, d_out, tile.t, tile.outer)
    ds_parts, db_parts = _partials(ds, n_chunks), _partials(db, n_splits)
    with on_device(dy):
        lora_grad_s_b_kernel[(n_chunks, n_splits)](
            dy,
            s,
            lora_B,
            ds_parts,
            db_parts,
            n_tokens,
            d_out,
            dy.stride(0),
            lora_B.stride(0),
            tokens_per_split,
            scaling,
            R=r,
            NEED_S=need_s,
            NEED_B=need_b,
            PRECISION=precision(dy),
            BLOCK_T=tile.t,
            BLOCK_OUT=tile.outer,
            BLOCK_R=tile.r,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _sum_partials([(ds_parts, ds), (db_parts, db)])
    return ds, db


def grad_a(x: torch.Tensor, ds: torch.Tensor, lora_A: torch.Tensor, keep: Keep | None = None) -> torch.Tensor:
    """da = dSᵀ (keep∘x) (r, d_in) in lora_A's dtype. Twin: ``reference.grad_a``."""
    x = rows(x)
    (n_tokens, d_in), r = x.shape, lora_A.shape[0]
    da = torch.empty((r, d_in), dtype=lora_A.dtype, device=x.device)
    if n_tokens == 0 or d_in == 0:
        return da.zero_()
    tile = tiles.grad_a(x, r)
    n_chunks, n_splits, tokens_per_split = _splits(n_tokens, d_in, tile.t, tile.outer)
    da_parts = _partials(da, n_splits)
    with on_device(x):
        lora_grad_a_kernel[(n_chunks, n_splits)](
            x,
            ds,
            da_parts,
            n_tokens,
            d_in,
            x.stride(0),
            tokens_per_split,
            *Keep.arguments(keep),
            R=r,
            DROPOUT=keep is not None,
            SEED_IN_MEMORY=Keep.in_memory(keep),
            PRECISION=precision(x),
            BLOCK_T=tile.t,
            BLOCK_IN=tile.outer,
            BLOCK_R=tile.r,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _sum_partials([(da_parts, da)])
    return da


def _splits(n_tokens: int, columns: int, block_t: int, block_columns: int) -> tuple[int, int, int]:
    """Column chunks, token splits and tokens per split: about one wave of programs, whatever the device (the split
    decides the order of summation, so it must not depend on how many multiprocessors there are)."""
    n_chunks = triton.cdiv(columns, block_columns)
    wanted = max(1, tiles.PROGRAMS // n_chunks)
    tokens_per_split = triton.cdiv(triton.cdiv(n_tokens, wanted), block_t) * block_t
    return n_chunks, triton.cdiv(n_tokens, tokens_per_split), tokens_per_split


def _partials(total: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Where the partial sums go: a float32 buffer, or the result itself where there is one partial."""
    if total is None or count == 1:
        return total
    return torch.empty((count, *total.shape), dtype=torch.float32, device=total.device)


def _sum_partials(pairs: list[tuple[torch.Tensor | None, torch.Tensor | None]]) -> None:
    pairs = [(parts, total) for parts, total in pairs if parts is not total]
    if not pairs:
        return
    first, second = pairs[0], pairs[1] if len(pairs) > 1 else (pairs[0][0], pairs[0][1][:0])
    block = tiles.SUM_BLOCK
    grid = sum(triton.cdiv(total.numel(), block) for _, total in pairs)
    arguments = [(parts, total, total.numel(), parts.shape[0]) for parts, total in (first, second)]
    lora_sum_partials_kernel[(grid,)](*arguments[0], *arguments[1], BLOCK=block, num_warps=4)
