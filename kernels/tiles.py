"""Tile configurations: the layer's by (op, element size, arch, rank), the grouped step's by (op, rank). Nothing here is
measured at run time; what ``lora-fast tune`` has measured before (tuned.py) comes first for the layer.

Every row compiles without spills for sm_80, sm_90 and sm_100 (tests/test_compiled.py says at which ranks). Which tiles
are fastest, and FUSED_UP_TO, is not verified on a GPU.
"""

from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from . import tuned

PROGRAMS = 120  # programs that a split reduction aims at: about one wave, the same number on every device
SUM_BLOCK = 1024  # elements a program of lora_sum_partials_kernel adds
GROUP = 8  # row tiles of the GEMM that share columns of W in L2
INTERPRETED_ARCH = 80
INTERPRETED_MULTIPROCESSORS = 2


class Tile(NamedTuple):
    t: int  # tokens
    outer: int  # columns that a program owns (of the result, or of the tensor it reduces)
    inner: int  # columns of one step of the contraction
    r: int  # rank columns in one product
    warps: int
    stages: int


# (op, bytes of an element, first arch it is for) → rows (largest rank class, tokens, outer, inner, warps, stages)
TABLE = {
    ("project", 2, 80): [
        (16, 64, 0, 128, 4, 4),
        (64, 64, 0, 128, 8, 3),
        (128, 64, 0, 64, 8, 3),
        (256, 64, 0, 64, 8, 2),
    ],
    ("project_short", 2, 80): [(64, 16, 0, 128, 4, 4), (256, 16, 0, 64, 8, 3)],
    ("project_short", 2, 100): [(64, 16, 0, 128, 8, 4), (256, 16, 0, 64, 8, 3)],
    ("grad_s_b", 2, 80): [
        (16, 32, 512, 0, 8, 3),
        (64, 64, 128, 0, 8, 3),
        (128, 32, 64, 0, 8, 3),
        (256, 16, 64, 0, 8, 2),
    ],
    ("grad_s_b", 2, 90): [
        (16, 32, 512, 0, 8, 3),
        (64, 64, 256, 0, 8, 3),
        (128, 64, 128, 0, 8, 3),
        (256, 16, 64, 0, 8, 2),
    ],
    ("grad_a", 2, 80): [(16, 32, 512, 0, 8, 3), (64, 64, 256, 0, 8, 3), (256, 64, 128, 0, 8, 3)],
    ("grad_a", 2, 100): [(16, 32, 256, 0, 8, 3), (64, 64, 256, 0, 8, 3), (256, 64, 128, 0, 8, 3)],
    ("linear", 2, 80): [(256, 128, 128, 32, 8, 3)],
    ("linear_dropout", 2, 80): [(256, 128, 64, 32, 8, 3)],
    ("linear_tma", 2, 90): [(256, 128, 256, 64, 8, 3)],
    ("linear_tma", 2, 100): [(16, 128, 256, 64, 8, 3), (256, 128, 128, 64, 8, 4)],
    ("linear_tma_dropout", 2, 90): [(256, 128, 128, 64, 8, 4)],
    ("linear_tma_dropout", 2, 100): [(16, 128, 128, 64, 8, 4), (256, 64, 128, 64, 4, 4)],
    ("update", 2, 80): [(256, 64, 128, 0, 8, 1)],
    ("update", 2, 100): [(256, 64, 128, 0, 4, 1)],
    ("project", 4, 80): [
        (16, 32, 0, 64, 4, 2),
        (64, 32, 0, 32, 8, 2),
        (128, 32, 0, 32, 4, 2),
        (256, 32, 0, 32, 8, 2),
    ],
    ("project_short", 4, 80): [(64, 16, 0, 64, 4, 2), (256, 16, 0, 32, 8, 2)],
    ("grad_s_b", 4, 80): [(16, 32, 64, 0, 4, 2), (64, 32, 64, 0, 8, 2), (256, 16, 32, 0, 8, 2)],
    ("grad_a", 4, 80): [(16, 32, 64, 0, 4, 2), (128, 16, 32, 0, 8, 2), (256, 32, 64, 0, 4, 2)],
    ("linear", 4, 80): [(256, 32, 64, 32, 8, 2)],
    ("linear", 4, 90): [(256, 32, 64, 32, 4, 2)],
    ("linear_dropout", 4, 80): [(256, 64, 64, 32, 8, 2)],
    ("update", 4, 80): [(256, 32, 64, 0, 8, 1)],
    ("update", 4, 100): [(256, 32, 64, 0, 4, 1)],
}


