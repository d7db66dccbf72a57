"""DoRA (Liu et al., arXiv 2402.09353, eq. 5): the row norms of the adapted weight, and the columns' scale.

Math      y = c∘u + bias with u = x (W + scaling b a)ᵀ, c = magnitude / norms and norms[o] = ‖W[o, :] + scaling b[o, :]
          a‖₂. weight_norms computes the norms, column_scale y. Backward du = c∘dy and, since no gradient flows through
          the norms, dmagnitude[o] = Σ_t dy[t, o] u[t, o] / norms[o].
Grid      norms: one program for a block of rows of W, which walks d_in and forms W + scaling b a block by block in
          registers, so that it is never in memory. a is read once a program, from L2.
          scale: one program for a tile of y. backward: (column chunks, token splits) as in grads.py; where there are
          several splits, a second small launch adds their partial sums of dmagnitude.
Shapes    W (d_out, d_in), any strides; a (r, d_in), b (d_out, r), any float; norms (d_out,) in a's dtype; u, dy
          (n_tokens, d_out) f16/bf16/f32, magnitude and bias (d_out,) any float. Sums, c and the squares are float32.
          Beside a 16-bit W factors keep their precision: float32 ones go through the tensor cores as bfloat16 halves.
Roofline  norms: W once, 2·d_out·d_in·r operations; the factors add r·(1/BLOCK_OUT + 1/d_in) elements for each of W.
          scale: u and y once. backward: dy, u and du once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, tiles
from ..launch import Launch, allocator, by_jit, contiguous_rows, is_wide, precision
from ..linear.gemm import load_factor
from ..linear.grads import Split, sum_launch
from ..linear.groups import planned
from ..linear.signature import flat, share_memory
from ..primitives import dot, dot_rounded, round_to

SCALE_TILE = tiles.Tile(32, 256, 0, 0, 8, 1)
# Narrow chunks of columns: 4,096 columns and more need no token splits, and so no second launch.
BACKWARD_TILE = tiles.Tile(64, 64, 0, 0, 8, 3)


@triton.jit
def dot_factors(b_b, b_a, acc, weight_dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Returns acc + b_b @ b_a in the precision of the factors, by tensor cores beside a 16-bit weight."""
    if b_b.dtype == b_a.dtype and b_b.dtype.primitive_bitwidth == 16:
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
    tl.store(norms + i_out, round_to(tl.sqrt_rn(b_squares), norms.dtype.element_ty), mask=m_out)


@triton.jit
def load_scale(magnitude, norms, i_out, m_out):
    """Loads columns i_out of the scale and of the norms, in float32."""
    b_norms = tl.load(norms + i_out, mask=m_out, other=1.0).to(tl.float32)
    return tl.div_rn(tl.load(magnitude + i_out, mask=m_out, other=0.0).to(tl.float32), b_norms), b_norms


