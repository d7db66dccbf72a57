"""A DoRA layer: y = c∘(x Wᵀ + scaling S bᵀ) + bias with c = magnitude / norms, and its gradients.

Math      u = base + scaling S bᵀ, where cuBLAS computes base = x Wᵀ, and y = c∘u + bias. Backward, with G = dyᵀ S:
              du = c∘dy    dS = scaling dy (c∘b)    db = scaling c∘G    dx = du W + dS a    da = dSᵀ x
              dmagnitude = Σ_t dy∘u / norms = (Σ_t dy∘base + scaling Σ_r b∘G) / norms
          so that base, which cuBLAS has written in any case, is kept for backward, and u is in memory nowhere.
Grid      update: as in gemm.py. grads: (column chunks, token splits) as in grads.py: one read of dy and of base gives
          du, dS, db and dmagnitude, and one more launch adds their partial sums. Where LoRA's dS is cuBLAS's, for many
          ranks, this one is, too.
Shapes    x (n_tokens, d_in), W (d_out, d_in), S and dS (n_tokens, r), base, dy, du and y (n_tokens, d_out) in x's
          dtype; magnitude, norms and bias (d_out,) any float. Sums and c are float32.
Roofline  update: base and y once. grads: dy, base and du once, plus partials as in grads.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import device, tiles
from ..launch import Launch, allocator, by_jit, contiguous_rows, is_wide, precision, thin_dtype
from ..linear import signature, strategies
from ..linear.cublas import CublasGradSB, CublasProject
from ..linear.gemm import load_factor, load_thin
from ..linear.grads import GradA, Split, sum_block
from ..linear.groups import planned
from ..linear.project import Project
from ..linear.signature import flat, share_memory
from ..primitives import dot_rounded, dot_wide, round_to
from .columns import load_scale


@triton.jit(do_not_specialize=["n_tokens"])
def lora_scaled_update_kernel(
    base, result, thin, factor, magnitude, norms, bias,
    scaling,
    n_tokens, d_out, stride_factor,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores one tile of result = c∘(base + scaling · thin factorᵀ) + bias."""
    dtype: tl.constexpr = result.dtype.element_ty
    n_tiles_out = tl.cdiv(d_out, BLOCK_OUT)
    i_t = (tl.program_id(0) // n_tiles_out).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_out = (tl.program_id(0) % n_tiles_out).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_t, m_out = i_t < n_tokens, i_out < d_out
    b_acc = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)
    for o_r in tl.range(0, R, BLOCK_R, num_stages=1):
        i_r = o_r + tl.arange(0, BLOCK_R)
        b_thin = load_thin(thin, i_t, i_r, m_t, i_r < R, n_tokens, 1, R, False)
        b_factor = load_factor(factor, i_r, i_out, i_r < R, m_out, stride_factor, True)
        b_acc = dot_rounded(b_thin, b_factor, b_acc, dtype, PRECISION)
    o_result = i_t[:, None] * d_out + i_out[None, :]
    mask = m_t[:, None] & m_out[None, :]
    b_acc = b_acc * scaling + tl.load(base + o_result, mask=mask, other=0.0).to(tl.float32)
    b_scale, _ = load_scale(magnitude, norms, i_out, m_out)
    b_acc *= b_scale[None, :]
    if HAS_BIAS:
        b_acc += tl.load(bias + i_out, mask=m_out, other=0.0).to(tl.float32)[None, :]
    tl.store(result + o_result, round_to(b_acc, dtype), mask=mask)


@triton.jit
def load_b(p_b, m_b, dtype: tl.constexpr, ROUNDED: tl.constexpr):
    """Loads a block of b, which ROUNDED rounds to the activations' dtype."""
    b_b = tl.load(p_b, mask=m_b, other=0.0)
    return round_to(b_b.to(tl.float32), dtype) if ROUNDED else b_b


