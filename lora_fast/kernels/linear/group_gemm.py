"""dx of several layers that read the same x, written once: dx = Σ_m (dy_m W_m + keep_m∘(dS_m a_m)).

Strategy  "fused": one persistent Triton GEMM walks the contractions of all members. The accumulator starts from the
          sum of the thin products, so dx is written once and rounded once (gemm.py has the parts and the reasons).
          "cublas": cuBLAS computes dy_0 W_0 and adds the other products to it; ``lora_group_update_kernel`` adds all
          thin products in one launch and writes another tensor. Each product after the first, and the update, read
          and round dx once more.
          ``strategies.group_strategy`` chooses. There is no form in Gluon.
Grid      as in gemm.py
Shapes    dy_m (n_tokens, d_out_m), W_m (d_out_m, d_in), dS_m (n_tokens, r_m), a_m (r_m, d_in), dx (n_tokens, d_in) in
          dy's dtype. Members may differ in d_out, rank and the dtypes of a and dS.
Dropout   Every thin product has its member's mask, so it has an accumulator of its own before it is masked: tiles are
          smaller.
Roofline  2·n_tokens·d_in·Σ d_out_m operations: compute bound. Against one dx a member and their sum, dx is written
          once instead of m times, and read and written by m − 1 sums no more.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import tiles
from ..launch import NO_MASK, DropoutMask, Launch, Matrix, allocator, precision
from ..primitives import dot_rounded, drop, keep_mask, round_to
from .gemm import add_products, load_factor, load_thin, place_of, store_tile
from .group import MEMBERS, filled, picker, places_of, rank_flags

NO_MASKS = NO_MASK * MEMBERS


class Part(NamedTuple):
    """A part is what one member adds to dx. A plan is made without dS."""

    dy: torch.Tensor
    weight: torch.Tensor
    ds: torch.Tensor | None
    lora_A: torch.Tensor
    keep: DropoutMask | None


@triton.jit
def add_thin(
    b_acc, ds, a,
    seed, in_memory, drop_level,
    i_t, i_out, o_out, m_t, m_out, n_tokens, stride_a,
    R: tl.constexpr, DROPOUT: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Returns b_acc + keep∘(dS a) of one tile and one member."""
    b_thin = tl.zeros_like(b_acc) if DROPOUT else b_acc
    for o_r in tl.range(0, R, BLOCK_R, num_stages=1):
        i_r = o_r + tl.arange(0, BLOCK_R)
        b_ds = load_thin(ds, i_t, i_r, m_t, i_r < R, n_tokens, 1, R, False)
        b_a = load_factor(a, i_r, i_out, i_r < R, m_out, stride_a, False)
        b_thin = dot_rounded(b_ds, b_a, b_thin, dtype, PRECISION)
    if DROPOUT:
        b_thin = b_acc + drop(b_thin, keep_mask(seed, in_memory, drop_level, i_t, o_out, BLOCK_OUT))
    return b_thin