@triton.jit(do_not_specialize=["n_tokens"])
def lora_column_scale_kernel(
    u, y, magnitude, norms, bias,
    n_tokens, d_out, stride_u,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Stores one tile of y = scale∘u + bias."""
    n_tiles_out = tl.cdiv(d_out, BLOCK_OUT)
    i_t = (tl.program_id(0) // n_tiles_out).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_out = tl.program_id(0) % n_tiles_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = i_out < d_out
    mask = (i_t < n_tokens)[:, None] & m_out[None, :]
    b_scale, _ = load_scale(magnitude, norms, i_out, m_out)
    b_y = tl.load(u + i_t[:, None] * stride_u + i_out[None, :], mask=mask, other=0.0).to(tl.float32) * b_scale[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + i_out, mask=m_out, other=0.0).to(tl.float32)[None, :]
    tl.store(y + i_t[:, None] * d_out + i_out[None, :], round_to(b_y, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "tokens_per_split"])
def lora_column_scale_backward_kernel(
    dy, u, magnitude, norms, du, dmagnitude,
    n_tokens, d_out, stride_dy, stride_u, tokens_per_split,
    NEED_U: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Stores du = scale∘dy of a column chunk and a token range, and the range's partial sum dmagnitude (split,
    d_out)."""
    i_out = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i_split = tl.program_id(1).to(tl.int64)
    m_out = i_out < d_out
    b_scale, b_norms = load_scale(magnitude, norms, i_out, m_out)
    b_total = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)
    # As in the norms, the loop's stages let it load ahead.
    for o_t in tl.range(0, tokens_per_split, BLOCK_T, num_stages=3):
        i_t = i_split * tokens_per_split + o_t + tl.arange(0, BLOCK_T)
        mask = (i_t < n_tokens)[:, None] & m_out[None, :]
        b_dy = tl.load(dy + i_t[:, None] * stride_dy + i_out[None, :], mask=mask, other=0.0).to(tl.float32)
        b_u = tl.load(u + i_t[:, None] * stride_u + i_out[None, :], mask=mask, other=0.0).to(tl.float32)
        b_total += b_dy * b_u
        if NEED_U:
            b_du = round_to(b_dy * b_scale[None, :], du.dtype.element_ty)
            tl.store(du + i_t[:, None] * d_out + i_out[None, :], b_du, mask=mask)
    b_part = round_to(tl.div_rn(tl.sum(b_total, 0), b_norms), dmagnitude.dtype.element_ty)
    tl.store(dmagnitude + i_split * d_out + i_out, b_part, mask=m_out)


class NormsPlan:
    """Computes the norms for one signature."""

    def __init__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor):
        a, b = contiguous_rows(lora_A), contiguous_rows(lora_B)
        self.needs_layout = a is not lora_A or b is not lora_B
        (d_out, d_in), r = weight.shape, len(a)
        tile = tiles.weight_norms(weight, r, is_wide(weight, a) or is_wide(weight, b))
        self.empty = allocator((d_out,), lora_A.dtype, weight.device)
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