@triton.jit(do_not_specialize=["n_tokens", "tokens_per_split"])
def lora_scaled_grads_kernel(
    dy, base, s, b, magnitude, norms, du, ds, db, dmagnitude,
    scaling,
    n_tokens, d_out, stride_dy, stride_b, tokens_per_split,
    R: tl.constexpr, NEED_U: tl.constexpr, NEED_S: tl.constexpr, NEED_B: tl.constexpr, NEED_M: tl.constexpr,
    ROUNDED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores du of a column chunk and a token range, and what they add to dS (chunk, n_tokens, r), db (split, d_out, r)
    and dmagnitude (split, d_out)."""
    i_chunk, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_out = i_chunk * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i_r = tl.arange(0, BLOCK_R)
    m_out, m_r = i_out < d_out, i_r < R
    m_b = m_out[:, None] & m_r[None, :]
    b_scale, b_norms = load_scale(magnitude, norms, i_out, m_out)
    p_b = b + i_out[:, None] * stride_b + i_r[None, :]
    b_b = load_b(p_b, m_b, dy.dtype.element_ty, ROUNDED)
    b_scaled = round_to(b_b.to(tl.float32) * b_scale[:, None], b_b.dtype)
    b_g = tl.zeros([BLOCK_OUT, BLOCK_R], dtype=tl.float32)
    b_product = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)  # of dy and base, added up over steps
    # Triton loads a block that is no operand of a product ahead only where the loop's stages are given here.
    for o_t in tl.range(0, tokens_per_split, BLOCK_T, num_stages=STAGES):
        i_t = i_split * tokens_per_split + o_t + tl.arange(0, BLOCK_T)
        m_t = i_t < n_tokens
        m_s, mask = m_t[:, None] & m_r[None, :], m_t[:, None] & m_out[None, :]
        b_dy = tl.load(dy + i_t[:, None] * stride_dy + i_out[None, :], mask=mask, other=0.0)  # [BLOCK_T, BLOCK_OUT]
        if NEED_U:
            b_du = round_to(b_dy.to(tl.float32) * b_scale[None, :], dy.dtype.element_ty)
            tl.store(du + i_t[:, None] * d_out + i_out[None, :], b_du, mask=mask)
        if NEED_S:
            b_ds = dot_wide(b_dy, b_scaled, tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32), PRECISION)
            p_ds = ds + (i_chunk * n_tokens + i_t[:, None]) * R + i_r[None, :]
            tl.store(p_ds, round_to(b_ds * scaling, ds.dtype.element_ty), mask=m_s)
        if NEED_B or NEED_M:
            b_s = tl.load(s + i_t[:, None] * R + i_r[None, :], mask=m_s, other=0.0)  # [BLOCK_T, BLOCK_R]
            b_g = dot_wide(tl.trans(b_dy), b_s, b_g, PRECISION)
        if NEED_M:
            b_base = tl.load(base + i_t[:, None] * d_out + i_out[None, :], mask=mask, other=0.0).to(tl.float32)
            b_product += b_dy.to(tl.float32) * b_base
    b_g *= scaling
    if NEED_B:
        p_db = db + (i_split * d_out + i_out[:, None]) * R + i_r[None, :]
        tl.store(p_db, round_to(b_g * b_scale[:, None], db.dtype.element_ty), mask=m_b)
    if NEED_M:
        b_b = load_b(p_b, m_b, dy.dtype.element_ty, ROUNDED)  # again, which frees its registers in the loop
        b_total = tl.sum(b_product, 0) + tl.sum(b_g * b_b.to(tl.float32), 1)
        b_total = tl.div_rn(b_total, b_norms)
        tl.store(dmagnitude + i_split * d_out + i_out, round_to(b_total, dmagnitude.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["n_parts_s", "n_parts_b", "n_parts_m"])
def lora_scaled_sum_kernel(
    parts_s, ds, parts_b, db, parts_m, dmagnitude,
    numel_s, n_parts_s, numel_b, n_parts_b, numel_m, n_parts_m,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of dS, db and dmagnitude, in order, of those that have any."""
    i_block = tl.program_id(0)
    n_blocks_s, n_blocks_b = tl.cdiv(numel_s, BLOCK), tl.cdiv(numel_b, BLOCK)
    if i_block < n_blocks_s:
        sum_block(parts_s, ds, numel_s, n_parts_s, i_block, False, BLOCK)
    elif i_block < n_blocks_s + n_blocks_b:
        sum_block(parts_b, db, numel_b, n_parts_b, i_block - n_blocks_s, False, BLOCK)
    else:
        sum_block(parts_m, dmagnitude, numel_m, n_parts_m, i_block - n_blocks_s - n_blocks_b, False, BLOCK)


class ScaledUpdate:
    """Computes y from base and S, (n_tokens, d_out) and (n_tokens, r), for one signature."""

    def __init__(self, rows, lora_B, shape: tuple[int, ...], has_bias: bool):
        (d_out, r), n_tokens, tile = lora_B.shape, len(rows), tiles.update(rows, lora_B.shape[1], False)
        self.empty = allocator(shape, rows.dtype, rows.device)
        self.launch = Launch(
            lora_scaled_update_kernel, (triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_out, tile.outer),),
            (n_tokens, d_out, lora_B.stride(0)),
            {"R": r, "HAS_BIAS": has_bias, "PRECISION": precision(rows), **tile.options()},
        )  # fmt: skip

    def __call__(self, base, s, lora_B, magnitude, norms, bias, scaling: float, stream: int | None = None) -> Tensor:
        y = self.empty()
        tensors = base, y, s, lora_B, magnitude, norms, norms if bias is None else bias  # norms stand in for no bias
        self.launch.go(stream, tensors, (scaling,))
        return y


