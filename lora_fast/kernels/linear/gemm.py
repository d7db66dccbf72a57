"""The GEMM with the adapter in it: y = x Wᵀ + scaling S bᵀ + bias, and dx = dy W + keep∘(dS a).

Math      result = left · W' + keep∘(thin · factor) + bias in both directions, with W' = Wᵀ, thin = S, factor =
          scaling bᵀ forward and W' = W, thin = dS, factor = a backward.
Strategy  "fused": one persistent Triton GEMM (TMA descriptors from sm_90 on, pointers before). The accumulator starts
          from the thin product, so the result is written once and rounded once.
          "cublas": cuBLAS computes left · W' + bias, then ``lora_update_kernel`` reads it and writes the sum to a new
          tensor. The update is not in place, because activation checkpointing may have saved cuBLAS's product and torch
          does not see our kernel change it. For few tokens the update also adds the partial sums of S.
          "gluon": the fused form for sm_90, warp-specialised (gluon_gemm.py).
          ``strategies.py`` chooses. The second rounding of "cublas" is within the error budget.
Grid      fused: one program per multiprocessor walks tiles of the result, tokens fastest within a group of rows, so
          that neighbouring programs share W in L2. update: one program per tile.
Carve-out While a collective of NCCL holds multiprocessors, programs without one start only after others have finished
          all their tiles, so the GEMM takes up to twice its time. ``torch._C._set_sm_carveout_experimental(n)``, which
          torch's own matmuls read, too, leaves out n programs from the next call on. The result has the same bits.
          Tiles dealt out by an atomic counter would need no setting, but a counter that is zeroed before each launch,
          a wait for it at each tile, and in Gluon one more barrier that hands its value to three partitions. cuBLAS
          under FSDP would write the result twice at all times, also where no collective runs.
Shapes    left (n_tokens, d_in), W (d_out, d_in) or (d_in, d_out) as stored, thin (n_tokens, r), result
          (n_tokens, d_out) in left's dtype. In both directions d_in is the summed dimension and d_out the result's
          columns. thin and factor may be float32 beside 16 bits (``primitives.dot_rounded``).
Pipeline  The loop over tiles is not flattened into the loop over d_in. If it were, Triton's pipeliner would keep no
          product in flight, because the accumulator starts from a product (inspection/rules.py checks that the compiled
          loop keeps one in flight). A TMA result is stored in halves, which leaves shared memory for three stages.
Roofline  2·n_tokens·d_in·d_out operations: compute bound; the thin product adds r/d_in of them.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .. import tiles
from ..launch import NO_MASK, DropoutMask, Launch, Matrix, allocator, contiguous_rows, on_device, precision
from ..primitives import dot, dot_rounded, drop, keep_mask, round_to
from . import strategies


@triton.jit
def load_thin(thin, i_t, i_r, m_t, m_r, n_tokens, n_parts, R: tl.constexpr, PARTS: tl.constexpr):
    """Loads columns i_r of S or dS: [BLOCK_T, BLOCK_R]. With PARTS thin holds partial sums (n_parts, n_tokens, r),
    which are added in order."""
    p_thin = thin + i_t[:, None] * R + i_r[None, :]
    mask = m_t[:, None] & m_r[None, :]
    b_thin = tl.load(p_thin, mask=mask, other=0.0)
    if PARTS:
        for _ in range(1, n_parts):
            p_thin += n_tokens.to(tl.int64) * R
            b_thin += tl.load(p_thin, mask=mask, other=0.0)
    return b_thin


@triton.jit
def load_factor(factor, i_r, i_out, m_r, m_out, stride_factor, TRANSPOSED: tl.constexpr):
    """Loads rows i_r of the factor: [BLOCK_R, BLOCK_OUT]. The factor is b (d_out, r) if TRANSPOSED, else a (r,
    d_out)."""
    if TRANSPOSED:
        p_factor = factor + i_out[None, :] * stride_factor + i_r[:, None]
    else:
        p_factor = factor + i_r[:, None].to(tl.int64) * stride_factor + i_out[None, :]
    return tl.load(p_factor, mask=m_r[:, None] & m_out[None, :], other=0.0)


@triton.jit
def place_of(tile, n_tiles_t, n_tiles_out, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, GROUP: tl.constexpr):
    """Returns the first row and column of a tile of the result."""
    group = tile // (GROUP * n_tiles_out)
    group_rows = tl.minimum(n_tiles_t - group * GROUP, GROUP)
    within = tile % (GROUP * n_tiles_out)
    return (group * GROUP + within % group_rows) * BLOCK_T, (within // group_rows) * BLOCK_OUT


@triton.jit
def add_products(
    left, weight, b_acc,
    o_t, o_out, i_t, i_out, m_t, m_out,
    d_in, stride_left, stride_weight,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Returns b_acc + left · W' of one tile, by descriptors if TMA. This is the main loop of the GEMM."""
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
    return b_acc


