"""DoRA (Liu et al., arXiv 2402.09353, eq. 5): the row norms of the adapted weight, and the columns' scale.

Math      y = c∘u + bias with u = x (W + scaling b a)ᵀ and c[o] = magnitude[o] / ‖W[o, :] + scaling b[o, :] a‖₂.
          weight_norms computes the norms, column_scale y. Backward du = c∘dy and dc[o] = Σ_t dy[t, o] u[t, o].
Grid      norms: one program for a block of rows of W, which walks d_in and forms W + scaling b a block by block in
          registers, so that it is never in memory. a is read once a program, from L2.
          scale: one program for a tile of y. backward: (column chunks, token splits) as in grads.py: dc is summed over
          token splits by partial sums and a second small launch.
Shapes    W (d_out, d_in), any strides; a (r, d_in), b (d_out, r), any float; norms and c (d_out,) float32; u, dy
          (n_tokens, d_out) f16/bf16/f32, bias (d_out,) any float. Sums are float32. Beside a 16-bit W factors keep
          their precision: float32 ones go through the tensor cores as two bfloat16 halves.
Roofline  norms: W once, 2·d_out·d_in·r operations; the factors add r·(1/BLOCK_OUT + 1/d_in) elements for each of W.
          scale: u and y once. backward: dy, u and du once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, tiles
from ..launch import Launch, allocator, by_jit, contiguous_rows, precision
from ..primitives import dot, dot_rounded, round_to
from .gemm import load_factor
from .grads import Split, sum_launch
from .groups import planned
from .signature import flat

__all__ = ["column_scale", "column_scale_backward", "weight_norms"]

SCALE_TILE = tiles.Tile(32, 256, 0, 0, 8, 1)
BACKWARD_TILE = tiles.Tile(16, 256, 0, 0, 8, 3)


@triton.jit
def dot_factors(b_b, b_a, acc, weight_dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Returns acc + b_b @ b_a in the precision of the factors, by tensor cores beside a 16-bit weight."""
    if b_b.dtype == b_a.dtype and b_b.dtype != tl.float32:
        acc = dot(b_b, b_a, acc, PRECISION)
    elif weight_dtype == tl.float32:
        acc = dot_rounded(b_b, b_a, acc, tl.float32, PRECISION)
    else:
        acc = dot_rounded(b_b, b_a, acc, tl.float16, PRECISION)  # the form that rounds neither operand
    return acc