@triton.jit
def add_all_thin(
    b_acc, ds0, ds1, ds2, ds3, a0, a1, a2, a3,
    seed0, in_memory0, level0, seed1, in_memory1, level1, seed2, in_memory2, level2, seed3, in_memory3, level3,
    i_t, i_out, o_out, m_t, m_out, n_tokens, stride_a0, stride_a1, stride_a2, stride_a3,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, DROPOUT: tl.constexpr, dtype: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Returns b_acc + Σ_m keep_m∘(dS_m a_m) of one tile, members in order."""
    b_acc = add_thin(
        b_acc, ds0, a0, seed0, in_memory0, level0, i_t, i_out, o_out, m_t, m_out, n_tokens, stride_a0,
        R0, DROPOUT, dtype, PRECISION, BLOCK_OUT, BLOCK_R,
    )  # fmt: skip
    b_acc = add_thin(
        b_acc, ds1, a1, seed1, in_memory1, level1, i_t, i_out, o_out, m_t, m_out, n_tokens, stride_a1,
        R1, DROPOUT, dtype, PRECISION, BLOCK_OUT, BLOCK_R,
    )  # fmt: skip
    if R2 > 0:
        b_acc = add_thin(
            b_acc, ds2, a2, seed2, in_memory2, level2, i_t, i_out, o_out, m_t, m_out, n_tokens, stride_a2,
            R2, DROPOUT, dtype, PRECISION, BLOCK_OUT, BLOCK_R,
        )  # fmt: skip
    if R3 > 0:
        b_acc = add_thin(
            b_acc, ds3, a3, seed3, in_memory3, level3, i_t, i_out, o_out, m_t, m_out, n_tokens, stride_a3,
            R3, DROPOUT, dtype, PRECISION, BLOCK_OUT, BLOCK_R,
        )  # fmt: skip
    return b_acc


_SEEDS = [f"{name}{i}" for i in range(MEMBERS) for name in ("seed", "in_memory", "level")]


@triton.jit(do_not_specialize=[*_SEEDS, "n_tokens"])
def lora_group_grad_x_kernel(
    dy0, dy1, dy2, dy3, weight0, weight1, weight2, weight3, dx, ds0, ds1, ds2, ds3, a0, a1, a2, a3,
    seed0: tl.int64, in_memory0: tl.int32, level0: tl.int32, seed1: tl.int64, in_memory1: tl.int32, level1: tl.int32,
    seed2: tl.int64, in_memory2: tl.int32, level2: tl.int32, seed3: tl.int64, in_memory3: tl.int32, level3: tl.int32,
    n_tokens, d_in, d_out0, d_out1, d_out2, d_out3, stride_dy0, stride_dy1, stride_dy2, stride_dy3,
    stride_weight0, stride_weight1, stride_weight2, stride_weight3, stride_a0, stride_a1, stride_a2, stride_a3,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes dx tile by tile. With TMA each dy, each weight and dx are descriptors, and a block of dx has BLOCK_OUT
    // 2 columns. As in gemm.py, OUT is the result's dimension, here d_in, and IN the summed one, here d_out."""
    dtype: tl.constexpr = dy0.dtype if TMA else dy0.dtype.element_ty
    n_tiles_t, n_tiles_out = tl.cdiv(n_tokens, BLOCK_T), tl.cdiv(d_in, BLOCK_OUT)
    for tile in tl.range(tl.program_id(0), n_tiles_t * n_tiles_out, tl.num_programs(0), disable_licm=True):
        o_t, o_out = place_of(tile, n_tiles_t, n_tiles_out, BLOCK_T, BLOCK_OUT, GROUP)
        i_t = o_t.to(tl.int64) + tl.arange(0, BLOCK_T)
        i_out = o_out.to(tl.int64) + tl.arange(0, BLOCK_OUT)
        m_t, m_out = i_t < n_tokens, i_out < d_in
        b_acc = add_all_thin(
            tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32), ds0, ds1, ds2, ds3, a0, a1, a2, a3,
            seed0, in_memory0, level0, seed1, in_memory1, level1, seed2, in_memory2, level2, seed3, in_memory3, level3,
            i_t, i_out, o_out, m_t, m_out, n_tokens, stride_a0, stride_a1, stride_a2, stride_a3,
            R0, R1, R2, R3, DROPOUT, dtype, PRECISION, BLOCK_OUT, BLOCK_R,
        )  # fmt: skip
        b_acc = add_products(
            dy0, weight0, b_acc, o_t, o_out, i_t, i_out, m_t, m_out, d_out0, stride_dy0, stride_weight0,
            False, TMA, PRECISION, BLOCK_IN,
        )  # fmt: skip
        b_acc = add_products(
            dy1, weight1, b_acc, o_t, o_out, i_t, i_out, m_t, m_out, d_out1, stride_dy1, stride_weight1,
            False, TMA, PRECISION, BLOCK_IN,
        )  # fmt: skip
        if R2 > 0:
            b_acc = add_products(
                dy2, weight2, b_acc, o_t, o_out, i_t, i_out, m_t, m_out, d_out2, stride_dy2, stride_weight2,
                False, TMA, PRECISION, BLOCK_IN,
            )  # fmt: skip
        if R3 > 0:
            b_acc = add_products(
                dy3, weight3, b_acc, o_t, o_out, i_t, i_out, m_t, m_out, d_out3, stride_dy3, stride_weight3,
                False, TMA, PRECISION, BLOCK_IN,
            )  # fmt: skip
        store_tile(dx, b_acc, o_t, o_out, i_t, i_out, m_t, m_out, d_in, dtype, TMA, BLOCK_T, BLOCK_OUT)