class ScaledGrads:
    """Computes du, dS, db and dmagnitude by one pass over dy, for one signature.

    Args:
        needs: whether each of them is needed; a call returns None for one that is not.
        rounded: whether b is rounded to dy's dtype, which dS then has (as under autocast).
    """

    def __init__(self, dy, s, lora_B, magnitude, needs: tuple[bool, bool, bool, bool], rounded: bool = False):
        (n_tokens, d_out), r, place = dy.shape, lora_B.shape[1], dy.device
        tile = tiles.scaled_grads(dy, r, is_wide(dy, s) or is_wide(dy, lora_B))
        n_chunks, n_splits, tokens_per_split = tiles.splits(n_tokens, d_out, r, tile)
        self.results = (
            Split((n_tokens, d_out), dy.dtype, 1, place, needs[0]),
            Split((n_tokens, r), thin_dtype(dy, lora_B, rounded), n_chunks, place, needs[1]),
            Split((d_out, r), lora_B.dtype, n_splits, place, needs[2]),
            Split((d_out,), magnitude.dtype, n_splits, place, needs[3]),
        )
        flags = dict(zip(("NEED_U", "NEED_S", "NEED_B", "NEED_M"), needs, strict=True))
        self.launch = Launch(
            lora_scaled_grads_kernel, (n_chunks, n_splits),
            (n_tokens, d_out, dy.stride(0), lora_B.stride(0), tokens_per_split),
            {"R": r, **flags, "ROUNDED": rounded, "PRECISION": precision(dy), "STAGES": tile.stages, **tile.options()},
        )  # fmt: skip
        sizes = [size for split in self.results[1:] for size in split.sizes]
        n_blocks, options = sum(triton.cdiv(numel, tiles.SUM_BLOCK) for numel in sizes[::2]), {"num_warps": 4}
        options["BLOCK"] = tiles.SUM_BLOCK
        self.add = Launch(lora_scaled_sum_kernel, (n_blocks,), tuple(sizes), options) if n_blocks else None

    def __call__(self, dy, base, s, lora_B, magnitude, norms, scaling: float, stream: int | None = None) -> tuple:
        # dy stands in for a result that is not needed: the kernel takes a pointer, but does not write to it.
        results = [split.empty() if split.needed else dy for split in self.results]
        splits = zip(self.results, results, strict=True)
        parts = [split.empty_parts() if split.in_parts else result for split, result in splits]
        self.launch.go(stream, (dy, base, s, lora_B, magnitude, norms, *parts), (scaling,))
        if self.add is not None:
            pairs = zip(parts[1:], results[1:], strict=True)
            self.add.go(stream, tuple(tensor for pair in pairs for tensor in pair), ())
        return tuple(t if split.needed else None for split, t in zip(self.results, results, strict=True))


