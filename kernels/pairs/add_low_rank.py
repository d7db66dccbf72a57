"""W += b diag(scale) a for every layer, in place, in one launch.

Math      total = W (+ residual) + Σ_k b[:, k] scale[k] a[k, :], in float32; then one rounding to W's dtype:
          nearest      ties to even
          stochastic   up or down with the probability that makes the expectation exact. A Philox number (key = seed,
                       counter = element, layer) is added to the bits that the cast drops. Below float16's normal range,
                       where the spacing is fixed, a floor has the same effect. A float32 W is rounded to nearest.
          compensated  nearest, and residual = total - W, rounded to W's dtype, is carried to the next merge.
Grid      One program per (layer, 1024 rows, 512 columns of W). Its columns of a stay in registers up to rank 16.
Shapes    W (d_out, d_in), contiguous, a (r, d_in), b (d_out, r), any float; scale float32 (n, R), R the largest rank;
          residual of W's shape and dtype. All layers of a launch share W's dtype and the adapters'. DENSE: all a and b
          are contiguous; experts' factors, which are interleaved, are not. The launch has a table of its own, int64
          (n, COLUMNS): addresses of W, residual, a, b; d_out, r, d_in, the layer's row in ``scale``; strides of a, b.
Roofline  W is read and written once against 2 r operations an element; a and b add r·4·(1/512 + 1/1024) bytes each.
"""

import torch
import triton
import triton.language as tl

from ..device import to_device
from ..grouping import group_by
from ..launch import check_tensor, on_device, report_addresses
from ..limits import ROUNDINGS
from ..pointer_table import ALIGNMENT, TL_DTYPE, cached, check_dtype, check_storage, pointer_at
from ..primitives import PHILOX_ROUNDS, dot, round_to, to_float32

NEAREST, STOCHASTIC, COMPENSATED = (tl.constexpr(i) for i in range(3))
COLUMNS = tl.constexpr(12)
BLOCK_OUT, BLOCK_IN, BLOCK_R, CHUNK, WARPS = 8, 512, 16, 1024, 8