class GroupedTile(NamedTuple):
    d: int  # rows of d in one step
    r: int  # rank columns of one tile
    chunk: int  # rows of d that a program walks: the order of summation, so it must not depend on the device
    warps: int
    stages: int


# op → rows (largest rank class, d, r, chunk, warps, stages)
GROUPED = {
    "gram": [
        (16, 64, 16, 2048, 4, 3),
        (32, 32, 32, 4096, 4, 3),
        (64, 16, 64, 8192, 8, 2),
        (256, 16, 64, 8192, 8, 2),
    ],
    "step": [
        (1, 2048, 1, 4096, 8, 1),
        (16, 128, 16, 512, 8, 1),
        (32, 64, 32, 512, 8, 1),
        (64, 32, 64, 1024, 8, 1),
        (128, 16, 128, 1024, 8, 1),
        (256, 16, 256, 1024, 8, 1),
    ],
    "transform": [
        (16, 128, 16, 512, 8, 1),
        (32, 64, 32, 512, 8, 1),
        (64, 16, 64, 1024, 8, 1),
        (128, 16, 128, 1024, 8, 1),
        (256, 16, 256, 1024, 8, 1),
    ],
}
SHORT = 2048  # up to this many tokens project takes smaller blocks, so that enough programs read x
GEMM_RANK = 32  # the GEMM takes larger ranks in steps of this

# Longest contraction at which the Triton GEMM is chosen over cuBLAS + in-place update; 16-bit elements only.
FUSED_UP_TO = {80: 4096, 90: 8192, 100: 0}

_assumed: dict = {}


@contextmanager
def assume(arch: int | None = None, strategy: str | None = None, tma: bool | None = None):
    """For tests, inspection and the ahead-of-time build: choose tiles as on this arch (80, 90, 100, …), this GEMM
    strategy, and no TMA where ``tma`` is False."""
    before = dict(_assumed)
    given = {"arch": arch, "strategy": strategy, "tma": tma}
    _assumed.update({key: value for key, value in given.items() if value is not None})
    try:
        yield
    finally:
        _assumed.clear()
        _assumed.update(before)


def arch(device: torch.device) -> int:
    """Compute capability as one number: 80, 90, 100, …"""
    if "arch" in _assumed:
        return _assumed["arch"]
    return _arch(device.index) if device.type == "cuda" else INTERPRETED_ARCH