@triton.jit
def lora_weight_norms_kernel(
    weight, a, b, norms,
    scaling,
    d_out, d_in, stride_out, stride_in, stride_a, stride_b,
    R: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores the norms of a block of rows."""
    i_out = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = i_out < d_out
    p_weight = weight + i_out[:, None] * stride_out
    b_squares = tl.zeros([BLOCK_OUT], dtype=tl.float32)
    # Triton loads a block that is no operand of a product ahead only where the loop's stages are given here.
    for o_in in tl.range(0, d_in, BLOCK_IN, num_stages=STAGES):
        i_in = (o_in + tl.arange(0, BLOCK_IN)).to(tl.int64)
        m_in = i_in < d_in
        b_weight = tl.load(p_weight + i_in[None, :] * stride_in, mask=m_out[:, None] & m_in[None, :], other=0.0)
        b_sum = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
        for o_r in tl.range(0, R, BLOCK_R, num_stages=1):
            i_r = o_r + tl.arange(0, BLOCK_R)
            m_r = i_r < R
            p_b = b + i_out[:, None] * stride_b + i_r[None, :]
            b_b = tl.load(p_b, mask=m_out[:, None] & m_r[None, :], other=0.0)
            b_a = load_factor(a, i_r, i_in, m_r, m_in, stride_a, False)  # [BLOCK_R, BLOCK_IN]
            b_sum = dot_factors(b_b, b_a, b_sum, weight.dtype.element_ty, PRECISION)
        b_sum = b_sum * scaling + b_weight.to(tl.float32)
        b_squares += tl.sum(b_sum * b_sum, 1)
    tl.store(norms + i_out, tl.sqrt_rn(b_squares), mask=m_out)


@triton.jit(do_not_specialize=["n_tokens"])
def lora_column_scale_kernel(
    u, y, scale, bias,
    n_tokens, d_out, stride_u,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Stores one tile of y = scale∘u + bias."""
    n_tiles_out = tl.cdiv(d_out, BLOCK_OUT)
    i_t = (tl.program_id(0) // n_tiles_out).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_out = tl.program_id(0) % n_tiles_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = i_out < d_out
    mask = (i_t < n_tokens)[:, None] & m_out[None, :]
    b_u = tl.load(u + i_t[:, None] * stride_u + i_out[None, :], mask=mask, other=0.0).to(tl.float32)
    b_y = b_u * tl.load(scale + i_out, mask=m_out, other=0.0)[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + i_out, mask=m_out, other=0.0).to(tl.float32)[None, :]
    tl.store(y + i_t[:, None] * d_out + i_out[None, :], round_to(b_y, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "tokens_per_split"])
def lora_column_scale_backward_kernel(
    dy, u, scale, du, dscale,
    n_tokens, d_out, stride_dy, stride_u, tokens_per_split,
    NEED_U: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Stores du = scale∘dy of a column chunk and a token range, and the range's partial sum dscale (split, d_out)."""
    i_out = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(1).to(tl.int64) * tokens_per_split
    m_out = i_out < d_out
    b_scale = tl.load(scale + i_out, mask=m_out, other=0.0)
    b_dscale = tl.zeros([BLOCK_OUT], dtype=tl.float32)
    # Triton loads ahead in a loop without a product only where its stages are given here.
    for o_t in tl.range(0, tokens_per_split, BLOCK_T, num_stages=3):
        i_t = first + o_t + tl.arange(0, BLOCK_T)
        mask = (i_t < n_tokens)[:, None] & m_out[None, :]
        b_dy = tl.load(dy + i_t[:, None] * stride_dy + i_out[None, :], mask=mask, other=0.0).to(tl.float32)
        b_u = tl.load(u + i_t[:, None] * stride_u + i_out[None, :], mask=mask, other=0.0).to(tl.float32)
        b_dscale += tl.sum(b_dy * b_u, 0)
        if NEED_U:
            b_du = round_to(b_dy * b_scale[None, :], du.dtype.element_ty)
            tl.store(du + i_t[:, None] * d_out + i_out[None, :], b_du, mask=mask)
    tl.store(dscale + tl.program_id(1).to(tl.int64) * d_out + i_out, b_dscale, mask=m_out)


class NormsPlan:
    """Computes the norms for one signature."""

    def __init__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor):
        a, b = contiguous_rows(lora_A), contiguous_rows(lora_B)
        self.needs_layout = a is not lora_A or b is not lora_B
        (d_out, d_in), r = weight.shape, len(a)
        wide = weight.element_size() < max(a.element_size(), b.element_size())
        tile = tiles.weight_norms(weight, r, wide)
        self.empty = allocator((d_out,), torch.float32, weight.device)
        self.launch = Launch(
            lora_weight_norms_kernel, (triton.cdiv(d_out, tile.outer),),
            (d_out, d_in, *weight.stride(), a.stride(0), b.stride(0)),
            {"R": r, "PRECISION": precision(weight), "STAGES": tile.stages, **tile.options()},
        )  # fmt: skip

    def __call__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, stream: int | None) -> Tensor:
        if self.needs_layout:
            lora_A, lora_B = contiguous_rows(lora_A), contiguous_rows(lora_B)
        norms = self.empty()
        self.launch.go(stream, (weight, lora_A, lora_B, norms), (scaling,))
        return norms


class ScalePlan:
    """Computes y = scale∘u + bias for one signature."""

    def __init__(self, u: Tensor, bias: Tensor | None):
        rows, tile = flat(u), SCALE_TILE
        self.needs_layout = rows.data_ptr() != u.data_ptr()
        n_tokens, d_out = rows.shape
        self.empty = allocator(tuple(u.shape), u.dtype, u.device)
        self.launch = Launch(
            lora_column_scale_kernel, (triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_out, tile.outer),),
            (n_tokens, d_out, rows.stride(0)), {"HAS_BIAS": bias is not None, **tile.options()},
        )  # fmt: skip

    def __call__(self, u: Tensor, scale: Tensor, bias: Tensor | None, stream: int | None) -> Tensor:
        y = self.empty()
        self.launch.go(stream, (flat(u) if self.needs_layout else u, y, scale, scale if bias is None else bias), ())
        return y


