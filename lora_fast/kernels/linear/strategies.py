"""Chooses the way of a layer's call, that is, which kernels compute it: estimates the time of each and takes the
fastest.

Forward   S in one "pass" over x, "short" with smaller blocks of tokens, "split" into parts that the update adds
          (project.py), or by "cublas" (cublas.py); then the GEMM "fused", by "cublas" with an update, or by "gluon"
          (gemm.py).
Backward  dS and db in one "pass" over dy (grads.py) or by "cublas", which reads dy twice (cublas.py); da in one pass
          over x by our kernel or by cuBLAS; then the GEMM for dx.
Estimate  The device's time, from bytes, operations and launches. A memory-bound call is fastest with the fewest bytes.
          A persistent GEMM loses time if its last wave of tiles does not fill all multiprocessors. With few tokens
          each launch matters. The multiprocessors that torch's carve-out takes away (gemm.py) compute nothing.
          Estimates are not measurements: choices that ``lora-fast tune`` measured take precedence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import NamedTuple

import torch

from .. import device, tiles
from ..tiles import rank_block


class Rates(NamedTuple):
    """The rates of a card."""

    bandwidth: float  # bytes a second
    half: float  # cuBLAS's operations a second in 16 bits
    single: float  # cuBLAS's operations a second in float32 without TF32
    fused: float  # share of cuBLAS's rate that a tile of the fused GEMM reaches


# H100: 3.35 TB/s; cuBLAS reaches 590 to 690 TFLOP/s, the pipelined GEMM 0.93 to 0.96 and Gluon's GEMM 0.97 to 1.0 of
# it, estimated from their compiled loops. The other archs: data sheets, with the H100's share of the peak; their last
# column is a guess.
RATES = {
    80: Rates(1.55e12, 210e12, 15e12, 0.90),
    86: Rates(0.94e12, 47e12, 24e12, 0.90),
    89: Rates(1.01e12, 110e12, 55e12, 0.90),
    90: Rates(3.35e12, 640e12, 45e12, 0.945),
    100: Rates(8.0e12, 1500e12, 55e12, 0.70),
    120: Rates(1.79e12, 140e12, 70e12, 0.90),
}
GLUON_SHARE = 0.985  # of cuBLAS's rate that a tile of the "gluon" GEMM reaches
LAUNCH_SECONDS = 2.5e-6  # seconds of a launch that does almost nothing
L2_SPEEDUP = 2.5  # bandwidth of L2 over that of memory; also of one multiprocessor over its share of the bandwidth
MASK_RATE = 2.2e10  # elements of a dropout mask that a multiprocessor draws in a second
STREAM_SHARE = 0.9  # of the memory's bandwidth that a thin pass reaches, ours or cuBLAS's: a guess
SINGLE_SHARE = 0.6  # of cuBLAS's float32 rate that our thin passes reach: a guess
CUBLAS_TILES = ((128, 256, 1.0), (128, 128, 0.95), (64, 128, 0.85), (64, 64, 0.65))  # tokens, columns, share of rate
SPLIT_K_SHARE = 0.85  # of the multiprocessors that cuBLAS keeps busy by splitting the sum if there are too few tiles


class Call(NamedTuple):
    """The sizes and dtypes of a layer's call. ``factor`` is the dtype of a and b."""

    n_tokens: int
    d_in: int
    d_out: int
    r: int
    dtype: torch.dtype
    factor: torch.dtype
    dropout: bool

    @property
    def wide(self) -> bool:
        """Returns whether S and dS are float32 beside 16-bit activations."""
        return self.dtype.itemsize == 2 and self.factor is not self.dtype


class Way(NamedTuple):
    """The kernels that compute a call."""

    direction: str  # "forward" or "backward"
    thin: str  # how the thin products are computed: "pass", "short", "split" or "cublas"
    gemm: str  # the GEMM's strategy: "fused", "cublas" or "gluon"


