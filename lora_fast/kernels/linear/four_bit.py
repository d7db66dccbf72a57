"""The GEMM of gemm.py over a weight in bitsandbytes' 4 bits, which it dequantises tile by tile: y = x Wᵀ + scaling S bᵀ
+ bias, and dx = dy W + keep∘(dS a).

Math      W = code[nibble] · absmax, rounded to left's dtype before the product, as bitsandbytes does. ``code`` has the
          16 values of NF4 or FP4, ``absmax`` one factor for each ``blocksize`` elements. With double quantisation it is
          code₂[byte] · absmax₂ + offset, with one absmax₂ for each 256. ``lora_absmax_kernel`` computes it first,
          because the GEMM's loop could not load through a chain of tables ahead of its use.
Strategy  "fused" is this GEMM. "library" is bitsandbytes' product, which writes all of W in 16 bits if there are many
          tokens, and always for dx. ``four_bit_strategy`` chooses "library" unless ``lora-fast tune`` measured that
          "fused" is faster.
Grid      as in gemm.py. A tile has many tokens and few columns, because each tile dequantises its part of W again.
Shapes    packed: d_out d_in / 2 bytes, W's rows one after another, the first of two elements in the high four bits; the
          other operands as in gemm.py. d_in and blocksize are multiples of 64 (``takes``), so that 64 elements from a
          multiple of 64 on have one absmax. Any number of tokens, d_out and rank.
Pipeline  left (by TMA from sm_90 on), the packed bytes and absmax are loaded ahead. The code is in the lanes of each
          warp, and a nibble selects its value by a shuffle. On sm_90 Triton waits for a product whose operand the step
          itself has written, so no product is in flight while the next tile of W is dequantised, unlike in gemm.py.
Bytes     d_out d_in (1/2 + 4 / blocksize) for W. bitsandbytes' product of many tokens moves 8 times as many, because it
          reads the 4 bits, writes 16, and reads them again.
Roofline  2·n_tokens·d_in·d_out operations: compute bound. About 8 instructions for each element of W and each block of
          tokens come on top. On an H100 they are estimated at half the time of the products of 256 tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, tiles
from ..launch import (
    NO_MASK,
    DropoutMask,
    Launch,
    Matrix,
    alignments,
    allocator,
    by_jit,
    contiguous_rows,
    on_device,
    precision,
)
from ..primitives import dot, dot_rounded, drop, keep_mask, round_to
from ..records import FourBit, NestedScales
from . import signature
from .gemm import load_factor, load_thin, place_of, store_tile

SPAN = 64  # neighbouring elements of a row that have one absmax
BLOCK = 1024  # elements that a program of lora_absmax_kernel computes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor, weight: FourBit) -> bool:
    """Returns whether the GEMM can multiply x or dy by this weight."""
    (_, d_in), nested = weight.shape, weight.nested
    scales = (weight.absmax,) if nested is None else (nested.code, nested.absmax, nested.offset)
    tensors = weight.packed, weight.code, weight.absmax, *scales
    return (
        x.dtype in DTYPES
        and d_in % SPAN == 0
        and weight.blocksize % SPAN == 0
        and all(scale.dtype is torch.float32 for scale in (weight.code, *scales))
        and (nested is None or weight.absmax.dtype is torch.uint8)
        and all(tensor.device == x.device and tensor.is_contiguous() for tensor in tensors)
    )


def four_bit_strategy(direction: str, x: Tensor, weight: FourBit, r: int, dropout: bool) -> str:
    """Returns what computes y from x and S (``direction`` "forward"), or dx from dS and dy, which is then ``x``. It is
    "fused" if that ``is_fastest`` and takes the weight, else "library"."""
    return "fused" if is_fastest(direction, x, weight.shape, r, dropout) and takes(x, weight) else "library"


def is_fastest(direction: str, x: Tensor, shape: tuple[int, int], r: int, dropout: bool) -> bool:
    """Returns whether "fused" was measured to be the fastest for a weight of this shape, or is assumed
    (``tiles.assume``)."""
    d_out, d_in = shape
    forward = direction == "forward"
    k, width = (d_in, d_out) if forward else (d_out, d_in)
    left = x if x.dim() == 2 else x.reshape(-1, k)
    choice = tiles.assumed("strategy") or tiles.measured(tiles.four_bit_op(forward, dropout), left, k, width, r)
    return choice == "fused"


@triton.jit
def lora_absmax_kernel(
    quantised, code, scales, offset, absmax,
    n,
    BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores absmax = code[quantised] · scales + offset, of n elements with a scale for each BLOCKSIZE."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = i < n
    b_value = tl.load(code + tl.load(quantised + i, mask=m_i, other=0).to(tl.int32)).to(tl.float64)
    # The product is rounded before the sum, as in bitsandbytes. In float32 the compiler would round both at once.
    b_product = b_value * tl.load(scales + i // BLOCKSIZE, mask=m_i, other=0.0)
    tl.store(absmax + i, b_product.to(tl.float32) + tl.load(offset), mask=m_i)


@triton.jit
def load_dequantised(
    packed, absmax, b_code,
    i_row, o_column, m_row, row_bytes,
    dtype: tl.constexpr, BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Loads rows i_row and columns o_column … o_column + COLUMNS of W: [ROWS, COLUMNS]. ``b_code`` [ROWS, 16] has the
    code in every row."""
    SPAN: tl.constexpr = COLUMNS if COLUMNS < 64 else 64  # the columns that have one absmax
    i_byte = o_column // 2 + tl.arange(0, COLUMNS // 2)
    p_packed = packed + i_row[:, None] * row_bytes + i_byte[None, :]
    b_packed = tl.load(p_packed, mask=m_row[:, None] & (i_byte < row_bytes)[None, :], other=0).to(tl.int32)
    b_value = tl.join(tl.gather(b_code, b_packed >> 4, 1), tl.gather(b_code, b_packed & 15, 1))
    i_column = o_column + SPAN * tl.arange(0, COLUMNS // SPAN)
    p_absmax = absmax + (i_row[:, None] * (2 * row_bytes) + i_column[None, :]) // BLOCKSIZE
    m_absmax = m_row[:, None] & (i_column < 2 * row_bytes)[None, :]
    b_absmax = tl.load(p_absmax, mask=m_absmax, other=0.0)
    b_weight = tl.reshape(b_value, [ROWS, COLUMNS // SPAN, SPAN]) * b_absmax[:, :, None]
    return round_to(tl.reshape(b_weight, [ROWS, COLUMNS]), dtype)


@triton.jit
def add_dequantised_products(
    left, packed, absmax, code, b_acc,
    o_t, o_out, i_t, i_out, m_t, m_out,
    d_in, stride_left, row_bytes,
    dtype: tl.constexpr, BLOCKSIZE: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Returns b_acc + left · W' of one tile. This is the main loop of the GEMM."""
    ROWS: tl.constexpr = BLOCK_OUT if TRANSPOSED else BLOCK_IN
    COLUMNS: tl.constexpr = BLOCK_IN if TRANSPOSED else BLOCK_OUT
    b_code = tl.zeros([ROWS, 16], dtype=tl.float32) + tl.load(code + tl.arange(0, 16))[None, :]
    for o_in in range(0, d_in, BLOCK_IN):
        i_in = o_in + tl.arange(0, BLOCK_IN)
        m_in = i_in < d_in
        if TMA:
            b_left = left.load([o_t, o_in])
        else:
            p_left = left + i_t[:, None] * stride_left + i_in[None, :]
            b_left = tl.load(p_left, mask=m_t[:, None] & m_in[None, :], other=0.0)  # [BLOCK_T, BLOCK_IN]
        if TRANSPOSED:
            b_weight = load_dequantised(
                packed, absmax, b_code, i_out, o_in, m_out, row_bytes, dtype, BLOCKSIZE, ROWS, COLUMNS
            ).T
        else:
            b_weight = load_dequantised(
                packed, absmax, b_code, i_in.to(tl.int64), o_out, m_in, row_bytes, dtype, BLOCKSIZE, ROWS, COLUMNS
            )
        b_acc = dot(b_left, b_weight, b_acc, PRECISION)
    return b_acc


@triton.jit(do_not_specialize=["seed", "in_memory", "drop_level", "n_tokens"])
def lora_four_bit_kernel(
    left, result, packed, absmax, code, bias, thin, factor,
    scaling, seed: tl.int64, in_memory: tl.int32, drop_level: tl.int32,
    n_tokens, d_out, d_in, stride_left, row_bytes, stride_factor,
    R: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes the result tile by tile. If TRANSPOSED, W is (d_out, d_in) and factor (d_out, r), else W is (d_in,
    d_out). With TMA left and result are descriptors, and a block of result has BLOCK_OUT // 2 columns."""
    dtype: tl.constexpr = left.dtype if TMA else left.dtype.element_ty
    n_tiles_t, n_tiles_out = tl.cdiv(n_tokens, BLOCK_T), tl.cdiv(d_out, BLOCK_OUT)
    for tile in tl.range(tl.program_id(0), n_tiles_t * n_tiles_out, tl.num_programs(0), disable_licm=True):
        o_t, o_out = place_of(tile, n_tiles_t, n_tiles_out, BLOCK_T, BLOCK_OUT, GROUP)
        i_t = o_t.to(tl.int64) + tl.arange(0, BLOCK_T)
        i_out = o_out.to(tl.int64) + tl.arange(0, BLOCK_OUT)
        m_t, m_out = i_t < n_tokens, i_out < d_out
        b_acc = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)
        for o_r in tl.range(0, R, BLOCK_R, num_stages=1):
            i_r = o_r + tl.arange(0, BLOCK_R)
            b_thin = load_thin(thin, i_t, i_r, m_t, i_r < R, n_tokens, 1, R, False)
            b_factor = load_factor(factor, i_r, i_out, i_r < R, m_out, stride_factor, TRANSPOSED)
            b_acc = dot_rounded(b_thin, b_factor, b_acc, dtype, PRECISION)
        if TRANSPOSED:
            b_acc *= scaling
        if DROPOUT:
            b_acc = drop(b_acc, keep_mask(seed, in_memory, drop_level, i_t, o_out, BLOCK_OUT))
        if HAS_BIAS:
            b_acc += tl.load(bias + i_out, mask=m_out, other=0.0).to(tl.float32)[None, :]
        b_acc = add_dequantised_products(
            left, packed, absmax, code, b_acc,
            o_t, o_out, i_t, i_out, m_t, m_out,
            d_in, stride_left, row_bytes,
            dtype, BLOCKSIZE, TRANSPOSED, TMA, PRECISION, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        store_tile(result, b_acc, o_t, o_out, i_t, i_out, m_t, m_out, d_out, dtype, TMA, BLOCK_T, BLOCK_OUT)


class Absmax:
    """Computes the float32 absmax of weights with double quantisation, for one signature."""

    def __init__(self, quantised: Tensor, blocksize: int):
        n = quantised.numel()
        self.empty = allocator((n,), torch.float32, quantised.device)
        self.launch = Launch(
            lora_absmax_kernel, (triton.cdiv(n, BLOCK),), (n,),
            {"BLOCKSIZE": blocksize, "BLOCK": BLOCK, "num_warps": 4},
        )  # fmt: skip

    def __call__(self, quantised: Tensor, nested: NestedScales, stream: int | None = None) -> Tensor:
        absmax = self.empty()
        self.launch.go(stream, (quantised, nested.code, nested.absmax, nested.offset, absmax), ())
        return absmax


class FourBitGemm:
    """The GEMM for one signature.

    Args:
        transposed: computes left · Wᵀ + … if true, else left · W + ….
        shape: the result's shape, with any leading dimensions.
    """

    def __init__(
        self, left: Tensor, weight: FourBit, bias: Tensor | None, factor: Tensor, r: int, dropout: bool,
        transposed: bool, shape: tuple[int, ...],
    ):  # fmt: skip
        (n_tokens, d_in), d_out, columns = left.shape, shape[-1], weight.shape[1]
        tma = tiles.uses_tma(left, left, d_out)  # the packed weight is never loaded by TMA
        tile = tiles.four_bit(left, d_out, r, transposed, tma, dropout)
        matrices = (
            Matrix((n_tokens, d_in), left.stride(), (tile.t, tile.inner)),
            Matrix((n_tokens, d_out), (d_out, 1), (tile.t, tile.outer // 2)),
        )
        n_tiles = triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_out, tile.outer)
        flags = {"R": r, "TRANSPOSED": transposed, "HAS_BIAS": bias is not None, "DROPOUT": dropout, "TMA": tma}
        flags |= {"PRECISION": precision(left), "BLOCKSIZE": weight.blocksize, "GROUP": tiles.GROUP}
        self.absmax = None if weight.nested is None else Absmax(weight.absmax, weight.nested.blocksize)
        self.empty = allocator(shape, left.dtype, left.device)
        self.launch = Launch(
            lora_four_bit_kernel, (min(n_tiles, tiles.programs(left.device)),),
            (n_tokens, d_out, d_in, left.stride(0), columns // 2, factor.stride(0)),
            {**flags, **tile.options()}, matrices if tma else (),
        )  # fmt: skip

    def __call__(
        self, left: Tensor, weight: FourBit, bias: Tensor | None, thin: Tensor, factor: Tensor, scaling: float,
        keep: DropoutMask | None, stream: int | None = None,
    ) -> Tensor:  # fmt: skip
        absmax = self.absmax(weight.absmax, weight.nested, stream) if self.absmax else weight.absmax
        packed = weight.packed if weight.packed.dtype is torch.uint8 else weight.packed.view(torch.uint8)
        result = self.empty()
        tensors = left, result, packed, absmax, weight.code, left if bias is None else bias, thin, factor
        self.launch.go(stream, tensors, (scaling, *(keep or NO_MASK)))
        return result


def four_bit_linear(
    x: Tensor, weight: FourBit, bias: Tensor | None, s: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:  # fmt: skip
    """Returns y (..., d_out) = x Wᵀ + bias + scaling · S bᵀ in x's dtype, for x (..., d_in), S (n_tokens, r) and lora_B
    (d_out, r). ``takes(x, weight)`` must hold; the bias has x's dtype."""
    return _gemm(x, weight, bias, s, lora_B, scaling, None, transposed=True)


def four_bit_grad_x(
    dy: Tensor, weight: FourBit, ds: Tensor, lora_A: Tensor, keep: DropoutMask | None = None
) -> Tensor:  # fmt: skip
    """Returns dx (..., d_in) = dy W + keep∘(dS a) in dy's dtype, for dy (..., d_out), dS (n_tokens, r) and lora_A (r,
    d_in). ``takes(dy, weight)`` must hold."""
    return _gemm(dy, weight, None, ds, lora_A, 1.0, keep, transposed=False)


def _gemm(left, weight, bias, thin, factor, scaling, keep, transposed) -> Tensor:
    shape = *left.shape[:-1], weight.shape[0 if transposed else 1]
    left, thin, factor = signature.flat(left), thin.contiguous(), contiguous_rows(factor)
    bias = bias if bias is None else bias.contiguous()
    if left.numel() == 0 or shape[-1] == 0:  # a grid must not be empty
        return left.new_zeros(shape) if bias is None else left.new_zeros(shape) + bias
    arguments = left, weight, bias, factor, thin.shape[1], keep is not None, transposed, shape
    with on_device(left):
        if by_jit():
            return FourBitGemm(*arguments)(left, weight, bias, thin, factor, float(scaling), keep)
        key = _key(*arguments, thin)
        plan = signature.plans.get(key) or signature.keep(key, FourBitGemm(*arguments), left)
        return plan(left, weight, bias, thin, factor, float(scaling), keep, device.stream(left))


def _key(left, weight, bias, factor, r, dropout, transposed, shape, thin) -> tuple:
    """Returns the signature of a call, on which its plan depends."""
    nested = () if weight.nested is None else weight.nested[:3]
    tensors = left, weight.packed, weight.absmax, weight.code, thin, factor, *nested, *(() if bias is None else (bias,))
    return (
        "four_bit", left.shape, left.stride(0), left.dtype, device.index(left), weight.blocksize, weight.shape,
        weight.nested is None or weight.nested.blocksize, bias is None or bias.dtype, thin.dtype, factor.dtype,
        factor.stride(0), r, dropout, transposed, shape, alignments(tensors), signature.settings(left),
    )  # fmt: skip
