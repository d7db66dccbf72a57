"""The GEMM with the adapter in it: y = x Wᵀ + scaling S bᵀ + bias, and dx = dy W + keep∘(dS a).

Math      Both are: result = left · W' + keep∘(thin · factor) + bias, with W' = Wᵀ, thin = S, factor = scaling bᵀ
          forward and W' = W, thin = dS, factor = a backward. The accumulator starts from the thin product: no second
          pass over the result, one rounding.
Strategy  "fused": one persistent Triton GEMM (TMA descriptors from sm_90 on, pointers before).
          "cublas": cuBLAS for left · W', then ``lora_update_kernel`` adds the thin product to the result in place.
          ``tiles.strategy`` picks; the second rounding of "cublas" is within the error budget.
Grid      fused: one program per multiprocessor walks tiles of the result, tokens fastest within a group of rows, so
          that neighbours share W in L2. update: one program per tile.
Shapes    left (n_tokens, d_in), W (d_out, d_in) or (d_in, d_out) as stored, thin (n_tokens, r), result
          (n_tokens, d_out) in left's dtype; here d_in is what is summed over and d_out the result's columns, in both
          directions.
Roofline  2·n_tokens·d_in·d_out operations: compute bound; the thin product adds r/d_in of it.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .launch import Keep, on_device, precision, rows
from .primitives import cast, dot, drop, keep_mask, round_to


@triton.jit
def thin_product(
    thin, factor, i_t, i_out, o_out, m_t, m_out, stride_factor, scaling, seed, drop_level, R: tl.constexpr,
    TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr, SEED_IN_MEMORY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """keep∘(thin · factor) for one tile: float32 [BLOCK_T, BLOCK_OUT]."""
    dtype: tl.constexpr = thin.dtype.element_ty
    b_acc = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)
    for o_r in tl.range(0, R, BLOCK_R, num_stages=1):
        i_r = o_r + tl.arange(0, BLOCK_R)
        m_r = i_r < R
        b_thin = tl.load(thin + i_t[:, None] * R + i_r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0)
        if TRANSPOSED:  # factor is b (d_out, r)
            p_factor = factor + i_out[None, :] * stride_factor + i_r[:, None]
        else:  # factor is a (r, d_out)
            p_factor = factor + i_r[:, None].to(tl.int64) * stride_factor + i_out[None, :]
        b_factor = tl.load(p_factor, mask=m_r[:, None] & m_out[None, :], other=0.0)  # [BLOCK_R, BLOCK_OUT]
        b_acc = dot(b_thin, cast(b_factor, dtype), b_acc, PRECISION)
    if TRANSPOSED:
        b_acc *= scaling
    if DROPOUT:
        b_acc = drop(b_acc, keep_mask(seed, i_t, o_out, drop_level, SEED_IN_MEMORY, BLOCK_OUT))
    return b_acc


@triton.jit(do_not_specialize=["seed", "drop_level"])
def lora_linear_kernel(
    left, weight, bias, thin, factor, result, n_tokens, d_out, d_in,
    stride_left, stride_weight, stride_factor, scaling, seed, drop_level,
    R: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_IN_MEMORY: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """TRANSPOSED: weight is (d_out, d_in), factor (d_out, r). With TMA left, weight and result are descriptors."""
    dtype: tl.constexpr = thin.dtype.element_ty
    n_tiles_t, n_tiles_out = tl.cdiv(n_tokens, BLOCK_T), tl.cdiv(d_out, BLOCK_OUT)
    for tile in tl.range(tl.program_id(0), n_tiles_t * n_tiles_out, tl.num_programs(0), flatten=TMA and R <= BLOCK_R):
        group = tile // (GROUP * n_tiles_out)
        group_rows = tl.minimum(n_tiles_t - group * GROUP, GROUP)
        within = tile % (GROUP * n_tiles_out)
        o_t = (group * GROUP + within % group_rows) * BLOCK_T
        o_out = (within // group_rows) * BLOCK_OUT
        i_t = o_t.to(tl.int64) + tl.arange(0, BLOCK_T)
        i_out = o_out.to(tl.int64) + tl.arange(0, BLOCK_OUT)
        m_t, m_out = i_t < n_tokens, i_out < d_out
        b_acc = thin_product(
            thin, factor, i_t, i_out, o_out, m_t, m_out, stride_factor, scaling, seed, drop_level, R, TRANSPOSED,
            DROPOUT, SEED_IN_MEMORY, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_R,
        )  # fmt: skip
        if HAS_BIAS:
            b_acc += tl.load(bias + i_out, mask=m_out, other=0.0).to(tl.float32)[None, :]
        for o_in in range(0, d_in, BLOCK_IN):
            if TMA:
                b_left = left.load([o_t, o_in])
                b_weight = weight.load([o_out, o_in]).T if TRANSPOSED else weight.load([o_in, o_out])
            else:
                i_in = o_in + tl.arange(0, BLOCK_IN)
                m_in = i_in < d_in
                p_left = left + i_t[:, None] * stride_left + i_in[None, :]
                if TRANSPOSED:
                    p_weight = weight + i_out[None, :] * stride_weight + i_in[:, None]
                else:
                    p_weight = weight + i_in[:, None].to(tl.int64) * stride_weight + i_out[None, :]
                b_left = tl.load(p_left, mask=m_t[:, None] & m_in[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
                b_weight = tl.load(p_weight, mask=m_in[:, None] & m_out[None, :], other=0.0)  # [BLOCK_IN, BLOCK_OUT]
            b_acc = dot(b_left, b_weight, b_acc, PRECISION)
        if TMA:
            result.store([o_t, o_out], round_to(b_acc, dtype))
        else:
            p_result = result + i_t[:, None] * d_out + i_out[None, :]
            tl.store(p_result, round_to(b_acc, dtype), mask=m_t[:, None] & m_out[None, :])


@triton.jit(do_not_specialize=["seed", "drop_level"])
def lora_update_kernel(
    result, thin, factor, n_tokens, d_out, stride_factor, scaling, seed, drop_level,
    R: tl.constexpr, TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr, SEED_IN_MEMORY: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """result += keep∘(thin · factor), in place."""
    dtype: tl.constexpr = thin.dtype.element_ty
    n_tiles_out = tl.cdiv(d_out, BLOCK_OUT)
    o_t = (tl.program_id(0) // n_tiles_out).to(tl.int64) * BLOCK_T
    o_out = (tl.program_id(0) % n_tiles_out) * BLOCK_OUT
    i_t = o_t + tl.arange(0, BLOCK_T)
    i_out = o_out.to(tl.int64) + tl.arange(0, BLOCK_OUT)
    m_t, m_out = i_t < n_tokens, i_out < d_out
    b_acc = thin_product(
        thin, factor, i_t, i_out, o_out, m_t, m_out, stride_factor, scaling, seed, drop_level, R, TRANSPOSED,
        DROPOUT, SEED_IN_MEMORY, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_R,
    )  # fmt: skip
    p_result = result + i_t[:, None] * d_out + i_out[None, :]
    mask = m_t[:, None] & m_out[None, :]
    b_acc += tl.load(p_result, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_result, round_to(b_acc, dtype), mask=mask)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """y (n_tokens, d_out) = x Wᵀ + bias + scaling · S bᵀ in x's dtype. Twin: ``reference.linear``."""
    return _linear(x, weight, bias, s, lora_B, scaling, None, transposed=True)