def _laid_out(rows: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns matrices (n_tokens, d_out) with contiguous rows, and contiguous vectors."""
    return *[flat(tensor) for tensor in rows], *[vector.contiguous() for vector in vectors]


class ScalePlan:
    """Computes y = scale∘u + bias for one signature."""

    def __init__(self, u: Tensor, *vectors: Tensor):
        rows, *others = _laid_out((u,), vectors)
        self.needs_layout = not share_memory((u, *vectors), (rows, *others))
        (n_tokens, d_out), tile = rows.shape, SCALE_TILE
        self.empty = allocator(tuple(u.shape), u.dtype, u.device)
        self.launch = Launch(
            lora_column_scale_kernel, (triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_out, tile.outer),),
            (n_tokens, d_out, rows.stride(0)), {"HAS_BIAS": len(vectors) == 3, **tile.options()},
        )  # fmt: skip

    def __call__(self, stream: int | None, u: Tensor, *vectors: Tensor) -> Tensor:
        """``vectors``: magnitude, norms and, if there is one, bias."""
        if self.needs_layout:
            u, *vectors = _laid_out((u,), vectors)
        y = self.empty()
        self.launch.go(stream, (u, y, *vectors, *vectors[: 3 - len(vectors)]), ())  # magnitude stands in for no bias
        return y


class ScaleBackwardPlan:
    """Computes du and dmagnitude for one signature."""

    def __init__(self, dy: Tensor, u: Tensor, magnitude: Tensor, norms: Tensor, need_u: bool):
        laid_out = dy_rows, u_rows, *_ = _laid_out((dy, u), (magnitude, norms))
        self.needs_layout = not share_memory((dy, u, magnitude, norms), laid_out)
        (n_tokens, d_out), tile, self.need_u = u_rows.shape, BACKWARD_TILE, need_u
        n_chunks, n_splits, tokens_per_split = tiles.splits(n_tokens, d_out, 1, tile)
        self.empty = allocator(tuple(u.shape), u.dtype, u.device)
        self.total = Split((d_out,), magnitude.dtype, n_splits, u.device)
        self.launch = Launch(
            lora_column_scale_backward_kernel, (n_chunks, n_splits),
            (n_tokens, d_out, dy_rows.stride(0), u_rows.stride(0), tokens_per_split),
            {"NEED_U": need_u, **tile.options()},
        )  # fmt: skip
        self.add = sum_launch(self.total.sizes)

    def __call__(self, dy, u, magnitude, norms, stream: int | None) -> tuple[Tensor | None, Tensor]:
        if self.needs_layout:
            dy, u, magnitude, norms = _laid_out((dy, u), (magnitude, norms))
        du, total = self.empty() if self.need_u else None, self.total.empty()
        parts = total if self.add is None else self.total.empty_parts()
        self.launch.go(stream, (dy, u, magnitude, norms, u if du is None else du, parts), ())  # u stands in for no du
        if self.add is not None:
            self.add.go(stream, (parts, total, parts, total), ())
        return du, total


def weight_norms(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, squares: Tensor | None = None
) -> Tensor:
    """Returns the norms of the rows of W + scaling · b a, (d_out,) in lora_A's dtype, for weight (d_out, d_in) with any
    strides, lora_A (r, d_in) and lora_B (d_out, r). ``squares`` are not used, because the kernel reads W in any case.
    Twin: ``reference.dora.weight_norms``."""
    if weight.numel() == 0:
        return lora_A.new_zeros(len(weight))
    if not device.is_current(weight):
        with torch.cuda.device(weight.device):
            return weight_norms(weight, lora_A, lora_B, scaling)
    if by_jit():
        return NormsPlan(weight, lora_A, lora_B)(weight, lora_A, lora_B, float(scaling), None)
    key = [weight.shape, weight.dtype, device.index(weight), len(lora_A), lora_A.dtype, lora_B.dtype]
    plan = planned(NormsPlan, key, (weight, lora_A, lora_B), weight, weight, lora_A, lora_B)
    return plan(weight, lora_A, lora_B, float(scaling), device.stream(weight))


def column_scale(u: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
    """Returns y = (magnitude / norms)∘u + bias, (..., d_out) in u's dtype, for u (..., d_out) and vectors (d_out,).
    Twin: ``reference.dora.column_scale``."""
    if u.numel() == 0:
        return torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if not device.is_current(u):
        with torch.cuda.device(u.device):
            return column_scale(u, magnitude, norms, bias)
    tensors = (u, magnitude, norms) if bias is None else (u, magnitude, norms, bias)
    if by_jit():
        return ScalePlan(*tensors)(None, *tensors)
    key = [u.shape, device.index(u), *[tensor.dtype for tensor in tensors]]
    return planned(ScalePlan, key, tensors, u, *tensors)(device.stream(u), *tensors)


def column_scale_backward(
    dy: Tensor, u: Tensor, magnitude: Tensor, norms: Tensor, need_u: bool = True, need_magnitude: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Returns du = (magnitude / norms)∘dy, (..., d_out) in u's dtype, which dy has, too, and the gradient of the
    magnitude, Σ_t dy∘u / norms, (d_out,) in its dtype, each None if not needed. u is read for the second alone. Twin:
    ``reference.dora.column_scale_backward``."""
    if not need_magnitude:
        return column_scale(dy, magnitude, norms, None) if need_u else None, None
    if u.numel() == 0:
        return torch.empty_like(u) if need_u else None, torch.zeros_like(magnitude)
    if not device.is_current(u):
        with torch.cuda.device(u.device):
            return column_scale_backward(dy, u, magnitude, norms, need_u)
    tensors = dy, u, magnitude, norms
    if by_jit():
        return ScaleBackwardPlan(*tensors, need_u)(*tensors, None)
    key = [u.shape, device.index(u), need_u, *[tensor.dtype for tensor in tensors]]
    return planned(ScaleBackwardPlan, key, tensors, u, *tensors, need_u)(*tensors, device.stream(u))
