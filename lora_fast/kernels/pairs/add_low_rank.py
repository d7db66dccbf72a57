"""W += b diag(scale) a for every layer, in place, in one launch.

Math      total = W (+ residual) + Σ_k b[:, k] scale[k] a[k, :], in float32. A k with scale 0 adds 0, also where a or b
          is not finite. With SCALED, for 16-bit factors that are then scaled by α and β and rounded, the sum is what
          the product loses by that, Σ_k s (b[:, k] a[k, :] − b̂[:, k] â[k, :]), b̂ = round(α b), â = round(β a); a k
          whose α and β are 1 adds 0. Then one rounding to W's dtype:
          nearest      ties to even
          stochastic   up or down with the probability that makes the expectation exact, by a Philox number (key =
                       seed, counter = element, layer). A float32 W is rounded to nearest.
          compensated  nearest, and residual = total - W, rounded to W's dtype, is carried to the next merge.
Grid      One program per (layer, 1024 rows, 512 columns of W). Its columns of a stay in registers up to rank 16.
Shapes    W (d_out, d_in), contiguous, a (r, d_in), b (d_out, r), any float; scale, α, β float32 (n, R), R the largest
          rank, s float32 (n,);
          residual of W's shape and dtype. All layers of a launch share W's dtype and the adapters'. DENSE: all a and b
          are contiguous; experts' factors, which are interleaved, are not. The launch has a table of its own, int64
          (n, COLUMNS): addresses of W, residual, a, b; d_out, r, d_in, the layer's row in ``scale``; strides of a, b.
Roofline  W is read and written once against 2 r operations an element (SCALED: 4 r); a and b add
          r·4·(1/512 + 1/1024) bytes each.
"""

import torch
import triton
import triton.language as tl

from ..device import to_device
from ..grouping import group_by
from ..launch import check_tensor, on_device, report_addresses
from ..limits import ROUNDINGS
from ..pointer_table import ALIGNMENT, TL_DTYPE, cached, check_dtype, check_storage, pointer_at
from ..primitives import dot, keep_ieee, noise, round_stochastic, round_to, scaled_to, to_float32
from ..records import Scaled

NEAREST, STOCHASTIC, COMPENSATED = (tl.constexpr(i) for i in range(3))
COLUMNS = tl.constexpr(12)
BLOCK_OUT, BLOCK_IN, BLOCK_R, CHUNK, WARPS = 8, 512, 16, 1024, 8


@triton.jit
def load_scales(p_scale, p_alpha, p_beta, i_k, r, SCALED: tl.constexpr):
    """Returns scale, α and β of the ranks ``i_k``, and which of these ranks add to W."""
    if SCALED:
        b_scale = tl.zeros_like(i_k).to(tl.float32) + tl.load(p_scale)
        b_alpha = tl.load(p_alpha + i_k, mask=i_k < r, other=1.0)
        b_beta = tl.load(p_beta + i_k, mask=i_k < r, other=1.0)
        m_k = (b_alpha != 1.0) | (b_beta != 1.0)
    else:
        b_scale = tl.load(p_scale + i_k, mask=i_k < r, other=0.0)
        b_alpha, b_beta = b_scale, b_scale  # not used
        m_k = b_scale != 0.0
    return b_scale, b_alpha, b_beta, m_k


@triton.jit
def load_a(a, i_k, m_k, i_in, d_in, stride_r, stride_in):
    mask = m_k[:, None] & (i_in < d_in)[None, :]
    return to_float32(
        tl.load(a + i_k[:, None].to(tl.int64) * stride_r + i_in[None, :] * stride_in, mask=mask, other=0.0)
    )