@lru_cache
def _arch(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise RuntimeError(
            f"lora_fast: expected a GPU of sm_80 (Ampere) or later, got sm_{major}{minor}: "
            "lf.set_backend('torch') runs plain torch on it"
        )
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    return _multiprocessors(device.index) if device.type == "cuda" else INTERPRETED_MULTIPROCESSORS


@lru_cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@lru_cache
def _tile(op: str, element_size: int, arch: int, r: int, largest_r: int = 256) -> Tile:
    return _with_rank(_row(op, element_size, arch, r), r, largest_r)


def _row(op: str, element_size: int, arch: int, r: int) -> tuple[int, ...]:
    """t, outer, inner, warps, stages of the table's row."""
    first_arch = max(first for name, size, first in TABLE if (name, size) == (op, element_size) and first <= arch)
    rank_class = rank_block(r)
    return next(row for row in TABLE[op, element_size, first_arch] if rank_class <= row[0])[1:]


def _with_rank(row: tuple[int, ...], r: int, largest_r: int = 256) -> Tile:
    t, outer, inner, warps, stages = row
    return Tile(t, outer, inner, min(rank_block(r), largest_r), warps, stages)


def rank_block(r: int) -> int:
    """Columns that hold r: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(r))


def _tuned(op: str, tensor: torch.Tensor, d_in: int, d_out: int, r: int) -> tuned.Choice | None:
    """Nothing while another arch or strategy is assumed."""
    return None if _assumed else tuned.find(op, tensor, d_in, d_out, r)


def grouped(op: str, r: int) -> GroupedTile:
    """``r``: the largest rank of the launch; 1 only for elementwise work (products need 16 columns)."""
    rank_class = triton.next_power_of_2(r)
    return GroupedTile(*next(row for row in GROUPED[op] if rank_class <= row[0])[1:])


def project(x: torch.Tensor, r: int) -> Tile:
    if measured := _tuned("project", x, x.shape[1], 0, r):
        return _with_rank(measured, r)
    op = "project_short" if x.shape[0] <= SHORT else "project"
    return _tile(op, x.element_size(), arch(x.device), r)


def grad_s_b(dy: torch.Tensor, r: int) -> Tile:
    if measured := _tuned("grad_s_b", dy, 0, dy.shape[1], r):
        return _with_rank(measured, r)
    return _tile("grad_s_b", dy.element_size(), arch(dy.device), r)


def grad_a(x: torch.Tensor, r: int) -> Tile:
    if measured := _tuned("grad_a", x, x.shape[1], 0, r):
        return _with_rank(measured, r)
    return _tile("grad_a", x.element_size(), arch(x.device), r)


def linear(left: torch.Tensor, d_out: int, r: int, forward: bool, tma: bool, dropout: bool) -> Tile:
    """Of the fused GEMM, left (n_tokens, d_in) to (n_tokens, d_out); not forward: dx from dy."""
    if measured := _tuned(gemm(forward, dropout) + ("_tma" if tma else "_pointer"), left, left.shape[1], d_out, r):
        return _with_rank(measured, r, GEMM_RANK)
    op = "linear" + "_tma" * tma + "_dropout" * dropout
    return _tile(op, left.element_size(), arch(left.device), r, GEMM_RANK)


def candidates(op: str, element_size: int, arch: int, r: int) -> list[tuple[int, ...]]:
    """Tiles (t, outer, inner, warps, stages) worth measuring for a row of TABLE: the default, every row for this rank
    and arch or an older one, and the default with one number changed. Not all of them fit on every device."""
    default = _row(op, element_size, arch, r)
    found = [default]
    for (name, size, first), rows in TABLE.items():
        if (name, size) == (op, element_size) and first <= arch:
            found += [row[1:] for row in rows if rank_block(r) <= row[0]]
    for i, value in enumerate(default):
        is_stages, is_warps = i == 4, i == 3
        for other in (value - 1, value + 1) if is_stages else (value // 2, value * 2):
            if 1 <= other <= 6 if is_stages else 4 <= other <= 8 if is_warps else 16 <= other <= 512:
                found.append((*default[:i], other, *default[i + 1 :]))
    return list(dict.fromkeys(found))


def gemm(forward: bool, dropout: bool) -> str:
    """Its name in tuned.py: forward has no mask of its own, S carries it."""
    return "linear" if forward else "grad_x" + "_dropout" * dropout


def update(result: torch.Tensor, r: int) -> Tile:
    return _tile("update", result.element_size(), arch(result.device), r, GEMM_RANK)


def strategy(left: torch.Tensor, d_out: int, r: int, forward: bool, dropout: bool) -> str:
    """``"fused"`` or ``"cublas"`` (see linear.py), of the GEMM from left (n_tokens, d_in) to (n_tokens, d_out)."""
    if "strategy" in _assumed:
        return _assumed["strategy"]
    if measured := _tuned(gemm(forward, dropout), left, left.shape[1], d_out, r):
        return measured
    first_arch = max(first for first in FUSED_UP_TO if first <= arch(left.device))
    return "fused" if left.element_size() == 2 and left.shape[1] <= FUSED_UP_TO[first_arch] else "cublas"


def uses_tma(*matrices: torch.Tensor) -> bool:
    """TMA reads 16-bit matrices from sm_90 on, where addresses and rows are multiples of 16 bytes."""
    return arch(matrices[0].device) >= 90 and _assumed.get("tma", True) and all(
        m.element_size() == 2 and m.data_ptr() % 16 == 0 and m.stride(0) % 8 == 0 and m.stride(0) >= m.shape[1] > 0
        for m in matrices
    )
