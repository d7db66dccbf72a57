"""Which way a layer's call takes: an estimate of every way's time, and the way with the least.

Forward   S in one "pass" over x, "short" by smaller blocks of tokens, or "split" into parts that the update adds
          (project.py), or by "cublas" (cublas.py); then the GEMM "fused", by "cublas" with an update, or by "gluon"
          (gemm.py).
Backward  dS and db in one "pass" over dy (grads.py) or by "cublas", which reads dy twice (cublas.py); da in one pass
          over x, ours or cuBLAS's; then the GEMM for dx.
Estimate  of the device's time, from bytes, operations and launches. Where memory is the clock the fewest bytes win; a
          persistent GEMM pays for a last wave of tiles that not all multiprocessors share; among few tokens a launch
          less wins. An estimate is not a measurement: that is what ``lora-fast tune`` is for, and its choices come
          first.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import NamedTuple

import torch

from .. import device, tiles
from ..tiles import rank_block


class Rates(NamedTuple):
    """Of a card: bytes a second; cuBLAS's operations a second in 16 bits and in float32 without TF32; the share of
    cuBLAS's rate that a tile of the fused GEMM reaches."""

    bandwidth: float
    half: float
    single: float
    fused: float


# H100: 3.35 TB/s; cuBLAS reaches 590 to 690 TFLOP/s; the pipelined GEMM 0.93 to 0.96 of it and Gluon's 0.97 to 1.0,
# estimated from their compiled loops. The other archs: data sheets, at the H100's share of the peak; their last
# column is a guess.
RATES = {
    80: Rates(1.55e12, 210e12, 15e12, 0.90),
    86: Rates(0.94e12, 47e12, 24e12, 0.90),
    89: Rates(1.01e12, 110e12, 55e12, 0.90),
    90: Rates(3.35e12, 640e12, 45e12, 0.945),
    100: Rates(8.0e12, 1500e12, 55e12, 0.70),
    120: Rates(1.79e12, 140e12, 70e12, 0.90),
}
GLUON = 0.985
LAUNCH = 2.5e-6  # seconds of a launch that does next to nothing
L2 = 2.5  # what L2 gives over what memory gives; and what one multiprocessor can draw over its share of the memory's
MASK = 2.2e10  # elements of a dropout mask that a multiprocessor draws in a second
STREAM = 0.9  # of the memory's bandwidth that a thin pass reaches, ours or cuBLAS's: a guess
SINGLE = 0.6  # of cuBLAS's float32 rate that our thin passes reach: a guess
CUBLAS_TILES = ((128, 256, 1.0), (128, 128, 0.95), (64, 128, 0.85), (64, 64, 0.65))  # tokens, columns, share of rate
SPLIT_K = 0.85  # of the multiprocessors that cuBLAS keeps busy by splitting a sum, where there are fewer tiles


class Call(NamedTuple):
    """A layer's call. ``factor``: the dtype of a and b."""

    n_tokens: int
    d_in: int
    d_out: int
    r: int
    dtype: torch.dtype
    factor: torch.dtype
    dropout: bool

    @property
    def wide(self) -> bool:
        """Whether S and dS are float32 beside 16-bit activations."""
        return self.dtype.itemsize == 2 and self.factor is not self.dtype


class Way(NamedTuple):
    """``direction``: "forward" or "backward"; ``thin`` and ``gemm`` as above."""

    direction: str
    thin: str
    gemm: str


def estimate(way: Way, call: Call, found: device.Device) -> float:
    """Seconds that the device takes for a layer's forward or backward by this way."""
    clock = Clock(call, found)
    if way.direction == "forward":
        n_parts = clock.parts_of_few() if way.thin == "split" else 1
        own = way.thin != "cublas"
        thin = clock.project(way.thin, n_parts) if own else clock.cublas_thin(call.d_in, call.n_tokens)
        return thin + clock.gemm(way.gemm, call.d_in, call.d_out, masked=False, n_parts=n_parts)
    if way.thin == "cublas":
        thin = clock.cublas_thin(call.d_out, call.n_tokens) + clock.cublas_thin(call.d_out, call.d_out)
        own = call.dropout or call.wide
        thin += clock.grad_a() if own else clock.cublas_thin(call.d_in, call.d_in)
    else:
        thin = clock.grad_s_b() + clock.grad_a()
    return thin + clock.gemm(way.gemm, call.d_out, call.d_in, masked=call.dropout)