@triton.jit(do_not_specialize=["seed"])
def lora_merge_kernel(
    entries, tiles, scale, alpha, beta,
    seed,
    W: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDING: tl.constexpr, SEED_IN_MEMORY: tl.constexpr,
    SCALED: tl.constexpr,
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
    p_scale = scale + index * (1 if SCALED else R_MAX)
    p_alpha, p_beta = alpha + index * R_MAX, beta + index * R_MAX
    if ONE_BLOCK:
        i_k = tl.arange(0, BLOCK_R)
        b_scale, b_alpha, b_beta, m_k = load_scales(p_scale, p_alpha, p_beta, i_k, r, SCALED)
        b_a = load_a(a, i_k, m_k, i_in, d_in, a_r, a_in)  # [BLOCK_R, BLOCK_IN]
    for o_out in tl.range(start, tl.minimum(start + CHUNK, d_out), BLOCK_OUT, num_stages=1):
        i_out = o_out + tl.arange(0, BLOCK_OUT)
        mask = (i_out < d_out)[:, None] & (i_in < d_in)[None, :]
        o_tile = i_out[:, None] * d_in + i_in[None, :]
        b_total = tl.load(w + o_tile, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_OUT, BLOCK_IN]
        if ROUNDING == COMPENSATED:
            b_total += tl.load(residual + o_tile, mask=mask, other=0.0).to(tl.float32)
        for o_k in tl.range(0, R_MAX, BLOCK_R, num_stages=1):
            if not ONE_BLOCK:
                i_k = o_k + tl.arange(0, BLOCK_R)
                b_scale, b_alpha, b_beta, m_k = load_scales(p_scale, p_alpha, p_beta, i_k, r, SCALED)
                b_a = load_a(a, i_k, m_k, i_in, d_in, a_r, a_in)
            p_b = b + i_out[:, None] * b_out + i_k[None, :] * b_r
            b_b = to_float32(tl.load(p_b, mask=(i_out < d_out)[:, None] & m_k[None, :], other=0.0))
            b_total = dot(b_b * b_scale[None, :], b_a, b_total, "ieee")  # b_b: [BLOCK_OUT, BLOCK_R]
            if SCALED:
                b_b = keep_ieee(scaled_to(b_b, b_alpha[None, :], B)) * -b_scale[None, :]
                b_total = dot(b_b, keep_ieee(scaled_to(b_a, b_beta[:, None], A)), b_total, "ieee")
        if ROUNDING == STOCHASTIC:
            b_new = round_stochastic(b_total, noise(seed, i_out, o_in, index, 0, BLOCK_IN), W)
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
    scaled: Scaled | None = None,
) -> None:
    """Adds b[i] diag(scale[i]) a[i] to every weight, in place. Twin: ``reference.scalora_solution.add_low_rank_``.

    Args:
        weights: (d_out, d_in), contiguous, no two at one address.
        a, b: (r, d_in) and (d_out, r), any strides.
        scale: float32 (n, R), R the largest rank.
        rounding: one of ``ROUNDINGS``. A float32 weight is rounded to nearest in any case.
        seed: of stochastic rounding, a number or a 0-d int64 tensor on the device.
        residuals: for compensated rounding alone, shaped and typed as the weights, zero at first.
        scaled: how the factors are scaled afterwards. Pairs with factors of 16 bits then add what their product loses
            by that, their factors rounded, in place of b diag(scale) a.
    """
    assert rounding in ROUNDINGS, f"rounding: expected one of {ROUNDINGS}, got {rounding!r}"
    assert (rounding == "compensated") == (residuals is not None), (
        f"residuals: expected with 'compensated' alone, got {'some' if residuals is not None else 'None'}"
    )
    check_tensor("scale", scale, (len(weights), max((t.shape[0] for t in a), default=1)), torch.float32)
    layers = [(layer, i) for i, layer in enumerate(zip(weights, residuals or weights, a, b, strict=True))]
    for group in group_by(layers, lambda entry: tuple(t.dtype for t in entry[0])).values():
        _launch(group, scale, rounding, seed, scaled)
    torch.autograd.graph.increment_version(weights)


def _launch(
    layers: list[tuple], scale: torch.Tensor, rounding: str, seed: int | torch.Tensor, scaled: Scaled | None
) -> None:
    """``layers``: ((weight, residual, a, b), row in ``scale``) of one combination of dtypes."""
    key = [(i, *[(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in layer]) for layer, i in layers]
    table = cached("merge", [scale.device, *key], lambda: _LayerTable(layers, scale.device))
    report_addresses(table.entries, (t for layer, _ in layers for t in layer))
    first, _ = layers[0]
    w, _, a, b = (TL_DTYPE[t.dtype] for t in first)
    exact = first[0].dtype == torch.float32
    is_scaled = scaled is not None and first[2].dtype.itemsize == 2
    scales = scaled if is_scaled else (scale, scale, scale)  # the kernel reads the first alone
    with on_device(scale):
        lora_merge_kernel[(len(table.tiles),)](
            table.entries, table.tiles, *scales,
            seed,
            W=w, A=a, B=b, SCALED=is_scaled,
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
