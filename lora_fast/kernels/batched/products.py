"""S of the rows of all adapters of a batch, and the update of y: each is one launch.

Math      project       S[t, :] = Σ_i x[rows[t], i] a_k[:, i], for each sorted row t of adapter k
          add_product   y[rows[t], :] += scaling_k Σ_j S[t, j] b_k[:, j]
Grid      (programs of segments.py, blocks of ranks) for S, (programs, blocks of columns) for the update. A program
          walks all of d_in for S, or its adapter's ranks for the update.
Shapes    x (n, d_in), y (n, d_out) f16/bf16/f32 with contiguous rows; the table's factors any of these; S (n_rows, R)
          in the wider of both dtypes, for the largest rank R, 0 in the columns beyond an adapter's own rank. Rows of no
          adapter are not written. Sums are float32, with one rounding at the store.
Roofline  n·d_in elements read, n·d_out read and written, and the factors of the adapters that have rows: memory bound.
          For a few rows of many adapters the factors are nearly all of it.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..launch import contiguous_rows, is_wide, launch, on_device, precision, report_addresses, thin_dtype
from ..pointer_table import TL_DTYPE, pointer_at
from ..primitives import dot_rounded, dot_wide, round_to
from ..records import AdapterTable
from ..segments import programs, tile_of

A, B, RANK, SCALING = (tl.constexpr(column) for column in range(4))
COLUMNS = tl.constexpr(4)
WHOLE = tl.constexpr(8)  # a row of an aligned b has whole loads of 16 bytes if its rank is a multiple of it


@triton.jit(do_not_specialize=["n_rows", "n_adapters"])
def lora_batched_project_kernel(
    x, table, rows, ends, s,
    n_rows, n_adapters, d_in, stride_x,
    R: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Stores S of a tile of one adapter's rows."""
    i_adapter, o_t, end = tile_of(ends, tl.program_id(0), n_rows, n_adapters, BLOCK_T, BLOCK_E)
    if (i_adapter < n_adapters) & (o_t < end):
        p_entry = table + i_adapter * COLUMNS
        r, a = tl.load(p_entry + RANK).to(tl.int32), pointer_at(p_entry + A, FACTOR, ALIGNED)
        i_t = o_t + tl.arange(0, BLOCK_T)
        i_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_t, m_r = i_t < end, i_r < r
        i_row = tl.load(rows + i_t, mask=m_t, other=0).to(tl.int64)
        p_x = x + i_row[:, None] * stride_x
        p_a = a + i_r[None, :].to(tl.int64) * d_in
        b_s = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        for o_in in range(0, d_in, BLOCK_IN):
            i_in = o_in + tl.arange(0, BLOCK_IN)
            m_in = i_in < d_in
            b_x = tl.load(p_x + i_in[None, :], mask=m_t[:, None] & m_in[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
            b_a = tl.load(p_a + i_in[:, None], mask=m_in[:, None] & m_r[None, :], other=0.0)
            b_s = dot_wide(b_x, b_a, b_s, PRECISION)
        b_s = tl.where(m_r[None, :], b_s, 0.0)  # a NaN of x does not reach the columns beyond the rank
        p_s = s + i_t[:, None] * R + i_r[None, :]
        tl.store(p_s, round_to(b_s, s.dtype.element_ty), mask=m_t[:, None] & (i_r < R)[None, :])


@triton.jit
def walk_ranks(
    p_s, b,
    r, i_out, m_t, m_out,
    R: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Returns S bᵀ of rows of S and columns of y, for b (d_out, r) and a result of DTYPE."""
    p_b = b + i_out[None, :].to(tl.int64) * r
    b_acc = tl.zeros([p_s.shape[0], i_out.shape[0]], dtype=tl.float32)
    for o_r in tl.range(0, tl.minimum(r, R), BLOCK_R, num_stages=1):
        i_r = o_r + tl.arange(0, BLOCK_R)
        b_s = tl.load(p_s + i_r[None, :], mask=m_t[:, None] & (i_r < R)[None, :], other=0.0)
        b_b = tl.load(p_b + i_r[:, None], mask=(i_r < r)[:, None] & m_out[None, :], other=0.0)
        b_acc = dot_rounded(b_s, b_b, b_acc, DTYPE, PRECISION)
    return b_acc


@triton.jit(do_not_specialize=["n_rows", "n_adapters"])
def lora_batched_update_kernel(
    y, s, table, rows, ends,
    n_rows, n_adapters, d_out, stride_y,
    R: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Adds scaling · S bᵀ to a tile of one adapter's rows of y in place."""
    dtype: tl.constexpr = y.dtype.element_ty
    i_adapter, o_t, end = tile_of(ends, tl.program_id(0), n_rows, n_adapters, BLOCK_T, BLOCK_E)
    if (i_adapter < n_adapters) & (o_t < end):
        p_entry = table + i_adapter * COLUMNS
        r, b = tl.load(p_entry + RANK).to(tl.int32), pointer_at(p_entry + B, FACTOR, ALIGNED)
        scaling = tl.load(p_entry + SCALING).to(tl.int32).to(tl.float32, bitcast=True)
        i_t = o_t + tl.arange(0, BLOCK_T)
        i_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        m_t, m_out = i_t < end, i_out < d_out
        i_row = tl.load(rows + i_t, mask=m_t, other=0).to(tl.int64)
        p_s = s + i_t[:, None] * R
        if ALIGNED and r % WHOLE == 0:
            # The compiler forgets tl.multiple_of on a loaded value, and loads elements unless it knows the divisor.
            b_acc = walk_ranks(p_s, b, r // WHOLE * WHOLE, i_out, m_t, m_out, R, dtype, PRECISION, BLOCK_R)
        else:
            b_acc = walk_ranks(p_s, b, r, i_out, m_t, m_out, R, dtype, PRECISION, BLOCK_R)
        p_y = y + i_row[:, None] * stride_y + i_out[None, :]
        m_y = m_t[:, None] & m_out[None, :]
        b_acc = b_acc * scaling + tl.load(p_y, mask=m_y, other=0.0).to(tl.float32)
        tl.store(p_y, round_to(b_acc, dtype), mask=m_y)


def project(x: torch.Tensor, table: AdapterTable, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Returns S (n_rows, R) of x (n, d_in) for the largest rank R, in the wider of x's dtype and the factors'. Rows of
    no adapter are undefined. Twin: ``reference.batched.project``."""
    x, factor = contiguous_rows(x), table.lora_A[0]
    n_rows, n_adapters, r = rows.shape[0], ends.shape[0], table.r
    s = torch.empty((n_rows, r), dtype=thin_dtype(x, factor, False), device=x.device)
    if n_rows:
        tile = tiles.batched_project(x, r, is_wide(x, factor), table.aligned)
        grid = programs(n_rows, n_adapters, tile.t), triton.cdiv(r, tile.r)
        sizes = n_rows, n_adapters, x.shape[1], x.stride(0)
        with on_device(x):
            _launch(lora_batched_project_kernel, grid, (x, table.entries, rows, ends, s), sizes, table, tile)
    return s


def add_product(
    y: torch.Tensor, s: torch.Tensor, table: AdapterTable, rows: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Adds scaling · S bᵀ to the adapters' rows of y (n, d_out), whose rows are contiguous, in place and returns y, for
    S (n_rows, R). Twin: ``reference.batched.add_product``."""
    assert y.stride(1) == 1 or y.shape[1] == 1, f"y: expected contiguous rows, got strides {y.stride()}"
    n_rows, n_adapters, d_out = rows.shape[0], ends.shape[0], y.shape[1]
    if n_rows and d_out:
        tile = tiles.batched_update(y, table.r, n_rows <= tiles.FEW, table.aligned)
        grid = programs(n_rows, n_adapters, tile.t), triton.cdiv(d_out, tile.outer)
        sizes = n_rows, n_adapters, d_out, y.stride(0)
        with on_device(y):
            _launch(lora_batched_update_kernel, grid, (y, s, table.entries, rows, ends), sizes, table, tile)
    return y


def _launch(
    kernel, grid: tuple[int, int], tensors: tuple, sizes: tuple[int, ...], table: AdapterTable, tile: tiles.Tile
) -> None:
    report_addresses(table.entries, (*table.lora_A, *table.lora_B))
    flags = {"R": table.r, "FACTOR": TL_DTYPE[table.lora_A[0].dtype], "ALIGNED": table.aligned}
    blocks = {"PRECISION": precision(tensors[0]), "BLOCK_E": tiles.rank_block(len(table.scaling)), **tile.options()}
    launch(kernel, grid, tensors, (), sizes, flags | blocks)