@triton.jit(do_not_specialize=[*_SEEDS, "n_tokens"])
def lora_group_update_kernel(
    base, dx, ds0, ds1, ds2, ds3, a0, a1, a2, a3,
    seed0: tl.int64, in_memory0: tl.int32, level0: tl.int32, seed1: tl.int64, in_memory1: tl.int32, level1: tl.int32,
    seed2: tl.int64, in_memory2: tl.int32, level2: tl.int32, seed3: tl.int64, in_memory3: tl.int32, level3: tl.int32,
    n_tokens, d_in, stride_a0, stride_a1, stride_a2, stride_a3,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores dx = base + Σ_m keep_m∘(dS_m a_m)."""
    dtype: tl.constexpr = dx.dtype.element_ty
    n_tiles_out = tl.cdiv(d_in, BLOCK_OUT)
    o_out = tl.program_id(0) % n_tiles_out * BLOCK_OUT
    i_t = (tl.program_id(0) // n_tiles_out).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_out = o_out.to(tl.int64) + tl.arange(0, BLOCK_OUT)
    m_t, m_out = i_t < n_tokens, i_out < d_in
    b_acc = add_all_thin(
        tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32), ds0, ds1, ds2, ds3, a0, a1, a2, a3,
        seed0, in_memory0, level0, seed1, in_memory1, level1, seed2, in_memory2, level2, seed3, in_memory3, level3,
        i_t, i_out, o_out, m_t, m_out, n_tokens, stride_a0, stride_a1, stride_a2, stride_a3,
        R0, R1, R2, R3, DROPOUT, dtype, PRECISION, BLOCK_OUT, BLOCK_R,
    )  # fmt: skip
    o_dx = i_t[:, None] * d_in + i_out[None, :]
    mask = m_t[:, None] & m_out[None, :]
    b_acc += tl.load(base + o_dx, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + o_dx, round_to(b_acc, dtype), mask=mask)


class _GroupGemm:
    """This class holds what both strategies share, for one signature of two to four parts. A call takes a sequence of
    each field of ``Part``, in which the parts have the places ``where``."""

    def __init__(self, parts: Sequence[Part], shape: tuple[int, ...], where: Sequence[int]):
        dy = parts[0].dy
        self.empty = allocator(shape, dy.dtype, dy.device)
        ranks = [len(part.lora_A) for part in parts]
        self.where, self.pick = where, picker(where, len(parts))
        self.dropout = any(part.keep is not None for part in parts)
        self.flags = {**rank_flags(ranks), "DROPOUT": self.dropout, "PRECISION": precision(dy)}
        self.strides_a = filled([part.lora_A.stride(0) for part in parts])

    def numbers(self, keeps: Sequence[DropoutMask | None]) -> tuple[int, ...]:
        """Returns the kernels' description of all masks."""
        return sum([keep or NO_MASK for keep in filled(self.pick(keeps))], ()) if self.dropout else NO_MASKS


class FusedGroupGemm(_GroupGemm):
    """The strategy "fused"."""

    def __init__(self, parts: Sequence[Part], shape: tuple[int, ...], where: Sequence[int]):
        super().__init__(parts, shape, where)
        n_tokens, d_in = len(parts[0].dy), shape[-1]
        tma = all(tiles.uses_tma(part.dy, part.weight, d_in) for part in parts)
        tile = tiles.group_grad_x(parts[0].dy, [len(part.lora_A) for part in parts], tma, self.dropout)
        blocks = (tile.t, tile.inner), (tile.inner, tile.outer)  # of dy and of a weight
        columns = [filled([part[i] for part in parts]) for i in (0, 1)]
        matrices = [
            Matrix(tuple(matrix.shape), matrix.stride(), block)
            for column, block in zip(columns, blocks, strict=True)
            for matrix in column
        ]
        matrices.append(Matrix((n_tokens, d_in), (d_in, 1), (tile.t, tile.outer // 2)))
        strides = [matrix.stride(0) for column in columns for matrix in column]
        n, n_tiles = len(parts), triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_in, tile.outer)
        of_dy, of_w, of_ds, of_a = places_of(n, n, n, n)
        self.launch = Launch(
            lora_group_grad_x_kernel, (min(n_tiles, tiles.programs(parts[0].dy.device)),),
            (n_tokens, d_in, *map(len, columns[1]), *strides, *self.strides_a),
            {**self.flags, "TMA": tma, "GROUP": tiles.GROUP, **tile.options()},
            tuple(matrices) if tma else (), (*of_dy, *of_w, -1, *of_ds, *of_a),
        )  # fmt: skip

    def __call__(self, dys, weights, dss, factors, keeps, stream: int | None = None) -> torch.Tensor:
        dx, pick = self.empty(), self.pick
        tensors = *pick(dys), *pick(weights), *pick(dss), *pick(factors), dx
        self.launch.go(stream, tensors, self.numbers(keeps))
        return dx


class GroupUpdate(_GroupGemm):
    """Adds all thin products to a matrix that cuBLAS or another library has multiplied. The dy of ``parts`` are only
    looked at for their dtype and number of rows."""

    def __init__(self, parts: Sequence[Part], shape: tuple[int, ...], where: Sequence[int]):
        super().__init__(parts, shape, where)
        n_tokens, d_in = len(parts[0].dy), shape[-1]
        of_ds, of_a = places_of(len(parts), len(parts))
        tile = tiles.group_update(parts[0].dy, [len(part.lora_A) for part in parts], self.dropout)
        self.launch = Launch(
            lora_group_update_kernel, (triton.cdiv(n_tokens, tile.t) * triton.cdiv(d_in, tile.outer),),
            (n_tokens, d_in, *self.strides_a), {**self.flags, **tile.options()}, places=(-2, -1, *of_ds, *of_a),
        )  # fmt: skip

    def add(self, base, dx, dss, factors, keeps, stream: int | None = None) -> None:
        """Stores base + Σ keep∘(dS a) in ``dx``, which may be ``base``."""
        self.launch.go(stream, (*self.pick(dss), *self.pick(factors), base, dx), self.numbers(keeps))


class CublasGroupGemm(GroupUpdate):
    """The strategy "cublas"."""

    def __call__(self, dys, weights, dss, factors, keeps, stream: int | None = None) -> torch.Tensor:
        first, *others = self.where
        base = torch.mm(dys[first], weights[first])
        # In place unless a mode of torch, such as selective checkpointing, sees the products and may keep them.
        add = torch.addmm if torch._C._len_torch_dispatch_stack() else torch.Tensor.addmm_
        for i in others:
            base = add(base, dys[i], weights[i])
        dx = self.empty()
        self.add(base, dx, dss, factors, keeps, stream)
        return dx
