"""y of several layers that read the same x, in one launch: y_m = x W_mᵀ + scaling_m S_m b_mᵀ + bias_m.

Strategy  "fused" alone: the persistent GEMM of gemm.py walks the tiles of one member after the other, so that members
          with few columns (k and v of grouped queries) share a wave with the others. With cuBLAS, and in Gluon, each
          member has launches of its own. ``strategies.group_strategy`` chooses.
Grid      as in gemm.py
Shapes    x (n_tokens, d_in), W_m (d_out_m, d_in), S_m (n_tokens, r_m), b_m (d_out_m, r_m), y_m (n_tokens, d_out_m) in
          x's dtype. Members may differ in d_out, rank, bias and scaling, and share the dtypes of S and of b.
Roofline  2·n_tokens·d_in·Σ d_out_m operations: compute bound.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .. import tiles
from ..launch import Launch, Matrix, allocator, precision
from .gemm import linear_tile
from .group import filled, picker, places_of, rank_flags


@triton.jit(do_not_specialize=["n_tokens"])
def lora_group_linear_kernel(
    x, weight0, weight1, weight2, weight3, y0, y1, y2, y3, bias0, bias1, bias2, bias3, s0, s1, s2, s3, b0, b1, b2, b3,
    scaling0, scaling1, scaling2, scaling3,
    n_tokens, d_in, stride_x, d_out0, d_out1, d_out2, d_out3,
    stride_weight0, stride_weight1, stride_weight2, stride_weight3, stride_b0, stride_b1, stride_b2, stride_b3,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, BIAS0: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, BIAS3: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes every y tile by tile. With TMA x, each weight and each y are descriptors, as in lora_linear_kernel. The
    conditions stand beside each other: nested, those of four members would not share their shared memory."""
    n_tiles_t = tl.cdiv(n_tokens, BLOCK_T)
    end0 = n_tiles_t * tl.cdiv(d_out0, BLOCK_OUT)
    end1 = end0 + n_tiles_t * tl.cdiv(d_out1, BLOCK_OUT)
    end2 = end1 + n_tiles_t * tl.cdiv(d_out2, BLOCK_OUT) * (R2 > 0)
    end3 = end2 + n_tiles_t * tl.cdiv(d_out3, BLOCK_OUT) * (R3 > 0)
    for tile in tl.range(tl.program_id(0), end3, tl.num_programs(0), disable_licm=True):
        if tile < end0:
            linear_tile(
                x, weight0, y0, bias0, s0, b0, scaling0, 0, 0, 0,
                tile, n_tokens, d_out0, d_in, stride_x, stride_weight0, d_out0, stride_b0,
                R0, True, BIAS0, False, TMA, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_IN, BLOCK_R, GROUP,
            )  # fmt: skip
        if (tile >= end0) & (tile < end1):
            linear_tile(
                x, weight1, y1, bias1, s1, b1, scaling1, 0, 0, 0,
                tile - end0, n_tokens, d_out1, d_in, stride_x, stride_weight1, d_out1, stride_b1,
                R1, True, BIAS1, False, TMA, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_IN, BLOCK_R, GROUP,
            )  # fmt: skip
        if R2 > 0:  # noqa: SIM102  # known when it is compiled, unlike the next condition
            if (tile >= end1) & (tile < end2):
                linear_tile(
                    x, weight2, y2, bias2, s2, b2, scaling2, 0, 0, 0,
                    tile - end1, n_tokens, d_out2, d_in, stride_x, stride_weight2, d_out2, stride_b2,
                    R2, True, BIAS2, False, TMA, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_IN, BLOCK_R, GROUP,
                )  # fmt: skip
        if R3 > 0:  # noqa: SIM102
            if tile >= end2:
                linear_tile(
                    x, weight3, y3, bias3, s3, b3, scaling3, 0, 0, 0,
                    tile - end2, n_tokens, d_out3, d_in, stride_x, stride_weight3, d_out3, stride_b3,
                    R3, True, BIAS3, False, TMA, PRECISION, BLOCK_T, BLOCK_OUT, BLOCK_IN, BLOCK_R, GROUP,
                )  # fmt: skip


class FusedGroupLinear:
    """Computes y of two to four members for one signature. ``members``: as arguments of ``group_forward``. ``where``:
    their places in the sequences of a call, which are all of them by default."""

    def __init__(
        self, x: torch.Tensor, members: Sequence[tuple], shapes: Sequence[tuple[int, ...]],
        where: Sequence[int] | None = None,
    ):  # fmt: skip
        weights, biases, _, factors, *_ = zip(*members, strict=True)
        (n_tokens, d_in), ranks, d_outs = x.shape, [b.shape[1] for b in factors], [len(weight) for weight in weights]
        tma = all([tiles.uses_tma(x, weight, len(weight)) for weight in weights])
        tile = tiles.group_linear(x, ranks, tma)
        of_weights = [Matrix(tuple(w.shape), w.stride(), (tile.outer, tile.inner)) for w in filled(weights)]
        of_ys = [Matrix((n_tokens, d), (d, 1), (tile.t, tile.outer // 2)) for d in filled(d_outs)]
        matrices = Matrix((n_tokens, d_in), x.stride(), (tile.t, tile.inner)), *of_weights, *of_ys
        n_tiles = triton.cdiv(n_tokens, tile.t) * sum(triton.cdiv(d_out, tile.outer) for d_out in d_outs)
        self.has_bias, n = any(bias is not None for bias in biases), len(members)
        self.pick, runs = picker(where, n), places_of(1, n, n, n * self.has_bias, n, n)
        x_place, of_w, of_y, of_bias, of_s, of_b = runs
        places = 0, *of_w, *of_y, *(of_bias or x_place), *of_s, *of_b  # x stands in for a bias that is missing
        biased = {f"BIAS{i}": bias is not None for i, bias in enumerate(filled(biases))}
        flags = {**rank_flags(ranks), **biased, "TMA": tma, "PRECISION": precision(x), "GROUP": tiles.GROUP}
        self.empty = [allocator(shape, x.dtype, x.device) for shape in shapes]
        strides = [filled([tensor.stride(0) for tensor in tensors]) for tensors in (weights, factors)]
        self.launch = Launch(
            lora_group_linear_kernel, (min(n_tiles, tiles.programs(x.device)),),
            (n_tokens, d_in, x.stride(0), *filled(d_outs), *strides[0], *strides[1]),
            {**flags, **tile.options()}, matrices if tma else (), places,
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, weights, biases, factors, scalings, ss, stream: int | None = None) -> list:
        ys, pick = [empty() for empty in self.empty], self.pick
        biases = pick(biases) if self.has_bias else ()
        tensors = x, *pick(weights), *ys, *[x if bias is None else bias for bias in biases], *pick(ss), *pick(factors)
        self.launch.go(stream, tensors, filled(pick(scalings)))
        return ys