class ForwardPlan:
    """Computes y, S and base for one signature."""

    def __init__(self, x, weight, bias, lora_A, lora_B, magnitude, norms, rounded: bool):
        arguments = x, bias, lora_A, lora_B, magnitude, norms
        laid_out = rows, _, a, b, *_ = self._lay_out(*arguments)
        self.needs_layout = not share_memory(arguments, laid_out)
        factor = x.dtype if rounded else signature.wider(a, b)
        thin = strategies.way("forward", rows, weight, factor, len(a), False).thin
        self.project = (
            CublasProject(rows, a, rounded) if thin == "cublas" else Project(rows, a, False, rounded, thin != "pass")
        )
        self.update = ScaledUpdate(rows, b, (*x.shape[:-1], len(weight)), bias is not None)

    def __call__(self, x, weight, bias, lora_A, lora_B, magnitude, norms, scaling: float, stream: int | None):
        if self.needs_layout:
            x, bias, lora_A, lora_B, magnitude, norms = self._lay_out(x, bias, lora_A, lora_B, magnitude, norms)
        rows = flat(x)  # cuBLAS reads its shape
        s = self.project(rows, lora_A, None, stream)
        base = F.linear(rows, weight)
        return self.update(base, s, lora_B, magnitude, norms, bias, scaling, stream), s, base

    def _lay_out(self, x, bias, lora_A, lora_B, magnitude, norms):
        """Returns the arguments with the shapes and strides that the kernels need."""
        vectors = [vector if vector is None else vector.contiguous() for vector in (bias, magnitude, norms)]
        return flat(x), vectors[0], contiguous_rows(lora_A), contiguous_rows(lora_B), *vectors[1:]


