"""W += b diag(scale) a for every layer, in place, in one launch.

Math      total = W (+ residual) + Σ_k b[:, k] scale[k] a[k, :], in float32; then one rounding to W's dtype:
          nearest      ties to even
          stochastic   up or down with the probability that makes the expectation exact: a Philox number (key = seed,
                       counter = element, layer) is added to the bits that the cast drops; below float16's normal range,
                       where the spacing is fixed, a floor does the same. A float32 W loses nothing: nearest.
          compensated  nearest, and residual = total - W, rounded to W's dtype, is carried to the next merge.
Grid      one program per (layer, 1024 rows, 512 columns of W): its columns of a stay in registers up to rank 16.
Shapes    W (d_out, d_in), a (r, d_in), b (d_out, r), contiguous, any float; scale float32 (n, R), R the largest rank;
          residual of W's shape and dtype. All layers of a launch share W's dtype and the adapters'.
Roofline  W read and written once against 2 r operations an element; a and b add r·4·(1/512 + 1/1024) bytes an element.
"""

import torch
import triton
import triton.language as tl

from .launch import on_device, report_addresses
from .primitives import PHILOX_ROUNDS, dot, round_to, widened
from .table import ADDRESSES, INDEX, TL_DTYPE, D, R, check_storage, entry, kept, tensor_at, tile_map, to_device

ROUNDINGS = ("nearest", "stochastic", "compensated")
NEAREST, STOCHASTIC, COMPENSATED = (tl.constexpr(i) for i in range(3))
D_IN = tl.constexpr(6)  # the table's column where factors have their side
BLOCK_OUT, BLOCK_IN, BLOCK_R, CHUNK, WARPS = 8, 512, 16, 1024, 8


@triton.jit
def noise(seed, i_row, o_col, i_layer, BLOCK_COL: tl.constexpr):
    """A 16-bit number for each element of rows ``i_row`` and columns ``o_col`` … ``o_col + BLOCK_COL`` (multiples of
    8): int32 [rows, BLOCK_COL]. One Philox call serves eight neighbours, as in ``primitives.keep_mask``."""
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
    """float32 → bfloat16 or float16, up or down; what is not finite stays as it is."""
    bits = value.to(tl.int32, bitcast=True)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        rounded = ((bits + b_noise) & -65536).to(tl.float32, bitcast=True)
    else:
        b_noise = b_noise & 8191
        rounded = ((bits + b_noise) & -8192).to(tl.float32, bitcast=True)
        small = tl.floor(value * 16777216.0 + b_noise.to(tl.float32) * (1.0 / 8192)) * (1.0 / 16777216)
        rounded = tl.where(tl.abs(value) < 6.103515625e-05, small, rounded)  # 2^-14, the smallest normal number
    return round_to(tl.where(tl.abs(value) < float("inf"), rounded, value), DTYPE)


@triton.jit
def load_a(a, o_k, i_in, r, d_in, BLOCK_R: tl.constexpr):
    i_k = o_k + tl.arange(0, BLOCK_R)
    mask = (i_k < r)[:, None] & (i_in < d_in)[None, :]
    return widened(tl.load(a + i_k[:, None].to(tl.int64) * d_in + i_in[None, :], mask=mask, other=0.0))