@triton.jit
def store_tile(
    result, b_acc,
    o_t, o_out, i_t, i_out, m_t, m_out,
    stride_result,
    dtype: tl.constexpr, TMA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the result, rounded. A TMA result is stored in halves of the columns."""
    if TMA:
        # split takes the last dimension, so the left and right half of the columns are moved there.
        low, high = tl.split(tl.permute(tl.reshape(b_acc, (BLOCK_T, 2, BLOCK_OUT // 2)), (0, 2, 1)))
        result.store([o_t, o_out], round_to(low, dtype))
        result.store([o_t, o_out + BLOCK_OUT // 2], round_to(high, dtype))
    else:
        p_result = result + i_t[:, None] * stride_result + i_out[None, :]
        tl.store(p_result, round_to(b_acc, dtype), mask=m_t[:, None] & m_out[None, :])


@triton.jit
def linear_tile(
    left, weight, result, bias, thin, factor,
    scaling, seed, in_memory, drop_level,
    tile, n_tokens, d_out, d_in, stride_left, stride_weight, stride_result, stride_factor,
    R: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the result."""
    dtype: tl.constexpr = left.dtype if TMA else left.dtype.element_ty
    o_t, o_out = place_of(tile, tl.cdiv(n_tokens, BLOCK_T), tl.cdiv(d_out, BLOCK_OUT), BLOCK_T, BLOCK_OUT, GROUP)
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
    b_acc = add_products(
        left, weight, b_acc,
        o_t, o_out, i_t, i_out, m_t, m_out,
        d_in, stride_left, stride_weight,
        TRANSPOSED, TMA, PRECISION, BLOCK_IN,
    )  # fmt: skip
    store_tile(result, b_acc, o_t, o_out, i_t, i_out, m_t, m_out, stride_result, dtype, TMA, BLOCK_T, BLOCK_OUT)


@triton.jit(do_not_specialize=["seed", "in_memory", "drop_level", "n_tokens"])
def lora_linear_kernel(
    left, weight, result, bias, thin, factor,
    scaling, seed: tl.int64, in_memory: tl.int32, drop_level: tl.int32,
    n_tokens, d_out, d_in, stride_left, stride_weight, stride_result, stride_factor,
    R: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes the result tile by tile. If TRANSPOSED, weight is (d_out, d_in) and factor (d_out, r). With TMA left,
    weight and result are descriptors, and a block of result has BLOCK_OUT // 2 columns."""
    n_tiles = tl.cdiv(n_tokens, BLOCK_T) * tl.cdiv(d_out, BLOCK_OUT)
    # disable_licm: values that do not depend on the tile are recomputed for each, because keeping them in registers
    # over the main loop would spill.
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), disable_licm=True):
        linear_tile(
            left, weight, result, bias, thin, factor,
            scaling, seed, in_memory, drop_level,
            tile, n_tokens, d_out, d_in, stride_left, stride_weight, stride_result, stride_factor,
            R, TRANSPOSED, HAS_BIAS, DROPOUT, TMA, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_IN, BLOCK_R, GROUP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["seed", "in_memory", "drop_level", "n_tokens", "n_parts"])