class BackwardPlan:
    """Computes dx, da, db and dmagnitude for one signature. ``needs`` (x, a, b, magnitude): a gradient that is not
    needed is None."""

    grad_a: Any  # None where not needed, as grad_x
    grad_x: Any

    def __init__(self, dy, x, s, base, weight, lora_A, lora_B, magnitude, norms, rounded: bool, needs):
        arguments = dy, x, weight, lora_A, lora_B, magnitude, norms
        r = len(lora_A)
        factor = dy.dtype if rounded else signature.wider(lora_A, lora_B)
        way = strategies.way("backward", flat(dy), weight, factor, r, False)
        self.any_weight_strides = way.gemm == "cublas"
        laid_out = dy, x_rows, weight, a, b, magnitude, _ = self._lay_out(*arguments)
        self.needs_layout = not share_memory(arguments, laid_out)
        need_x, need_a, need_b, need_m = needs
        need_s, by_cublas = need_x or need_a, way.thin == "cublas"  # the parts of a dS of many ranks would be large
        self.grads = ScaledGrads(dy, s, b, magnitude, (need_x, need_s and not by_cublas, need_b, need_m), rounded)
        self.grad_s = CublasGradSB(dy, s, b, (True, False), rounded) if need_s and by_cublas else None
        self.grad_a = GradA(x_rows, thin_dtype(dy, b, rounded), a, False) if need_a else None
        left = dy if dy.is_contiguous() else torch.empty_like(dy, memory_format=torch.contiguous_format)
        gemm = signature.gemm_of(way, a, b)
        self.grad_x = gemm(left, weight, None, a, r, False, False, x.shape) if need_x else None

    def __call__(self, dy, x, s, base, weight, lora_A, lora_B, magnitude, norms, scaling: float, stream: int | None):
        if self.needs_layout:
            arguments = dy, x, weight, lora_A, lora_B, magnitude, norms
            dy, x, weight, lora_A, lora_B, magnitude, norms = self._lay_out(*arguments)
        du, ds, db, dm = self.grads(dy, base, s, lora_B, magnitude, norms, scaling, stream)
        if self.grad_s is not None:
            scaled = (magnitude.float() / norms.float())[:, None] * lora_B
            ds, _ = self.grad_s(dy, s, scaled.to(lora_B.dtype), scaling, stream)
        da = None if self.grad_a is None else self.grad_a(x, ds, lora_A, None, stream)
        dx = None if self.grad_x is None else self.grad_x(du, weight, None, ds, lora_A, 1.0, None, stream)
        return dx, da, db, dm

    def _lay_out(self, dy, x, weight, lora_A, lora_B, magnitude, norms):
        """Returns the arguments with the shapes and strides that the kernels need."""
        weight = weight if self.any_weight_strides else contiguous_rows(weight)
        factors = contiguous_rows(lora_A), contiguous_rows(lora_B)
        return flat(dy), flat(x), weight, *factors, magnitude.contiguous(), norms.contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norms: Tensor,
    scaling: float, rounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y = c∘(x Wᵀ + scaling S bᵀ) + bias (..., d_out), S (n_tokens, r) and what backward needs of the product,
    (n_tokens, d_out): here x Wᵀ. Arguments as ``linear.forward`` and ``column_scale``. Twin:
    ``reference.dora.forward``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return forward(x, weight, bias, lora_A, lora_B, magnitude, norms, scaling, rounded)
    if x.numel() == 0 or weight.numel() == 0:  # a grid must not be empty
        y, s = signature.empty_forward(x, weight, bias, lora_A, rounded)
        return y, s, x.new_zeros((len(s), len(weight)))
    tensors = x, weight, lora_A, lora_B, magnitude, norms, *(() if bias is None else (bias,))
    arguments = x, weight, bias, lora_A, lora_B, magnitude, norms
    if by_jit():
        return ForwardPlan(*arguments, rounded)(*arguments, float(scaling), None)
    key = [x.shape, weight.shape, len(lora_A), rounded, device.index(x), bias is None, *[t.dtype for t in tensors]]
    plan = planned(ForwardPlan, key, tensors, x, *arguments, rounded)
    return plan(*arguments, float(scaling), device.stream(x))


def backward(
    dy: Tensor, x: Tensor, s: Tensor, kept: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor,
    norms: Tensor, scaling: float, rounded: bool = False,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dx (..., d_in), da, db and the gradient of the magnitude, each in its operand's dtype, for dy
    (..., d_out), and S and ``kept`` of the forward. ``needs`` (x, a, b, magnitude; not all False): a gradient that is
    not needed is None. Twin: ``reference.dora.backward``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return backward(dy, x, s, kept, weight, lora_A, lora_B, magnitude, norms, scaling, rounded, needs)
    if x.numel() == 0 or weight.numel() == 0:
        return tuple(
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((x, lora_A, lora_B, magnitude), needs, strict=True)
        )
    tensors = dy, x, s, kept, weight, lora_A, lora_B, magnitude, norms
    if by_jit():
        return BackwardPlan(*tensors, rounded, needs)(*tensors, float(scaling), None)
    key = [x.shape, weight.shape, len(lora_A), rounded, needs, device.index(x), *[tensor.dtype for tensor in tensors]]
    plan = planned(BackwardPlan, key, tensors, x, *tensors, rounded, needs)
    return plan(*tensors, float(scaling), device.stream(x))