@triton.jit
def noise(seed, i_row, o_col, i_layer, BLOCK_COL: tl.constexpr):
    """Draws a 16-bit number for each element of rows ``i_row`` and columns ``o_col`` … ``o_col + BLOCK_COL`` (multiples
    of 8): int32 [rows, BLOCK_COL]. One Philox call serves eight neighbours, as in ``primitives.keep_mask``."""
    i_group = o_col // 8 + tl.arange(0, BLOCK_COL // 8)
    zero = tl.zeros([i_row.shape[0], BLOCK_COL // 8], dtype=tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed, zero + i_row.to(tl.uint32)[:, None], zero + i_group.to(tl.uint32)[None, :],
        zero + i_layer.to(tl.uint32), zero, PHILOX_ROUNDS,
    )  # fmt: skip
    low = tl.join(tl.join(word0 & 0xFFFF, word2 & 0xFFFF), tl.join(word1 & 0xFFFF, word3 & 0xFFFF))
    high = tl.join(tl.join(word0 >> 16, word2 >> 16), tl.join(word1 >> 16, word3 >> 16))
    return tl.reshape(tl.join(low, high), [i_row.shape[0], BLOCK_COL]).to(tl.int32)


@triton.jit
def round_stochastic(value, b_noise, DTYPE: tl.constexpr):
    """Rounds float32 to bfloat16 or float16, up or down. A value that is not finite stays as it is."""
    bits = value.to(tl.int32, bitcast=True)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        # bfloat16 drops the low 16 bits of a float32; float16 drops 13 (mask 8191) of a normal number.
        rounded = ((bits + b_noise) & -65536).to(tl.float32, bitcast=True)
    else:
        b_noise = b_noise & 8191
        rounded = ((bits + b_noise) & -8192).to(tl.float32, bitcast=True)
        # float16's subnormal numbers are multiples of 2^-24.
        small = tl.floor(value * 16777216.0 + b_noise.to(tl.float32) * (1.0 / 8192)) * (1.0 / 16777216)
        rounded = tl.where(tl.abs(value) < 6.103515625e-05, small, rounded)  # 2^-14, the smallest normal number
    return round_to(tl.where(tl.abs(value) < float("inf"), rounded, value), DTYPE)


@triton.jit
def load_a(a, o_k, i_in, r, d_in, stride_r, stride_in, BLOCK_R: tl.constexpr):
    i_k = o_k + tl.arange(0, BLOCK_R)
    mask = (i_k < r)[:, None] & (i_in < d_in)[None, :]
    return to_float32(
        tl.load(a + i_k[:, None].to(tl.int64) * stride_r + i_in[None, :] * stride_in, mask=mask, other=0.0)
    )


@triton.jit(do_not_specialize=["seed"])
def lora_merge_kernel(
    entries, tiles, scale,
    seed,
    W: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDING: tl.constexpr, SEED_IN_MEMORY: tl.constexpr,
    ALIGNED: tl.constexpr, DENSE: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ONE_BLOCK: tl.constexpr = R_MAX <= BLOCK_R
    i_layer, i_tile = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    row = entries + i_layer * COLUMNS
    w, residual = pointer_at(row, W, ALIGNED), pointer_at(row + 1, W, ALIGNED)
    a, b = pointer_at(row + 2, A, ALIGNED), pointer_at(row + 3, B, ALIGNED)
    d_out, r, d_in, index = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    if ALIGNED:
        d_in = d_in // 8 * 8  # for the compiler: see pointer_table.load_sizes
    if DENSE:
        a_r, a_in, b_out, b_r = d_in, 1, r, 1
    else:
        a_r, a_in, b_out, b_r = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
    if SEED_IN_MEMORY:
        seed = tl.load(seed)
    n_columns = tl.maximum(tl.cdiv(d_in, BLOCK_IN), 1)
    o_in, start = i_tile % n_columns * BLOCK_IN, i_tile // n_columns * CHUNK
    i_in = o_in + tl.arange(0, BLOCK_IN)
    if ONE_BLOCK:
        b_a = load_a(a, 0, i_in, r, d_in, a_r, a_in, BLOCK_R)  # [BLOCK_R, BLOCK_IN]
    for o_out in tl.range(start, tl.minimum(start + CHUNK, d_out), BLOCK_OUT, num_stages=1):
        i_out = o_out + tl.arange(0, BLOCK_OUT)
        mask = (i_out < d_out)[:, None] & (i_in < d_in)[None, :]
        o_tile = i_out[:, None] * d_in + i_in[None, :]
        b_total = tl.load(w + o_tile, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_OUT, BLOCK_IN]
        if ROUNDING == COMPENSATED:
            b_total += tl.load(residual + o_tile, mask=mask, other=0.0).to(tl.float32)
        for o_k in tl.range(0, R_MAX, BLOCK_R, num_stages=1):
            i_k = o_k + tl.arange(0, BLOCK_R)
            m_k = i_k < r
            p_b = b + i_out[:, None] * b_out + i_k[None, :] * b_r
            b_b = to_float32(tl.load(p_b, mask=(i_out < d_out)[:, None] & m_k[None, :], other=0.0))
            b_b *= tl.load(scale + index * R_MAX + i_k, mask=m_k, other=0.0)[None, :]  # [BLOCK_OUT, BLOCK_R]
            b_total = dot(b_b, b_a if ONE_BLOCK else load_a(a, o_k, i_in, r, d_in, a_r, a_in, BLOCK_R), b_total, "ieee")
        if ROUNDING == STOCHASTIC:
            b_new = round_stochastic(b_total, noise(seed, i_out, o_in, index, BLOCK_IN), W)
        else:
            b_new = round_to(b_total, W)
        tl.store(w + o_tile, b_new, mask=mask)
        if ROUNDING == COMPENSATED:
            tl.store(residual + o_tile, round_to(b_total - b_new.to(tl.float32), W), mask=mask)


def add_low_rank_(
    weights: list[torch.Tensor],
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scale: torch.Tensor,
    rounding: str = "nearest",
    seed: int | torch.Tensor = 0,
    residuals: list[torch.Tensor] | None = None,
) -> None:
    """Adds b[i] diag(scale[i]) a[i] to every weight, in place. Twin: ``reference.scalora_solution.add_low_rank_``.

    Args:
        weights: (d_out, d_in), contiguous, no two at one address.
        a, b: (r, d_in) and (d_out, r), any strides.
        scale: float32 (n, R), R the largest rank.
        rounding: one of ``ROUNDINGS``. A float32 weight is rounded to nearest in any case.
        seed: of stochastic rounding, a number or a 0-d int64 tensor on the device.
        residuals: for compensated rounding alone, shaped and typed as the weights, zero at first.
    """
    assert rounding in ROUNDINGS, f"rounding: expected one of {ROUNDINGS}, got {rounding!r}"
    assert (rounding == "compensated") == (residuals is not None), (
        f"residuals: expected with 'compensated' alone, got {'some' if residuals is not None else 'None'}"
    )
    check_tensor("scale", scale, (len(weights), max((t.shape[0] for t in a), default=1)), torch.float32)
    layers = [(layer, i) for i, layer in enumerate(zip(weights, residuals or weights, a, b, strict=True))]
    for group in group_by(layers, lambda entry: tuple(t.dtype for t in entry[0])).values():
        _launch(group, scale, rounding, seed)
    torch.autograd.graph.increment_version(weights)


def _launch(layers: list[tuple], scale: torch.Tensor, rounding: str, seed: int | torch.Tensor) -> None:
    """``layers``: ((weight, residual, a, b), row in ``scale``) of one combination of dtypes."""
    key = [(i, *[(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in layer]) for layer, i in layers]
    table = cached("merge", [scale.device, *key], lambda: _LayerTable(layers, scale.device))
    report_addresses(table.entries, (t for layer, _ in layers for t in layer))
    first, _ = layers[0]
    w, _, a, b = (TL_DTYPE[t.dtype] for t in first)
    exact = first[0].dtype == torch.float32
    with on_device(scale):
        lora_merge_kernel[(len(table.tiles),)](
            table.entries, table.tiles, scale,
            seed,
            W=w, A=a, B=b,
            ROUNDING=0 if exact else ROUNDINGS.index(rounding), SEED_IN_MEMORY=isinstance(seed, torch.Tensor),
            ALIGNED=table.aligned, DENSE=table.dense, R_MAX=scale.shape[1],
            CHUNK=CHUNK, BLOCK_OUT=BLOCK_OUT, BLOCK_IN=BLOCK_IN, BLOCK_R=BLOCK_R, num_warps=WARPS,
        )  # fmt: skip


class _LayerTable:
    """The layers of one launch.

    Attributes:
        entries: int64 (n, COLUMNS) on the device.
        tiles: int32 (programs, 2) on the device: the layer and the tile of W of every program.
        aligned: whether every row of every tensor starts at a multiple of 16 bytes.
        dense: whether all a and b are contiguous.
    """

    def __init__(self, layers: list[tuple], device: torch.device):
        rows, tiles, self.dense = [], [], True
        for i, ((w, residual, a, b), index) in enumerate(layers):
            (d_out, d_in), r = w.shape, a.shape[0]
            shapes = residual.shape, a.shape, b.shape
            assert shapes == (w.shape, (r, d_in), (d_out, r)) and residual.dtype == w.dtype, (
                f"layer {index}: expected residual, a (r, d_in), b (d_out, r) to fit weight {w.dtype} "
                f"{tuple(w.shape)}, got {residual.dtype} {tuple(residual.shape)}, {tuple(a.shape)}, {tuple(b.shape)}"
            )
            for tensor in (w, residual):
                check_storage(tensor)
            for tensor in (a, b):
                check_dtype(tensor)
                self.dense &= tensor.is_contiguous()
            addresses = [t.data_ptr() for t in (w, residual, a, b)]
            rows.append([*addresses, d_out, r, d_in, index, *a.stride(), *b.stride()])
            n_tiles = max(1, triton.cdiv(d_out, CHUNK) * triton.cdiv(d_in, BLOCK_IN))
            tiles += [(i, tile) for tile in range(n_tiles)]
        # Merged in one launch, layers of one weight would overwrite each other's results.
        weights = {row[0] for row in rows}
        assert len(weights) == len(rows), f"weights: expected {len(rows)} that share no memory, got {len(weights)}"
        starts, d_in = [address for row in rows for address in row[:4]], [row[6] for row in rows]
        self.aligned = self.dense and all(x % ALIGNMENT == 0 for x in starts) and all(d % 8 == 0 for d in d_in)
        self.entries, self.tiles = to_device(rows, torch.int64, device), to_device(tiles, torch.int32, device)