def lora_update_kernel(
    base, result, thin, factor, s,
    scaling, seed: tl.int64, in_memory: tl.int32, drop_level: tl.int32,
    n_tokens, d_out, n_parts, stride_result, stride_factor,
    R: tl.constexpr, TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores result = base + keep∘(thin · factor), for a base and a result of one stride. With PARTS thin holds partial
    sums of S, and S is written to s."""
    dtype: tl.constexpr = result.dtype.element_ty
    n_tiles_out = tl.cdiv(d_out, BLOCK_OUT)
    i_tile_out = tl.program_id(0) % n_tiles_out
    o_out = i_tile_out * BLOCK_OUT
    i_t = (tl.program_id(0) // n_tiles_out).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_out = o_out.to(tl.int64) + tl.arange(0, BLOCK_OUT)
    m_t, m_out = i_t < n_tokens, i_out < d_out
    b_acc = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)
    for o_r in tl.range(0, R, BLOCK_R, num_stages=1):
        i_r = o_r + tl.arange(0, BLOCK_R)
        b_thin = load_thin(thin, i_t, i_r, m_t, i_r < R, n_tokens, n_parts, R, PARTS)
        if PARTS:
            p_s = s + i_t[:, None] * R + i_r[None, :]
            m_s = m_t[:, None] & (i_r < R)[None, :] & (i_tile_out == 0)  # one program for each block of tokens
            tl.store(p_s, round_to(b_thin, s.dtype.element_ty), mask=m_s)
        b_factor = load_factor(factor, i_r, i_out, i_r < R, m_out, stride_factor, TRANSPOSED)
        b_acc = dot_rounded(b_thin, b_factor, b_acc, dtype, PRECISION)
    if TRANSPOSED:
        b_acc *= scaling
    if DROPOUT:
        b_acc = drop(b_acc, keep_mask(seed, in_memory, drop_level, i_t, o_out, BLOCK_OUT))
    o_result = i_t[:, None] * stride_result + i_out[None, :]
    mask = m_t[:, None] & m_out[None, :]
    b_acc += tl.load(base + o_result, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + o_result, round_to(b_acc, dtype), mask=mask)


class FusedGemm:
    """The strategy "fused" for one signature.

    Args:
        transposed: computes left · weightᵀ + … if true, else left · weight + ….
        shape: the result's shape, with any leading dimensions.
    """

    def __init__(self, left, weight, bias, factor, r: int, dropout: bool, transposed: bool, shape: tuple[int, ...]):
        (n_tokens, d_in), d_out = left.shape, shape[-1]
        tma = tiles.uses_tma(left, weight, d_out)
        tile = tiles.linear(left, d_out, r, transposed, tma, dropout)
        weight_block = (tile.outer, tile.inner) if transposed else (tile.inner, tile.outer)
        matrices = (
            Matrix((n_tokens, d_in), left.stride(), (tile.t, tile.inner)),
            Matrix(tuple(weight.shape), weight.stride(), weight_block),
            Matrix((n_tokens, d_out), (d_out, 1), (tile.t, tile.outer // 2)),
        )
        n_tiles = triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_out, tile.outer)
        flags = {"R": r, "TRANSPOSED": transposed, "HAS_BIAS": bias is not None, "DROPOUT": dropout, "TMA": tma}
        self.empty = allocator(shape, left.dtype, left.device)
        self.launch = Launch(
            lora_linear_kernel, (min(n_tiles, tiles.programs(left.device)),),
            (n_tokens, d_out, d_in, left.stride(0), weight.stride(0), d_out, factor.stride(0)),
            {**flags, "PRECISION": precision(left), "GROUP": tiles.GROUP, **tile.options()},
            matrices if tma else (),
        )  # fmt: skip

    def __call__(
        self, left, weight, bias, thin, factor, scaling: float, keep: DropoutMask | None, stream: int | None = None
    ):
        result = self.empty()
        tensors = left, weight, result, left if bias is None else bias, thin, factor  # left stands in for no bias
        self.launch.go(stream, tensors, (scaling, *(keep or NO_MASK)))
        return result


class Update:
    """Adds the thin product to a matrix that cuBLAS or another library has multiplied, for one signature. If
    ``n_parts`` is not 0, thin holds that many partial sums of S, and a call writes their sum to ``s``."""

    def __init__(self, left, factor, r: int, dropout: bool, transposed: bool, d_out: int, n_parts: int = 0):
        n_tokens = len(left)
        tile = tiles.update(left, r, n_parts > 0)
        flags = {"R": r, "TRANSPOSED": transposed, "DROPOUT": dropout, "PARTS": n_parts > 0}
        self.launch = Launch(
            lora_update_kernel, (triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_out, tile.outer),),
            (n_tokens, d_out, n_parts, d_out, factor.stride(0)),
            {**flags, "PRECISION": precision(left), **tile.options()},
        )  # fmt: skip

    def __call__(
        self, base, result, thin, factor, scaling: float, keep: DropoutMask | None, stream: int | None = None, s=None
    ) -> None:
        """Stores base + keep∘(scaling · thin · factor) in ``result``, which may be ``base``."""
        tensors = base, result, thin, factor, result if s is None else s
        self.launch.go(stream, tensors, (scaling, *(keep or NO_MASK)))


class CublasGemm:
    """The strategy "cublas" for one signature. ``n_parts``: as in ``Update``."""

    def __init__(
        self, left, weight, bias, factor, r: int, dropout: bool, transposed: bool, shape: tuple[int, ...],
        n_parts: int = 0,
    ):  # fmt: skip
        self.transposed = transposed
        self.empty = allocator(shape, left.dtype, left.device)
        self.update = Update(left, factor, r, dropout, transposed, shape[-1], n_parts)

    def __call__(
        self,
        left,
        weight,
        bias,
        thin,
        factor,
        scaling: float,
        keep: DropoutMask | None,
        stream: int | None = None,
        s=None,
    ):
        base = F.linear(left, weight, bias) if self.transposed else torch.matmul(left, weight)
        result = self.empty()
        self.update(base, result, thin, factor, scaling, keep, stream, s)
        return result


def gemm_class(strategy: str) -> type:
    """Returns the class of a strategy."""
    if strategy == "gluon":
        from .gluon_gemm import GluonGemm

        return GluonGemm
    return {"fused": FusedGemm, "cublas": CublasGemm}[strategy]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Returns y (n_tokens, d_out) = x Wᵀ + bias + scaling · S bᵀ in x's dtype. Twin: ``reference.linear.linear``."""
    return _gemm(x, weight, bias, s, lora_B, scaling, None, transposed=True)


def grad_x(
    dy: torch.Tensor, weight: torch.Tensor, ds: torch.Tensor, lora_A: torch.Tensor, keep: DropoutMask | None = None
) -> torch.Tensor:
    """Returns dx (n_tokens, d_in) = dy W + keep∘(dS a) in dy's dtype. Twin: ``reference.linear.grad_x``."""
    return _gemm(dy, weight, None, ds, lora_A, 1.0, keep, transposed=False)


def _gemm(left, weight, bias, thin, factor, scaling, keep, transposed) -> torch.Tensor:
    left, factor, r = contiguous_rows(left), contiguous_rows(factor), thin.shape[1]
    d_out = weight.shape[0 if transposed else 1]
    if len(left) == 0 or d_out == 0:
        return torch.empty((len(left), d_out), dtype=left.dtype, device=left.device)
    direction = "forward" if transposed else "backward"
    strategy = strategies.strategy(direction, left, weight, factor.dtype, r, keep is not None)
    weight = weight if strategy == "cublas" else contiguous_rows(weight)  # cuBLAS takes any strides
    with on_device(left):
        shape = len(left), d_out
        gemm = gemm_class(strategy)(left, weight, bias, factor, r, keep is not None, transposed, shape)
        return gemm(left, weight, bias, thin, factor, float(scaling), keep)