class Clock:
    """Seconds of the pieces that a call's ways are made of, on one device."""

    def __init__(self, call: Call, found: device.Device):
        self.call, self.found = call, found
        self.rates = RATES[max(arch for arch in RATES if arch <= found.arch)]
        self.size, self.factor_size = call.dtype.itemsize, call.factor.itemsize
        self.thin_size = 4 if call.wide else self.size
        self.products = 1 if not call.wide else 2 if call.dtype is torch.bfloat16 else 4

    def cublas(self, t: int, k: int, n: int) -> float:
        """(t, k) × (k, n) by the best of its tiles."""
        rate = self.rates.half if self.size == 2 else self.rates.single
        by_tiles = min(self._tiled(t, k, n, tile, rate * share, SPLIT_K) for *tile, share in CUBLAS_TILES)
        return LAUNCH + max(by_tiles, (t * k + k * n + t * n) * self.size / self.rates.bandwidth)

    def gemm(self, gemm: str, k: int, n: int, masked: bool, n_parts: int = 1) -> float:
        """left (n_tokens, k) to (n_tokens, n), with the thin product in it or added; ``masked``: through the mask;
        ``n_parts``: partial sums that thin comes in."""
        t, r = self.call.n_tokens, self.call.r
        if gemm == "cublas":
            tile = tiles.default("update" + "_few" * (n_parts > 1), self.size, self.found, r)
            columns = -(-n // tile.outer)  # programs that read S, each all of its tokens'
            moved = t * (2.0 * n * self.size + n_parts * r * 4.0) + r * n * self.factor_size
            again = (columns - 1) * t * n_parts * r * 4.0
            return self.cublas(t, k, n) + self.memory(moved, t * n, columns * -(-t // tile.t), again, masked)
        if gemm == "gluon":
            tile, rate = (128, 256), GLUON * self.rates.half
        else:
            name = "linear" + "_tma" * (self.size == 2 and self.found.arch >= 90) + "_dropout" * masked
            tile = tiles.row(name, self.size, self.found, r)[:2]
            rate = self.rates.fused * self.rates.half if self.size == 2 else SINGLE * self.rates.single
        seconds = self._tiled(t, k + rank_block(r), n, tile, rate)
        if gemm == "fused":  # "gluon" draws the mask beside its products
            seconds += masked * t * n / (MASK * self.found.multiprocessors)
        return LAUNCH + max(seconds, (t * k + k * n + t * n) * self.size / self.rates.bandwidth)

    def parts_of_few(self) -> int:
        """Partial sums of S where d_in is split."""
        t, d_in = self.call.n_tokens, self.call.d_in
        tile = tiles.default("project_short" + "_wide" * self.call.wide, self.size, self.found, self.call.r)
        return tiles.split_of_few(t, d_in, self.call.r, tile)[0]

    def project(self, thin: str, splits: int) -> float:
        """S, or so many partial sums of it, by one pass over x."""
        t, d_in, r = self.call.n_tokens, self.call.d_in, self.call.r
        name = "project" + "_short" * (thin != "pass") + "_wide" * self.call.wide
        tile = tiles.default(name, self.size, self.found, r)
        blocks = -(-t // tile.t)
        moved = t * d_in * self.size + r * d_in * self.factor_size + splits * t * r * self.thin_size
        of_ranks = -(-r // tile.r)  # each reads x again, every block of tokens reads a again, from L2
        again = (blocks - 1) * r * d_in * self.factor_size + (of_ranks - 1) * t * d_in * self.size
        return self.memory(moved, t * d_in, blocks * splits * of_ranks, again, self.call.dropout)

    def grad_s_b(self) -> float:
        """dS and db by one pass over dy."""
        t, d_out, r = self.call.n_tokens, self.call.d_out, self.call.r
        chunks, splits = self._splits(tiles.grad_s_b_row(self.call.dtype, self.call.wide), d_out)
        once = t * d_out * self.size + t * r * self.thin_size + d_out * r * self.factor_size
        return self._in_parts(once, 2 * t * d_out, chunks * splits, [(chunks, t * r), (splits, d_out * r)], False)

    def grad_a(self) -> float:
        """da by one pass over x."""
        t, d_in, r = self.call.n_tokens, self.call.d_in, self.call.r
        chunks, splits = self._splits("grad_a" + "_wide" * self.call.wide, d_in)
        once = t * d_in * self.size + t * r * self.thin_size
        return self._in_parts(once, t * d_in, chunks * splits, [(splits, r * d_in)], self.call.dropout)

    def cublas_thin(self, width: int, out: int) -> float:
        """One thin product by cuBLAS: of a tall (n_tokens, width) with ``out`` rows of the result. Few tiles of a long
        sum cuBLAS may split and add in a launch more: half a launch. Of a wide factor, both halves are the columns of
        one product; to make them and to add theirs are launches of their own."""
        t, r = self.call.n_tokens, self.call.r
        other, columns = (t + width - out) * r, r * (2 if self.call.wide else 1)
        moved = t * width * self.size + other * self.size * columns / r + out * columns * self.thin_size
        rate = self.rates.half if self.size == 2 else self.rates.single
        long_sum = (width if out == t else t) > 2048
        launch, moving = (1.5 if long_sum else 1.0) * LAUNCH, moved / (STREAM * self.rates.bandwidth)
        seconds = launch + max(moving, 2.0 * t * width * columns / rate)
        return seconds + (self.memory(8.0 * other) + self.memory(12.0 * out * r) if self.call.wide else 0.0)

    def memory(
        self, moved: float, products: float = 0.0, programs: float = inf, again: float = 0.0, masked: bool = False
    ) -> float:
        """A launch of ours that moves bytes, ``again`` as many within L2, multiplies ``products`` elements by the rank
        columns, and draws their mask."""
        rate = self.rates.half if self.size == 2 else SINGLE * self.rates.single
        busy = min(1.0, L2 * programs / self.found.multiprocessors)
        from_memory, from_l2 = moved / (STREAM * self.rates.bandwidth), again / (L2 * self.rates.bandwidth)
        return LAUNCH + max(
            (from_memory + from_l2 / 2) / busy,  # half of it beside the other
            2.0 * products * rank_block(self.call.r) * self.products / rate,
            masked * products / (MASK * min(programs, self.found.multiprocessors)),
        )

    def _splits(self, name: str, columns: int) -> tuple[int, int]:
        tile = tiles.default(name, self.size, self.found, self.call.r)
        return tiles.splits(self.call.n_tokens, columns, self.call.r, tile)[:2]

    def _in_parts(self, once: float, products: float, programs: int, sums: list[tuple[int, int]], masked: bool):
        """A pass whose results are summed over so many parts of so many numbers, and the launch that adds them."""
        parts = sum(4.0 * count * numel for count, numel in sums if count > 1)
        seconds = self.memory(once + parts, products, programs, masked=masked)
        return seconds + (self.memory(parts) if parts else 0.0)

    def _tiled(self, t: int, k: int, n: int, tile: tuple[int, int], rate: float, split_k: float = 0.0) -> float:
        """Tiles, each on one multiprocessor, in whole waves; with fewer than one wave split along k."""
        count = -(-t // tile[0]) * -(-n // tile[1])
        waves = -(-count // self.found.multiprocessors)
        if split_k and waves == 1:
            waves = min(1.0, count / self.found.multiprocessors / split_k)
        return waves * 2.0 * tile[0] * tile[1] * k * self.found.multiprocessors / rate


THIN = {"forward": ("pass", "short", "split", "cublas"), "backward": ("pass", "cublas")}
GEMMS = ("fused", "cublas")  # and "gluon", which is taken only where it was measured


def ways(direction: str, call: Call) -> list[Way]:
    """All that compute this call. cuBLAS takes no mask, and no float16 halves: of a float32 factor of any size there
    are none."""
    masked = direction == "forward" and call.dropout
    left_out = {
        "cublas": masked or (call.wide and call.dtype is not torch.bfloat16),
        "split": call.n_tokens > tiles.FEW,
    }
    thin = [thin for thin in THIN[direction] if not left_out.get(thin)]
    return [Way(direction, t, gemm) for t in thin for gemm in GEMMS if t != "split" or gemm == "cublas"]


@lru_cache(maxsize=4096)
def best(direction: str, call: Call, found: device.Device, thin: str | None = None, gemm: str | None = None) -> Way:
    """The way with the least estimate: of those with this ``gemm``, and this ``thin`` as far as there are any, where
    they are given."""
    considered = ways(direction, call)
    if gemm == "gluon":  # taken only where it was measured or is assumed
        considered = [way._replace(gemm=gemm) for way in considered if way.gemm == "fused"]
    allowed = [way for way in considered if gemm in (None, way.gemm)]
    allowed = [way for way in allowed if way.thin == thin] or allowed
    return min(allowed, key=lambda way: estimate(way, call, found))


def way(
    direction: str, tall: torch.Tensor, weight: torch.Tensor, factor: torch.dtype, r: int, dropout: bool
) -> Way:  # fmt: skip
    """The way of a layer's forward (``tall``: x) or backward (dy): what is assumed, else (the GEMM) measured, else
    estimated. What the fused GEMM cannot stream is cuBLAS's."""
    d_out, d_in = weight.shape
    call = Call(len(tall), d_in, d_out, r, tall.dtype, factor, dropout)
    gemm = _gemm(direction, tall, weight, r, dropout)
    return best(direction, call, tiles.limits(tall.device), tiles.assumed("thin"), gemm)


def strategy(
    direction: str, left: torch.Tensor, weight: torch.Tensor, factor: torch.dtype, r: int, dropout: bool
) -> str:
    """The GEMM alone: y from x and S, or dx from dy and dS."""
    d_out, d_in = weight.shape
    call = Call(len(left), d_in, d_out, r, left.dtype, factor, dropout)
    gemm = _gemm(direction, left, weight, r, dropout)
    return best(direction, call, tiles.limits(left.device), "pass", gemm).gemm


def _gemm(direction: str, left: torch.Tensor, weight: torch.Tensor, r: int, dropout: bool) -> str | None:
    """The GEMM, where it is assumed, measured, or the only one that can stream its operands."""
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