class ScaleBackwardPlan:
    """Computes du and dscale for one signature."""

    def __init__(self, dy: Tensor, u: Tensor, need_u: bool):
        (dy_rows, u_rows), tile = (flat(dy), flat(u)), BACKWARD_TILE
        self.needs_layout = dy_rows.data_ptr() != dy.data_ptr() or u_rows.data_ptr() != u.data_ptr()
        (n_tokens, d_out), self.need_u = u_rows.shape, need_u
        n_chunks, n_splits, tokens_per_split = tiles.splits(n_tokens, d_out, 1, tile)
        self.empty = allocator(tuple(u.shape), u.dtype, u.device)
        self.dscale = Split((d_out,), torch.float32, n_splits, u.device)
        self.launch = Launch(
            lora_column_scale_backward_kernel, (n_chunks, n_splits),
            (n_tokens, d_out, dy_rows.stride(0), u_rows.stride(0), tokens_per_split),
            {"NEED_U": need_u, **tile.options()},
        )  # fmt: skip
        self.add = sum_launch(self.dscale.sizes)

    def __call__(self, dy: Tensor, u: Tensor, scale: Tensor, stream: int | None) -> tuple[Tensor | None, Tensor]:
        if self.needs_layout:
            dy, u = flat(dy), flat(u)
        du, dscale = self.empty() if self.need_u else None, self.dscale.empty()
        parts = dscale if self.add is None else self.dscale.empty_parts()
        self.launch.go(stream, (dy, u, scale, u if du is None else du, parts), ())  # u stands in for no du
        if self.add is not None:
            self.add.go(stream, (parts, dscale, parts, dscale), ())
        return du, dscale


def weight_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Returns the norms (d_out,), float32, of the rows of W + scaling · b a, for weight (d_out, d_in) with any strides,
    lora_A (r, d_in) and lora_B (d_out, r). Twin: ``reference.dora.weight_norms``."""
    if weight.numel() == 0:
        return torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    if not device.is_current(weight):
        with torch.cuda.device(weight.device):
            return weight_norms(weight, lora_A, lora_B, scaling)
    if by_jit():
        return NormsPlan(weight, lora_A, lora_B)(weight, lora_A, lora_B, float(scaling), None)
    key = [weight.shape, weight.dtype, device.index(weight), len(lora_A), lora_A.dtype, lora_B.dtype]
    plan = planned(NormsPlan, key, (weight, lora_A, lora_B), weight, weight, lora_A, lora_B)
    return plan(weight, lora_A, lora_B, float(scaling), device.stream(weight))


def column_scale(u: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Returns y = scale∘u + bias (..., d_out) in u's dtype, for u (..., d_out), scale (d_out,) in float32 and bias
    (d_out,) or None, both contiguous. Twin: ``reference.dora.column_scale``."""
    if u.numel() == 0:
        return torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if not device.is_current(u):
        with torch.cuda.device(u.device):
            return column_scale(u, scale, bias)
    if by_jit():
        return ScalePlan(u, bias)(u, scale, bias, None)
    key = [u.shape, u.dtype, device.index(u), None if bias is None else bias.dtype]
    plan = planned(ScalePlan, key, (u, scale) if bias is None else (u, scale, bias), u, u, bias)
    return plan(u, scale, bias, device.stream(u))


def column_scale_backward(
    dy: Tensor, u: Tensor, scale: Tensor, need_u: bool = True, need_scale: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Returns du = scale∘dy (..., d_out) in dy's dtype, which u has, too, and dscale = Σ dy∘u over the tokens (d_out,)
    in float32, each None if not needed. Twin: ``reference.dora.column_scale_backward``."""
    if not need_scale:
        return column_scale(dy, scale, None) if need_u else None, None
    if u.numel() == 0:
        du = torch.empty(u.shape, dtype=u.dtype, device=u.device) if need_u else None
        return du, torch.zeros(u.shape[-1], dtype=torch.float32, device=u.device)
    if not device.is_current(u):
        with torch.cuda.device(u.device):
            return column_scale_backward(dy, u, scale, need_u, need_scale)
    if by_jit():
        return ScaleBackwardPlan(dy, u, need_u)(dy, u, scale, None)
    key = [u.shape, u.dtype, device.index(u), dy.dtype, need_u]
    plan = planned(ScaleBackwardPlan, key, (dy, u, scale), u, dy, u, need_u)
    return plan(dy, u, scale, device.stream(u))
