"""The thin products of the rows of all experts, each in one launch: S and dS, and the updates of y and dx.

Math      project       S[t, :] = Σ_i x[t, i] a_e[:, i], for each row t of expert e
          grad_s        dS[t, :] = scaling Σ_o dy[t, o] b_e[o, :]
          add_product   rows[t, :] += scaling thin[t, :] factor_e: S and b_eᵀ for y, dS and a_e for dx
          Rows of no expert have S = dS = 0, and add_product sets them to 0: torch's grouped product, which makes the
          rows, leaves them undefined.
Grid      (programs of segments.py, blocks of ranks) for S and dS, (programs, blocks of columns) for add_product. A
          program of S or dS walks all columns for one tile of rows, as in linear/project.py. Columns are not split for
          few rows: S would have partial sums, and rows of different experts give programs enough.
Shapes    x (n, d_in), dy (n, d_out), rows (n, d) f16/bf16/f32 with contiguous rows; a (E, r, d_in), b (E, d_out, r) any
          float; S and dS (n, r) in the wider of both dtypes, float32 at most. Sums are float32, with one rounding at
          the store. The kernels take a factor with either of its last two dimensions contiguous; of one with neither,
          such as PEFT's lora_B, whose experts are interleaved, a contiguous copy is made, because every element would
          else load a sector of 32 bytes.
Roofline  n·d elements read (add_product: read and written) and the factors of the experts that have rows, against
          2·n·d·r operations: memory bound.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..launch import contiguous_rows, is_wide, launch, on_device, precision, thin_dtype
from ..primitives import dot_rounded, dot_wide, round_to
from ..segments import programs, tile_of


@triton.jit(do_not_specialize=["n_rows", "n_experts"])
def lora_expert_project_kernel(
    tall, factor, thin, offsets,
    scaling,
    n_rows, n_experts, d, stride_tall, stride_r, stride_d,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Stores thin = scaling · tall factor_eᵀ, for a factor of (n_experts, r, d) in any order."""
    i_expert, o_t, end = tile_of(offsets, tl.program_id(0), n_rows, n_experts, BLOCK_T, BLOCK_E)
    i_t = o_t + tl.arange(0, BLOCK_T)
    i_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_t, m_r = i_t < end, i_r < R
    p_tall = tall + i_t[:, None] * stride_tall
    p_factor = factor + i_expert * R * d + i_r[None, :] * stride_r
    b_thin = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    # Rows of no expert have no factor, and their sums stay zero.
    for o in range(0, tl.where((i_expert < n_experts) & (o_t < end), d, 0), BLOCK_IN):
        i = o + tl.arange(0, BLOCK_IN)
        m = i < d
        b_tall = tl.load(p_tall + i[None, :], mask=m_t[:, None] & m[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
        b_factor = tl.load(p_factor + i[:, None] * stride_d, mask=m[:, None] & m_r[None, :], other=0.0)
        b_thin = dot_wide(b_tall, b_factor, b_thin, PRECISION)
    p_thin = thin + i_t[:, None] * R + i_r[None, :]
    tl.store(p_thin, round_to(b_thin * scaling, thin.dtype.element_ty), mask=m_t[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["n_rows", "n_experts"])
def lora_expert_update_kernel(
    rows, thin, factor, offsets,
    scaling,
    n_rows, n_experts, d, stride_rows, stride_r, stride_d,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Adds scaling · thin factor_e to rows in place, for a factor of (n_experts, r, d) in any order, and sets the rows
    of no expert to 0."""
    dtype: tl.constexpr = rows.dtype.element_ty
    i_expert, o_t, end = tile_of(offsets, tl.program_id(0), n_rows, n_experts, BLOCK_T, BLOCK_E)
    if o_t < end:
        is_routed = i_expert < n_experts
        i_t = o_t + tl.arange(0, BLOCK_T)
        i_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        m_t, m_out = i_t < end, i_out < d
        p_factor = factor + i_expert * R * d + i_out[None, :] * stride_d
        b_acc = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)
        for o_r in tl.range(0, tl.where(is_routed, R, 0), BLOCK_R, num_stages=1):
            i_r = o_r + tl.arange(0, BLOCK_R)
            m_r = i_r < R
            b_thin = tl.load(thin + i_t[:, None] * R + i_r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0)
            b_factor = tl.load(p_factor + i_r[:, None] * stride_r, mask=m_r[:, None] & m_out[None, :], other=0.0)
            b_acc = dot_rounded(b_thin, b_factor, b_acc, dtype, PRECISION)
        p_rows = rows + i_t[:, None] * stride_rows + i_out[None, :]
        m_rows = m_t[:, None] & m_out[None, :]
        b_acc = b_acc * scaling + tl.load(p_rows, mask=m_rows & is_routed, other=0.0).to(tl.float32)
        tl.store(p_rows, round_to(b_acc, dtype), mask=m_rows)


def project(x: torch.Tensor, lora_A: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Returns S (n, r) for x (n, d_in), lora_A (E, r, d_in) and offsets (E,), in the wider of the factors' dtype and
    x's. Twin: ``reference.experts.project``."""
    return _project(x, lora_A, 1.0, offsets)


def grad_s(dy: torch.Tensor, lora_B: torch.Tensor, scaling: float, offsets: torch.Tensor) -> torch.Tensor:
    """Returns dS (n, r) = scaling · dy b_e for dy (n, d_out), lora_B (E, d_out, r) and offsets (E,), in the wider of
    both dtypes. Twin: ``reference.experts.grad_s``."""
    return _project(dy, lora_B.mT, scaling, offsets)


def _project(tall: torch.Tensor, factor: torch.Tensor, scaling: float, offsets: torch.Tensor) -> torch.Tensor:
    """Returns scaling · tall factor_eᵀ for a factor (E, r, d)."""
    tall, factor = contiguous_rows(tall), _laid_out(factor)
    (n_rows, d), (n_experts, r, _) = tall.shape, factor.shape
    thin = torch.empty((n_rows, r), dtype=thin_dtype(tall, factor, False), device=tall.device)
    if n_rows == 0 or d == 0:
        return thin.zero_()
    tile = tiles.expert_project(tall, r, is_wide(tall, factor))
    grid = programs(n_rows, n_experts + 1, tile.t), triton.cdiv(r, tile.r)
    with on_device(tall):
        launch(
            lora_expert_project_kernel, grid, (tall, factor, thin, offsets), (float(scaling),),
            (n_rows, n_experts, d, tall.stride(0), *factor.stride()[1:]),
            {"R": r, "PRECISION": precision(tall), "BLOCK_E": tiles.rank_block(n_experts), **tile.options()},
        )  # fmt: skip
    return thin


def add_product(
    rows: torch.Tensor, thin: torch.Tensor, factor: torch.Tensor, scaling: float, offsets: torch.Tensor
) -> torch.Tensor:
    """Adds scaling · thin factor_e to rows (n, d), whose rows are contiguous, in place and returns them, for thin
    (n, r), factor (E, r, d) and offsets (E,). Rows of no expert become 0. Twin: ``reference.experts.add_product``."""
    assert rows.stride(1) == 1 or rows.shape[1] == 1, f"rows: expected contiguous rows, got strides {rows.stride()}"
    thin, factor = thin.contiguous(), _laid_out(factor)
    (n_rows, d), (n_experts, r, _) = rows.shape, factor.shape
    if rows.numel() == 0:
        return rows
    tile = tiles.update(rows, r, n_rows <= tiles.FEW)
    grid = programs(n_rows, n_experts + 1, tile.t), triton.cdiv(d, tile.outer)
    with on_device(rows):
        launch(
            lora_expert_update_kernel, grid, (rows, thin, factor, offsets), (float(scaling),),
            (n_rows, n_experts, d, rows.stride(0), *factor.stride()[1:]),
            {"R": r, "PRECISION": precision(rows), "BLOCK_E": tiles.rank_block(n_experts), **tile.options()},
        )  # fmt: skip
    return rows


def _laid_out(factor: torch.Tensor) -> torch.Tensor:
    """Returns the factor, or a contiguous copy if neither of its last two dimensions is contiguous."""
    return factor if factor.is_contiguous() or factor.mT.is_contiguous() else factor.contiguous()