@triton.jit(do_not_specialize=["seed"])
def lora_merge_kernel(
    entries, tiles, scale, seed, W: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDING: tl.constexpr,
    SEED_IN_MEMORY: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    WHOLE: tl.constexpr = R_MAX <= BLOCK_R
    i_layer, i_tile = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    w, residual = tensor_at(entries, i_layer, 0, W, ALIGNED), tensor_at(entries, i_layer, 1, W, ALIGNED)
    a, b = tensor_at(entries, i_layer, 2, A, ALIGNED), tensor_at(entries, i_layer, 3, B, ALIGNED)
    d_out, d_in, r = entry(entries, i_layer, D), entry(entries, i_layer, D_IN), entry(entries, i_layer, R)
    index = entry(entries, i_layer, INDEX)
    if ALIGNED:
        d_in = d_in // 8 * 8  # as it is: see table.sizes
    if SEED_IN_MEMORY:
        seed = tl.load(seed)
    n_columns = tl.maximum(tl.cdiv(d_in, BLOCK_IN), 1)
    o_in, start = i_tile % n_columns * BLOCK_IN, i_tile // n_columns * CHUNK
    i_in = o_in + tl.arange(0, BLOCK_IN)
    if WHOLE:
        b_a = load_a(a, 0, i_in, r, d_in, BLOCK_R)  # [BLOCK_R, BLOCK_IN]
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
            p_b = b + i_out[:, None] * r + i_k[None, :]
            b_b = widened(tl.load(p_b, mask=(i_out < d_out)[:, None] & m_k[None, :], other=0.0))
            b_b *= tl.load(scale + index * R_MAX + i_k, mask=m_k, other=0.0)[None, :]  # [BLOCK_OUT, BLOCK_R]
            b_total = dot(b_b, b_a if WHOLE else load_a(a, o_k, i_in, r, d_in, BLOCK_R), b_total, "ieee")
        if ROUNDING == STOCHASTIC:
            b_new = round_stochastic(b_total, noise(seed, i_out, o_in, index, BLOCK_IN), W)
        else:
            b_new = round_to(b_total, W)
        tl.store(w + o_tile, b_new, mask=mask)
        if ROUNDING == COMPENSATED:
            tl.store(residual + o_tile, round_to(b_total - b_new.to(tl.float32), W), mask=mask)


def merge_(
    weights: list[torch.Tensor],
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scale: torch.Tensor,
    rounding: str = "nearest",
    seed: int | torch.Tensor = 0,
    residuals: list[torch.Tensor] | None = None,
) -> None:
    """weights[i] += b[i] diag(scale[i]) a[i] in place. scale: float32 (n, R), R the largest rank. seed: of stochastic
    rounding, a number or a 0-d int64 tensor on the device. residuals: of compensated rounding, shaped and typed as the
    weights, zero at first. A float32 weight rounds to nearest whatever is asked. Twin: ``reference_scalora.merge_``."""
    if rounding not in ROUNDINGS or (rounding == "compensated") != (residuals is not None):
        raise ValueError(
            f"lora_fast: rounding: expected one of {ROUNDINGS}, residuals with 'compensated' alone; got {rounding!r}, "
            f"residuals {'given' if residuals is not None else 'None'}"
        )
    r_max = max((t.shape[0] for t in a), default=1)
    if tuple(scale.shape) != (len(weights), r_max) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"lora_fast: scale: expected contiguous float32 ({len(weights)}, {r_max}), "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    by_dtypes: dict[tuple, list[tuple]] = {}
    for i, layer in enumerate(zip(weights, residuals or weights, a, b, strict=True)):
        by_dtypes.setdefault(tuple(t.dtype for t in layer), []).append((layer, i))
    for members in by_dtypes.values():
        _launch(members, scale, rounding, seed)
    torch.autograd.graph.increment_version(weights)


def _launch(members: list[tuple], scale: torch.Tensor, rounding: str, seed: int | torch.Tensor) -> None:
    key = "merge", scale.device, tuple((tuple((t.data_ptr(), t.dtype, t.shape) for t in of), i) for of, i in members)
    entries, tiles, aligned = kept(key, lambda: _build(members, scale.device))
    report_addresses(entries, (t for of, _ in members for t in of))
    w, _, a, b = (TL_DTYPE[t.dtype] for t in members[0][0])
    exact = members[0][0][0].dtype == torch.float32
    with on_device(scale):
        lora_merge_kernel[(len(tiles),)](
            entries, tiles, scale, seed, W=w, A=a, B=b, ROUNDING=0 if exact else ROUNDINGS.index(rounding),
            SEED_IN_MEMORY=isinstance(seed, torch.Tensor), ALIGNED=aligned, R_MAX=scale.shape[1], CHUNK=CHUNK,
            BLOCK_OUT=BLOCK_OUT, BLOCK_IN=BLOCK_IN, BLOCK_R=BLOCK_R, num_warps=WARPS,
        )  # fmt: skip


def _build(members: list[tuple], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Table, tile map, and whether every row starts at a multiple of 16 bytes."""
    rows, n_tiles = [], []
    for (w, residual, a, b), index in members:
        (d_out, d_in), r = w.shape, a.shape[0]
        if (residual.shape, a.shape, b.shape) != (w.shape, (r, d_in), (d_out, r)) or residual.dtype != w.dtype:
            raise ValueError(
                f"lora_fast: layer {index}: a (r, d_in), b (d_out, r) and a residual like the weight must fit weight "
                f"{w.dtype} {tuple(w.shape)}, got {tuple(a.shape)}, {tuple(b.shape)}, {residual.dtype} "
                f"{tuple(residual.shape)}"
            )
        for tensor in (w, residual, a, b):
            check_storage(tensor)
        rows.append([*(t.data_ptr() for t in (w, residual, a, b)), d_out, r, d_in, index, 0, 0])
        n_tiles.append(triton.cdiv(d_out, CHUNK) * triton.cdiv(d_in, BLOCK_IN))
    if len({row[0] for row in rows}) < len(rows):
        raise ValueError("lora_fast: two layers share a weight: merged in one launch they would overwrite each other")
    aligned = all(address % 16 == 0 for row in rows for address in row[:ADDRESSES]) and all(
        row[D_IN.value] % 8 == 0 for row in rows
    )
    return to_device(rows, torch.int64, device), tile_map(tuple(n_tiles), 1, device)[0], aligned