def grad_x(
    dy: torch.Tensor, weight: torch.Tensor, ds: torch.Tensor, lora_A: torch.Tensor, keep: Keep | None = None
) -> torch.Tensor:
    """dx (n_tokens, d_in) = dy W + keep∘(dS a) in dy's dtype. Twin: ``reference.grad_x``."""
    return _linear(dy, weight, None, ds, lora_A, 1.0, keep, transposed=False)


def _linear(left, weight, bias, thin, factor, scaling, keep, transposed) -> torch.Tensor:
    left, weight, factor = rows(left), rows(weight), rows(factor)
    n_tokens = left.shape[0]
    d_out = weight.shape[0] if transposed else weight.shape[1]
    if n_tokens == 0 or d_out == 0:
        return torch.empty((n_tokens, d_out), dtype=left.dtype, device=left.device)
    flags = {
        "R": thin.shape[1],
        "TRANSPOSED": transposed,
        "DROPOUT": keep is not None,
        "SEED_IN_MEMORY": Keep.in_memory(keep),
        "PRECISION": precision(left),
    }
    with on_device(left):
        if tiles.strategy(left, d_out, flags["R"], transposed, flags["DROPOUT"]) == "cublas":
            result = F.linear(left, weight, bias) if transposed else torch.mm(left, weight)
            _update(result, thin, factor, scaling, keep, flags)
        else:
            result = torch.empty((n_tokens, d_out), dtype=left.dtype, device=left.device)
            _fused(left, weight, bias, thin, factor, result, scaling, keep, flags)
    return result


def _update(result, thin, factor, scaling, keep, flags) -> None:
    n_tokens, d_out = result.shape
    tile = tiles.update(result, flags["R"])
    grid = triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_out, tile.outer)
    lora_update_kernel[(grid,)](
        result, thin, factor, n_tokens, d_out, factor.stride(0), scaling, *Keep.arguments(keep), **flags,
        BLOCK_T=tile.t, BLOCK_OUT=tile.outer, BLOCK_R=tile.r, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _fused(left, weight, bias, thin, factor, result, scaling, keep, flags) -> None:
    (n_tokens, d_in), d_out = left.shape, result.shape[1]
    tma = tiles.uses_tma(left, weight, result)
    tile = tiles.linear(left, d_out, flags["R"], flags["TRANSPOSED"], tma, flags["DROPOUT"])
    matrices = left, weight, result
    if tma:
        weight_block = [tile.outer, tile.inner] if flags["TRANSPOSED"] else [tile.inner, tile.outer]
        blocks = [tile.t, tile.inner], weight_block, [tile.t, tile.outer]
        matrices = [TensorDescriptor.from_tensor(*pair) for pair in zip(matrices, blocks, strict=True)]
    n_tiles = triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_out, tile.outer)
    programs = min(n_tiles, tiles.multiprocessors(left.device))
    lora_linear_kernel[(programs,)](
        matrices[0], matrices[1], bias, thin, factor, matrices[2], n_tokens, d_out, d_in,
        left.stride(0), weight.stride(0), factor.stride(0), scaling, *Keep.arguments(keep), **flags,
        HAS_BIAS=bias is not None, TMA=tma, GROUP=tiles.GROUP,
        BLOCK_T=tile.t, BLOCK_OUT=tile.outer, BLOCK_IN=tile.inner, BLOCK_R=tile.r,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