def estimate(way: Way, call: Call, card: device.Device, carved_out: int | None = None) -> float:
    """Returns the estimated seconds of a layer's forward or backward on the card, of which ``carved_out``
    multiprocessors are not used."""
    costs = CostModel(call, card, carved_out)
    if way.direction == "forward":
        n_parts = costs.parts_of_few() if way.thin == "split" else 1
        by_cublas = way.thin == "cublas"
        thin = costs.cublas_thin(call.d_in, call.n_tokens) if by_cublas else costs.project(way.thin, n_parts)
        return thin + costs.gemm(way.gemm, call.d_in, call.d_out, masked=False, n_parts=n_parts)
    if way.thin == "cublas":
        thin = costs.cublas_thin(call.d_out, call.n_tokens) + costs.cublas_thin(call.d_out, call.d_out)
        da_by_cublas = not (call.dropout or call.wide)
        thin += costs.cublas_thin(call.d_in, call.d_in) if da_by_cublas else costs.grad_a()
    else:
        thin = costs.grad_s_b() + costs.grad_a()
    return thin + costs.gemm(way.gemm, call.d_out, call.d_in, masked=call.dropout)


class CostModel:
    """Estimates the seconds of each part of a call on one card, of which ``carved_out`` multiprocessors are not
    used."""

    def __init__(self, call: Call, card: device.Device, carved_out: int | None = None):
        self.call, self.card = call, card
        self.used = device.remaining(card.multiprocessors, carved_out)  # multiprocessors
        self.rates = RATES[max(arch for arch in RATES if arch <= card.arch)]
        self.size, self.factor_size = call.dtype.itemsize, call.factor.itemsize
        self.thin_size = 4 if call.wide else self.size
        # Products of halves (``primitives.dot_wide``) in place of one product.
        self.products = 1 if not call.wide else 2 if call.dtype is torch.bfloat16 else 4

    def cublas(self, t: int, k: int, n: int) -> float:
        """Returns the seconds of cuBLAS's (t, k) × (k, n) with the fastest of its tiles."""
        rate = self.rates.half if self.size == 2 else self.rates.single
        by_tiles = min(self._tiled(t, k, n, tile, rate * share, SPLIT_K_SHARE) for *tile, share in CUBLAS_TILES)
        return LAUNCH_SECONDS + max(by_tiles, (t * k + k * n + t * n) * self.size / self.rates.bandwidth)

    def gemm(self, gemm: str, k: int, n: int, masked: bool, n_parts: int = 1, op: str = "linear") -> float:
        """Returns the seconds of the GEMM from left (n_tokens, k) to (n_tokens, n), including the thin product.

        Args:
            masked: whether the dropout mask is applied to the thin product.
            n_parts: number of partial sums of S.
            op: the fused GEMM's name in tiles.py.
        """
        t, r = self.call.n_tokens, self.call.r
        if gemm == "cublas":
            update = tiles.default("update" + "_few" * (n_parts > 1), self.size, self.card, r)
            columns = -(-n // update.outer)  # each column of programs reads all of S
            moved = t * (2.0 * n * self.size + n_parts * r * 4.0) + r * n * self.factor_size
            again = (columns - 1) * t * n_parts * r * 4.0
            return self.cublas(t, k, n) + self.memory(moved, t * n, columns * -(-t // update.t), again, masked)
        tile: Sequence[int]
        if gemm == "gluon":
            tile, rate = (128, 256), GLUON_SHARE * self.rates.half
        else:
            name = op + "_tma" * (self.size == 2 and self.card.arch >= 90) + "_dropout" * masked
            tile = tiles.row(name, self.size, self.card, r)[:2]
            rate = self.rates.fused * self.rates.half if self.size == 2 else SINGLE_SHARE * self.rates.single
        seconds = self._tiled(t, k + rank_block(r), n, tile, rate)
        if gemm == "fused":  # "gluon" draws the mask beside its products
            seconds += masked * t * n / (MASK_RATE * self.used)
        return LAUNCH_SECONDS + max(seconds, (t * k + k * n + t * n) * self.size / self.rates.bandwidth)

    def parts_of_few(self) -> int:
        """Returns the number of partial sums of S if d_in is split."""
        t, d_in = self.call.n_tokens, self.call.d_in
        tile = tiles.default("project_short" + "_wide" * self.call.wide, self.size, self.card, self.call.r)
        return tiles.split_of_few(t, d_in, self.call.r, tile)[0]

    def project(self, thin: str, splits: int) -> float:
        """Returns the seconds of S, or of ``splits`` partial sums of it, by one pass over x."""
        t, d_in, r = self.call.n_tokens, self.call.d_in, self.call.r
        name = "project" + "_short" * (thin != "pass") + "_wide" * self.call.wide
        tile = tiles.default(name, self.size, self.card, r)
        blocks, rank_blocks = -(-t // tile.t), -(-r // tile.r)
        moved = t * d_in * self.size + r * d_in * self.factor_size + splits * t * r * self.thin_size
        # Each block of ranks reads x again, and each block of tokens reads a again, both from L2.
        again = (blocks - 1) * r * d_in * self.factor_size + (rank_blocks - 1) * t * d_in * self.size
        return self.memory(moved, t * d_in, blocks * splits * rank_blocks, again, self.call.dropout)

    def grad_s_b(self) -> float:
        """Returns the seconds of dS and db by one pass over dy."""
        t, d_out, r = self.call.n_tokens, self.call.d_out, self.call.r
        chunks, splits = self._splits(tiles.grad_s_b_row(self.call.dtype, self.call.wide), d_out)
        once = t * d_out * self.size + t * r * self.thin_size + d_out * r * self.factor_size
        return self._in_parts(once, 2 * t * d_out, chunks * splits, [(chunks, t * r), (splits, d_out * r)], False)

    def grad_a(self) -> float:
        """Returns the seconds of da by one pass over x."""
        t, d_in, r = self.call.n_tokens, self.call.d_in, self.call.r
        chunks, splits = self._splits("grad_a" + "_wide" * self.call.wide, d_in)
        once = t * d_in * self.size + t * r * self.thin_size
        return self._in_parts(once, t * d_in, chunks * splits, [(splits, r * d_in)], self.call.dropout)

    def cublas_thin(self, width: int, out: int) -> float:
        """Returns the seconds of one thin product by cuBLAS, of a tall (n_tokens, width) with ``out`` rows of result.

        cuBLAS may split a long sum with few tiles and add the parts in another launch, which counts as half a launch.
        The two halves of a wide factor are the columns of one product. Splitting it and adding the halves' results
        takes one launch each.
        """
        t, r = self.call.n_tokens, self.call.r
        other, columns = (t + width - out) * r, r * (2 if self.call.wide else 1)
        moved = t * width * self.size + other * self.size * columns / r + out * columns * self.thin_size
        rate = self.rates.half if self.size == 2 else self.rates.single
        rate *= self.used / self.card.multiprocessors
        long_sum = (width if out == t else t) > 2048
        launches = 1.5 if long_sum else 1.0
        moving = moved / (STREAM_SHARE * self.rates.bandwidth)
        seconds = launches * LAUNCH_SECONDS + max(moving, 2.0 * t * width * columns / rate)
        return seconds + (self.memory(8.0 * other) + self.memory(12.0 * out * r) if self.call.wide else 0.0)

    def memory(
        self, moved: float, products: float = 0.0, programs: float = inf, again: float = 0.0, masked: bool = False
    ) -> float:
        """Returns the seconds of one launch of our kernels.

        Args:
            moved, again: bytes from memory, and bytes read again from L2.
            products: elements that are multiplied by the rank columns.
            masked: whether the dropout mask of these elements is drawn.
        """
        rate = self.rates.half if self.size == 2 else SINGLE_SHARE * self.rates.single
        rate *= self.used / self.card.multiprocessors
        programs = min(programs, self.used)  # that run at a time
        busy = min(1.0, L2_SPEEDUP * programs / self.card.multiprocessors)
        from_memory, from_l2 = (
            moved / (STREAM_SHARE * self.rates.bandwidth),
            again / (L2_SPEEDUP * self.rates.bandwidth),
        )
        return LAUNCH_SECONDS + max(
            (from_memory + from_l2 / 2) / busy,  # half of the reads from L2 overlap with those from memory
            2.0 * products * rank_block(self.call.r) * self.products / rate,
            masked * products / (MASK_RATE * programs),
        )

    def _splits(self, name: str, columns: int) -> tuple[int, int]:
        tile = tiles.default(name, self.size, self.card, self.call.r)
        return tiles.splits(self.call.n_tokens, columns, self.call.r, tile)[:2]

    def _in_parts(self, once: float, products: float, programs: int, sums: list[tuple[int, int]], masked: bool):
        """Returns the seconds of a pass that writes partial sums, and of the launch that adds them. ``sums`` has the
        number of parts and of elements of each result."""
        parts = sum(4.0 * count * numel for count, numel in sums if count > 1)
        seconds = self.memory(once + parts, products, programs, masked=masked)
        return seconds + (self.memory(parts) if parts else 0.0)

    def _tiled(self, t: int, k: int, n: int, tile: Sequence[int], rate: float, split_k: float = 0.0) -> float:
        """Returns the seconds of a GEMM in tiles, each on one multiprocessor, in whole waves. If there is less than one
        wave, ``split_k`` splits the tiles along k."""
        count = -(-t // tile[0]) * -(-n // tile[1])
        waves: float = -(-count // self.used)
        if split_k and waves == 1:
            waves = min(1.0, count / self.used / split_k)
        return waves * 2.0 * tile[0] * tile[1] * k * self.card.multiprocessors / rate


THIN = {"forward": ("pass", "short", "split", "cublas"), "backward": ("pass", "cublas")}
GEMMS = ("fused", "cublas")  # "gluon" is never estimated: it runs only where it was measured as the fastest


def ways(direction: str, call: Call) -> list[Way]:
    """Returns all ways that can compute this call. cuBLAS applies no dropout mask, and beside float16 it cannot
    multiply a float32 factor, because float16 halves do not represent factors of every size."""
    masked = direction == "forward" and call.dropout
    excluded = {
        "cublas": masked or (call.wide and call.dtype is not torch.bfloat16),
        "split": call.n_tokens > tiles.FEW,
    }
    thin = [thin for thin in THIN[direction] if not excluded.get(thin)]
    return [Way(direction, t, gemm) for t in thin for gemm in GEMMS if t != "split" or gemm == "cublas"]


@lru_cache(maxsize=4096)
def best(
    direction: str, call: Call, card: device.Device, thin: str | None = None, gemm: str | None = None,
    carved_out: int | None = None,
) -> Way:  # fmt: skip
    """Returns the way with the lowest estimate. ``gemm`` restricts the choice to this strategy; ``thin`` restricts it
    to these thin products if that leaves any way."""
    possible = ways(direction, call)
    if gemm == "gluon":  # "gluon" can replace "fused" in every way
        possible = [way._replace(gemm=gemm) for way in possible if way.gemm == "fused"]
    allowed = [way for way in possible if gemm in (None, way.gemm)]
    allowed = [way for way in allowed if way.thin == thin] or allowed
    return min(allowed, key=lambda way: estimate(way, call, card, carved_out))


def way(
    direction: str, tall: torch.Tensor, weight: torch.Tensor, factor: torch.dtype, r: int, dropout: bool
) -> Way:  # fmt: skip
    """Returns the way of a layer's forward (``tall`` is x) or backward (``tall`` is dy). Assumed choices come first,
    then the measured GEMM, then the estimate. If the fused GEMM cannot stream its operands, cuBLAS computes the
    GEMM."""
    d_out, d_in = weight.shape
    call = Call(len(tall), d_in, d_out, r, tall.dtype, factor, dropout)
    gemm = _gemm(direction, tall, weight, r, dropout)
    return best(direction, call, tiles.limits(tall.device), tiles.assumed("thin"), gemm, device.carveout())


def strategy(
    direction: str, left: torch.Tensor, weight: torch.Tensor, factor: torch.dtype, r: int, dropout: bool
) -> str:
    """Returns the strategy of the GEMM alone: y from x and S, or dx from dy and dS."""
    d_out, d_in = weight.shape
    call = Call(len(left), d_in, d_out, r, left.dtype, factor, dropout)
    gemm = _gemm(direction, left, weight, r, dropout)
    return best(direction, call, tiles.limits(left.device), "pass", gemm, device.carveout()).gemm


def project_way(x: torch.Tensor, factor: torch.dtype, r: int, dropout: bool) -> Way:
    """Returns the way of S alone, whole: no update is to add its parts."""
    n_tokens, d_in = x.shape
    call = Call(n_tokens, d_in, d_in, r, x.dtype, factor, dropout)
    assumed = tiles.assumed("thin")
    thin = "short" if assumed == "split" else assumed
    card, carved_out = tiles.limits(x.device), device.carveout()
    possible = [way for way in ways("forward", call) if way.gemm == "cublas" and way.thin != "split"]
    allowed = [way for way in possible if way.thin == thin] or possible
    return min(allowed, key=lambda way: estimate(way, call, card, carved_out))


def thin_way(dy: torch.Tensor, d_in: int, factor: torch.dtype, r: int, dropout: bool) -> Way:
    """Returns the way of a layer's backward without dx, whose thin products are those of the whole backward."""
    call = Call(len(dy), d_in, dy.shape[1], r, dy.dtype, factor, dropout)
    return best("backward", call, tiles.limits(dy.device), tiles.assumed("thin"), "cublas", device.carveout())


def group_strategy(dys: Sequence[torch.Tensor], weights, factor: torch.dtype, r: int, dropout: bool) -> str:
    """Returns the strategy of the GEMM that computes dx of a group, "fused" or "cublas". ``r``: the largest rank. It is
    "cublas" if that was measured, or is the only one that can stream its operands, for any member, and on sm_100, whose
    tensor memory leaves "fused" narrow tiles (tiles.py). The estimate is that of one layer with all members' outputs
    and masks; cuBLAS reads and writes dx once more for each further member."""
    (n_tokens, _), d_in, d_out = dys[0].shape, weights[0].shape[1], sum(map(len, weights))
    card, again = tiles.limits(dys[0].device), len(dys) - 1
    chosen = {_gemm("backward", dy, weight, r, dropout) for dy, weight in zip(dys, weights, strict=True)}
    narrow = 100 <= card.arch < 120 and not tiles.assumed("strategy")
    if "cublas" in chosen or narrow:
        return "cublas"
    if None not in chosen:
        return "fused"
    call = Call(n_tokens, d_in, d_out, r, dys[0].dtype, factor, dropout)
    costs = CostModel(call, card, device.carveout())
    fused = costs.gemm("fused", d_out, d_in, dropout, op="group_grad_x")
    fused += again * dropout * n_tokens * d_in / (MASK_RATE * costs.used)
    cublas = costs.gemm("cublas", d_out, d_in, dropout) + again * costs.memory(2.0 * n_tokens * d_in * costs.size)
    return "fused" if fused <= cublas else "cublas"


def _gemm(direction: str, left: torch.Tensor, weight: torch.Tensor, r: int, dropout: bool) -> str | None:
    """Returns the GEMM's strategy if it is assumed, measured, or the only one that can stream its operands, else
    None."""
    forward = direction == "forward"
    k, width = weight.shape[::-1] if forward else weight.shape
    assumed = tiles.assumed("strategy")
    if assumed:
        return assumed
    measured = tiles.measured(tiles.gemm(forward, dropout), left, k, width, r)
    streams = tiles.streams(left, weight, width)
    runs = {"fused": streams, "gluon": tiles.takes_gluon(left, weight, width), "cublas": True}
    if measured and runs[measured]:  # it may have been measured with other strides
        return measured
    return None if streams else "cublas"
