"""Tile configurations of the layer by (op, element size, arch, shared memory, rank), and of the grouped step by
(op, rank). Nothing is measured at run time. For the layer, results of ``lora-fast tune`` (tuned.py) take precedence.

Every row compiles without spills for the archs of ``device.CARDS`` (tests/kernels/test_compiler.py lists the ranks).
Which tiles are fastest is not verified on a GPU.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from . import device, tuned
from .scopes import Scopes

PROGRAMS = 120  # programs that a split reduction aims at: about one wave, the same number on every device
SPLIT_STEPS = 4  # fewest steps of a split reduction's program: with fewer the launch that adds the sums does not pay
SUM_BLOCK = 1024  # elements that a program of lora_sum_partials_kernel adds
GROUP = 8  # row tiles of the GEMM that share columns of W in L2
INTERPRETED_MULTIPROCESSORS = 2
GLUON_ARCH = 90  # the only arch that linear/gluon_gemm.py is written for


class Tile(NamedTuple):
    """Block sizes of a layer's kernel. A kernel without ``outer`` or ``inner`` has 0 there."""

    t: int  # tokens
    outer: int  # columns that a program owns (of the result, or of the tensor it reduces)
    inner: int  # columns of one step of the contraction
    r: int  # rank columns in one product
    warps: int
    stages: int

    def options(self, outer: str = "BLOCK_OUT") -> dict[str, int]:
        """Returns the block sizes as a kernel's constexprs, together with the compiler's options. ``outer`` is the
        constexpr for the columns that a program owns."""
        blocks = ("BLOCK_T", self.t), (outer, self.outer), ("BLOCK_IN", self.inner), ("BLOCK_R", self.r)
        used = {name: size for name, size in blocks if size}
        return used | {"num_warps": self.warps, "num_stages": self.stages}


# (op, bytes of an element, oldest arch, largest shared memory of a block in KiB) → rows (largest rank class, tokens,
# outer, inner, warps, stages). Among the entries that a device can run, the one with the latest arch is used, and among
# these the one with the most memory. "_wide" means that factors, S or dS are float32 beside 16-bit activations.
TABLE = {
    ("project", 2, 80, 99): [
        (16, 64, 0, 128, 4, 3),
        (64, 64, 0, 64, 8, 3),
        (128, 64, 0, 64, 8, 2),
        (256, 64, 0, 32, 8, 2),
    ],
    ("project", 2, 80, 163): [
        (16, 64, 0, 128, 4, 4),
        (64, 64, 0, 128, 8, 3),
        (128, 64, 0, 64, 8, 3),
        (256, 64, 0, 64, 8, 2),
    ],
    ("project_wide", 2, 80, 99): [
        (16, 64, 0, 64, 4, 3),
        (64, 64, 0, 32, 8, 3),
        (128, 64, 0, 32, 8, 2),
        (256, 32, 0, 32, 8, 2),
    ],
    ("project_short", 2, 80, 99): [(256, 16, 0, 128, 4, 4)],
    ("project_short", 2, 100, 227): [(256, 16, 0, 128, 8, 4)],
    ("project_short_wide", 2, 80, 99): [(256, 16, 0, 128, 4, 3)],
    ("project_short_wide", 2, 100, 227): [(256, 16, 0, 128, 8, 3)],
    ("grad_s_b", 2, 80, 99): [
        (16, 32, 512, 0, 8, 2),
        (64, 64, 128, 0, 8, 3),
        (128, 32, 64, 0, 8, 3),
        (256, 16, 64, 0, 8, 2),
    ],
    ("grad_s_b", 2, 80, 163): [
        (16, 32, 512, 0, 8, 3),
        (64, 64, 128, 0, 8, 3),
        (128, 32, 64, 0, 8, 3),
        (256, 16, 64, 0, 8, 2),
    ],
    ("grad_s_b", 2, 90, 227): [
        (16, 32, 512, 0, 8, 3),
        (64, 64, 256, 0, 8, 3),
        (128, 64, 128, 0, 8, 3),
        (256, 16, 64, 0, 8, 2),
    ],
    ("grad_s_b_wide", 2, 80, 99): [
        (16, 32, 256, 0, 8, 3),
        (64, 32, 128, 0, 8, 3),
        (128, 32, 64, 0, 8, 2),
        (256, 16, 32, 0, 8, 2),
    ],
    # float16 activations are split into two bfloat16 halves as well, so a step has four products.
    ("grad_s_b_wide_float16", 2, 80, 99): [
        (16, 32, 128, 0, 8, 3),
        (32, 32, 64, 0, 8, 3),
        (128, 32, 32, 0, 8, 2),
        (256, 16, 32, 0, 8, 2),
    ],
    ("grad_a", 2, 80, 99): [(16, 32, 256, 0, 8, 3), (64, 64, 128, 0, 8, 3), (256, 32, 128, 0, 8, 2)],
    ("grad_a", 2, 80, 163): [
        (16, 32, 512, 0, 8, 3),
        (64, 64, 256, 0, 8, 3),
        (256, 64, 128, 0, 8, 3),
        (512, 32, 128, 0, 8, 2),
    ],
    ("grad_a", 2, 100, 227): [(16, 32, 256, 0, 8, 3), (64, 64, 256, 0, 8, 3), (256, 64, 128, 0, 8, 3)],
    ("grad_a_wide", 2, 80, 99): [(16, 32, 256, 0, 8, 3), (64, 32, 128, 0, 8, 3), (256, 32, 64, 0, 8, 2)],
    ("expert_grads", 2, 80, 99): [(16, 64, 128, 0, 4, 3), (64, 64, 128, 0, 8, 3), (256, 32, 128, 0, 8, 3)],
    ("expert_grads_wide", 2, 80, 99): [(16, 32, 128, 0, 4, 3), (64, 32, 128, 0, 8, 3), (256, 32, 64, 0, 8, 2)],
    # On sm_100 the accumulators of float16's four products do not fit into tensor memory, if each has 256 ranks. Blocks
    # of fewer than 64 columns use registers instead.
    ("expert_grads_wide", 2, 100, 227): [(64, 32, 128, 0, 8, 3), (128, 32, 64, 0, 8, 2), (256, 32, 32, 0, 8, 2)],
    ("weight_norms", 2, 80, 99): [(16, 0, 32, 128, 4, 3), (256, 0, 32, 64, 4, 3)],
    ("weight_norms_wide", 2, 80, 99): [(16, 0, 32, 128, 4, 3), (256, 0, 32, 64, 4, 2)],
    ("linear", 2, 80, 99): [(256, 128, 128, 32, 8, 3)],
    ("linear", 2, 120, 99): [(64, 128, 128, 32, 8, 3), (128, 64, 128, 32, 8, 3), (256, 128, 128, 32, 8, 3)],
    ("linear_dropout", 2, 80, 99): [(256, 128, 64, 32, 8, 3)],
    ("linear_tma", 2, 90, 99): [(256, 128, 128, 32, 8, 3)],
    ("linear_tma", 2, 90, 227): [(256, 128, 256, 64, 8, 3)],
    ("linear_tma", 2, 100, 227): [(256, 128, 128, 64, 8, 4)],
    ("linear_tma_dropout", 2, 90, 99): [(256, 128, 64, 32, 8, 3)],
    ("linear_tma_dropout", 2, 90, 227): [(64, 128, 256, 64, 8, 3), (256, 128, 128, 64, 8, 4)],
    ("linear_tma_dropout", 2, 100, 227): [(16, 128, 128, 64, 8, 4), (256, 64, 128, 64, 4, 4)],
    ("group_grad_x", 2, 80, 99): [(256, 128, 128, 32, 8, 3)],
    ("group_grad_x_dropout", 2, 80, 99): [(256, 128, 64, 32, 8, 3)],
    ("group_grad_x_tma", 2, 90, 99): [(256, 128, 128, 32, 8, 3)],
    ("group_grad_x_tma", 2, 90, 227): [(256, 128, 256, 64, 8, 3)],
    # On sm_100 the accumulator of every product is in tensor memory, which holds those of narrow tiles only.
    ("group_grad_x", 2, 100, 227): [(256, 128, 16, 32, 8, 3)],
    ("group_grad_x_dropout", 2, 100, 227): [(256, 128, 16, 32, 8, 3)],
    ("group_grad_x_tma", 2, 100, 227): [(16, 128, 16, 64, 8, 4), (256, 128, 32, 64, 8, 4)],
    ("group_grad_x_tma_dropout", 2, 100, 227): [(16, 128, 16, 64, 8, 4), (256, 128, 32, 64, 8, 4)],
    ("group_grad_x_tma_dropout", 2, 90, 99): [(256, 128, 64, 32, 8, 3)],
    ("group_grad_x_tma_dropout", 2, 90, 227): [(256, 128, 64, 64, 8, 4)],
    ("four_bit", 2, 80, 99): [(256, 128, 128, 32, 8, 3)],
    ("four_bit_dropout", 2, 80, 99): [(256, 128, 64, 32, 8, 3)],
    ("four_bit_tma", 2, 90, 99): [(256, 128, 128, 32, 8, 3)],
    ("four_bit_tma", 2, 90, 227): [(256, 256, 128, 64, 8, 3)],
    ("four_bit_tma", 2, 100, 227): [(256, 128, 128, 64, 8, 4)],
    ("four_bit_tma_dropout", 2, 90, 99): [(256, 128, 64, 32, 8, 3)],
    ("four_bit_tma_dropout", 2, 90, 227): [(32, 256, 128, 64, 8, 3), (256, 256, 64, 64, 8, 4)],
    ("four_bit_tma_dropout", 2, 100, 227): [(16, 128, 128, 64, 8, 4), (256, 64, 128, 64, 4, 4)],
    ("update", 2, 80, 99): [(256, 64, 128, 0, 8, 1)],
    ("update", 2, 100, 227): [(256, 64, 128, 0, 4, 1)],
    ("update_few", 2, 80, 99): [(256, 16, 128, 0, 4, 1)],
    ("project", 4, 80, 99): [
        (16, 32, 0, 64, 4, 2),
        (64, 32, 0, 32, 8, 2),
        (128, 32, 0, 32, 4, 2),
        (256, 32, 0, 32, 8, 2),
    ],
    ("project_short", 4, 80, 99): [(256, 16, 0, 64, 4, 2)],
    ("grad_s_b", 4, 80, 99): [(16, 32, 64, 0, 4, 2), (64, 32, 64, 0, 8, 2), (256, 16, 32, 0, 8, 1)],
    ("grad_a", 4, 80, 99): [(16, 32, 64, 0, 4, 2), (128, 16, 32, 0, 8, 2), (256, 32, 64, 0, 8, 2)],
    ("expert_grads", 4, 80, 99): [(16, 32, 64, 0, 4, 2), (128, 16, 32, 0, 8, 2), (256, 32, 64, 0, 8, 2)],
    ("weight_norms", 4, 80, 99): [(16, 0, 32, 64, 4, 3), (256, 0, 32, 32, 8, 2)],
    ("linear", 4, 80, 99): [(256, 32, 64, 32, 8, 2)],
    ("linear", 4, 90, 227): [(256, 32, 64, 32, 4, 2)],
    ("linear_dropout", 4, 80, 99): [(256, 64, 64, 32, 8, 2)],
    ("group_grad_x", 4, 80, 99): [(256, 32, 64, 32, 8, 2)],
    ("group_grad_x_dropout", 4, 80, 99): [(256, 32, 64, 32, 8, 2)],
    ("four_bit", 4, 80, 99): [(256, 32, 64, 32, 8, 2)],
    ("four_bit_dropout", 4, 80, 99): [(256, 32, 64, 32, 8, 2)],
    ("update", 4, 80, 99): [(256, 32, 64, 0, 8, 1)],
    ("update", 4, 100, 227): [(256, 32, 64, 0, 4, 1)],
    ("update_few", 4, 80, 99): [(256, 16, 64, 0, 4, 1)],
}


class GroupedTile(NamedTuple):
    """Block sizes of a kernel that works on many factors (d, r) in one launch."""

    d: int  # rows of d in one step
    r: int  # rank columns of one tile
    chunk: int  # rows of d that a program walks; it fixes the order of summation, so it must not depend on the device
    warps: int
    stages: int

    def options(self, **block_sizes: int) -> dict[str, int]:
        """Returns the tile as a grouped kernel's constexprs and compiler options, with further block sizes."""
        blocks = {"CHUNK": self.chunk, "BLOCK_D": self.d, "BLOCK_R": self.r}
        return blocks | block_sizes | {"num_warps": self.warps, "num_stages": self.stages}


# op → rows (largest rank class, d, r, chunk, warps, stages)
GROUPED = {
    "gram": [
        (16, 32, 16, 2048, 2, 3),
        (32, 32, 32, 4096, 4, 3),
        (64, 16, 64, 8192, 8, 2),
        (256, 16, 64, 8192, 8, 2),
    ],
    "step": [
        (1, 2048, 1, 16384, 8, 1),
        (16, 64, 16, 512, 8, 1),
        (32, 32, 32, 512, 8, 1),
        (64, 32, 64, 1024, 8, 1),
        (128, 16, 128, 1024, 8, 1),
        (256, 16, 256, 1024, 8, 1),
    ],
    "product": [
        (16, 128, 16, 512, 8, 1),
        (32, 64, 32, 1024, 8, 1),
        (64, 16, 64, 2048, 8, 1),
        (128, 16, 128, 2048, 8, 1),
        (256, 16, 256, 2048, 8, 1),
    ],
    "transform": [
        (16, 128, 16, 512, 8, 1),
        (32, 64, 32, 512, 8, 1),
        (64, 16, 64, 1024, 8, 1),
        (128, 16, 128, 1024, 8, 1),
        (256, 16, 256, 1024, 8, 1),
    ],
}
SHORT = 2048  # up to this many tokens a call of project alone uses small blocks of tokens
FEW = 512  # up to this many tokens d_in may be split as well
FEW_NUMBERS = 3 << 13  # most partial sums of S that a program of the update adds: 96 KiB, read from L2
PARTIAL_NUMBERS = 1 << 18  # partial sums that a split reduction may always have: 1 MiB, which stays in L2
GEMM_RANK = 32  # the GEMM walks larger ranks in steps of this size
STEPPED = ("linear", "group_grad_x", "four_bit", "update")  # the ops that do so
NORMS_RANK = 64  # most ranks in one step of the norms
SHORT_RANK = 64  # most ranks of one program of project with small blocks of tokens

_assumed: Scopes[dict] = Scopes()


def assume(arch: int | None = None, strategy: str | None = None, tma: bool | None = None, thin: str | None = None):
    """Returns a context that overrides choices in all threads, for tests, inspection and the ahead-of-time build.

    Args:
        arch: chooses as on the card of this arch in ``device.CARDS``.
        strategy: the GEMM's strategy.
        tma: False chooses kernels without TMA.
        thin: how thin products are computed: "pass", "short", "split" or "cublas" (linear/strategies.py).
    """
    overrides = {"arch": arch, "strategy": strategy, "tma": tma, "thin": thin}
    return _assumed.within({key: value for key, value in overrides.items() if value is not None})


def is_assumed() -> bool:
    return any(_assumed.values)


def assumed(name: str):
    """Returns the value that ``assume`` set for this name, or None."""
    return next((overrides[name] for overrides in reversed(_assumed.values) if name in overrides), None)


def limits(torch_device: torch.device) -> device.Device:
    """Returns the limits of the device, or of the assumed card."""
    arch = assumed("arch")
    return device.get(torch_device) if arch is None else device.CARDS[arch]


def programs(torch_device: torch.device) -> int:
    """Returns the number of programs of a persistent kernel: one for each multiprocessor that torch's carve-out leaves
    (``device.carveout``)."""
    interpreted = torch_device.type != "cuda" and triton.knobs.runtime.interpret
    multiprocessors = INTERPRETED_MULTIPROCESSORS if interpreted else limits(torch_device).multiprocessors
    return device.remaining(multiprocessors, device.carveout())


@lru_cache
def rank_block(r: int) -> int:
    """Returns the smallest block that holds r columns: a power of two, at least 16 (the smallest side of a dot)."""
    return max(16, triton.next_power_of_2(r))


def is_uneven(r: int) -> bool:
    """Returns whether a rank above ``GEMM_RANK`` is not a multiple of it. Its loads are masked element by element,
    which takes registers, so it uses the tiles of twice the rank."""
    return r > GEMM_RANK and r % GEMM_RANK != 0


def gemm_rank(r: int) -> int:
    """Returns the number of ranks in one step of the GEMM."""
    return GEMM_RANK // 2 if is_uneven(r) else GEMM_RANK


@lru_cache
def row(op: str, element_size: int, card: device.Device, r: int) -> tuple[int, ...]:
    """Returns t, outer, inner, warps and stages from the table."""
    entries = [
        (first, kib)
        for name, size, first, kib in TABLE
        if (name, size) == (op, element_size) and first <= card.arch and kib << 10 <= card.shared_memory
    ]
    rank_class = rank_block(r) * (1 + is_uneven(r))
    rows = TABLE[op, element_size, *max(entries)]
    return next((row for row in rows if rank_class <= row[0]), rows[-1])[1:]


def _tile(row: tuple[int, ...], r: int, largest_r: int = 256) -> Tile:
    t, outer, inner, warps, stages = row
    return Tile(t, outer, inner, min(rank_block(r), largest_r), warps, stages)


def default(op: str, element_size: int, card: device.Device, r: int) -> Tile:
    """Returns the tile from the table."""
    largest_r = gemm_rank(r) if op.startswith(STEPPED) else SHORT_RANK if "_short" in op else 256
    return _tile(row(op, element_size, card, r), r, largest_r)


def measured(op: str, tensor: torch.Tensor, d_in: int, d_out: int, r: int) -> Any:
    """Returns the choice, a strategy or a tile, that ``lora-fast tune`` measured as the fastest, if any. Returns None
    inside ``assume``."""
    return None if is_assumed() else tuned.find(op, tensor, d_in, d_out, r)


def splits(n_tokens: int, columns: int, r: int, tile: Tile) -> tuple[int, int, int]:
    """Returns the column chunks, token splits and tokens per split of a split reduction.

    There is about one wave of programs. The split fixes the order of summation, so it must not depend on the number of
    multiprocessors. Partial sums take at most half the bytes of the reduced tensor or fit in L2 (``PARTIAL_NUMBERS``).
    """
    n_chunks = triton.cdiv(columns, tile.outer)
    most = max(n_tokens // (8 * r), PARTIAL_NUMBERS // (r * columns))
    wanted = max(1, min(PROGRAMS // n_chunks, most, n_tokens // (SPLIT_STEPS * tile.t)))
    tokens_per_split = triton.cdiv(triton.cdiv(n_tokens, wanted), tile.t) * tile.t
    return n_chunks, triton.cdiv(n_tokens, tokens_per_split), tokens_per_split


def _thin(op: str, name: str, tall: torch.Tensor, d_in: int, d_out: int, r: int) -> Tile:
    tile, choice = default(name, tall.element_size(), limits(tall.device), r), measured(op, tall, d_in, d_out, r)
    return _tile(choice, r, tile.r) if choice else tile


def grouped(op: str, r: int) -> GroupedTile:
    """Returns the tile of a grouped launch. ``r``: its largest rank; 1 only for elementwise work (products need 16
    columns)."""
    rank_class, largest = triton.next_power_of_2(r), GROUPED[op][-1][0]
    assert rank_class <= largest, f"rank: expected 1 to {largest}, got {r}"
    return GroupedTile(*next(row for row in GROUPED[op] if rank_class <= row[0])[1:])


def project(x: torch.Tensor, r: int, short: bool, wide: bool) -> Tile:
    """Returns the tile of project. With ``short`` a program has fewer tokens, so that enough programs read x."""
    form = "project" + "_short" * short
    return _thin(form, form + "_wide" * wide, x, x.shape[1], 0, r)


def split_of_few(n_tokens: int, d_in: int, r: int, tile: Tile) -> tuple[int, int]:
    """Returns the splits of d_in and the columns of each split, for calls whose few tokens give few programs."""
    splits = max(1, FEW_NUMBERS // (min(n_tokens, tile.t) * rank_block(r)))
    d_in_per_split = triton.cdiv(triton.cdiv(d_in, splits), tile.inner) * tile.inner
    return triton.cdiv(d_in, d_in_per_split), d_in_per_split


def grad_s_b(dy: torch.Tensor, r: int, wide: bool) -> Tile:
    return _thin("grad_s_b", grad_s_b_row(dy.dtype, wide), dy, 0, dy.shape[1], r)


def grad_s_b_row(dtype: torch.dtype, wide: bool) -> str:
    return "grad_s_b" + "_wide" * wide + "_float16" * (wide and dtype is torch.float16)


def scaled_grads(dy: torch.Tensor, r: int, wide: bool) -> Tile:
    """Returns the tile of the pass over dy of a DoRA layer, which reads a second matrix beside dy: that of
    ``grad_s_b`` with half as many tokens a step. Before sm_90 wide factors of more than 16 ranks leave registers for
    two stages."""
    card = limits(dy.device)
    tile = default(grad_s_b_row(dy.dtype, wide), dy.element_size(), card, r)
    most = 2 if wide and tile.r > 16 and card.arch < 90 else tile.stages
    return tile._replace(t=max(16, tile.t // 2), stages=min(tile.stages, most))


def grad_a(x: torch.Tensor, r: int, wide: bool) -> Tile:
    return _thin("grad_a", "grad_a" + "_wide" * wide, x, x.shape[1], 0, r)


def expert_project(rows: torch.Tensor, r: int, wide: bool) -> Tile:
    """Returns the tile of experts' S and dS. Float16's four products beside float32 would spill in small blocks of
    rows."""
    short = len(rows) <= SHORT and not (wide and rows.dtype is torch.float16)
    return project(rows, r, short, wide)


def batched_project(x: torch.Tensor, r: int, wide: bool, aligned: bool) -> Tile:
    """Returns the tile of S of several adapters: that of experts, or a smaller one for factors that are loaded by
    elements, whose addresses take registers, and for float32 sums of 256 ranks, which would spill beside the ends of
    1,024 adapters."""
    tile = expert_project(x, r, wide)
    if x.element_size() == 4 and tile.r > 128:
        tile = tile._replace(r=SHORT_RANK)
    return tile if aligned else tile._replace(inner=max(16, tile.inner // 2), r=min(tile.r, SHORT_RANK))


def expert_grads(x: torch.Tensor, r: int, wide: bool) -> Tile:
    """Returns the tile of the gradients of experts' factors. Each expert has programs of its own, so they have fewer
    columns than those of ``grad_a``."""
    return default("expert_grads" + "_wide" * wide, x.element_size(), limits(x.device), r)


def weight_norms(weight: torch.Tensor, r: int, wide: bool) -> Tile:
    """Returns the tile of the row norms of W + b a."""
    name = "weight_norms" + "_wide" * wide
    return _tile(row(name, weight.element_size(), limits(weight.device), r), r, NORMS_RANK)


def linear(left: torch.Tensor, d_out: int, r: int, forward: bool, tma: bool, dropout: bool) -> Tile:
    """Returns the tile of the fused GEMM from left (n_tokens, d_in) to (n_tokens, d_out). Forward left is x, backward
    it is dy."""
    return _gemm_tile("linear", gemm(forward, dropout), left, d_out, r, tma, dropout)


def four_bit(left: torch.Tensor, d_out: int, r: int, forward: bool, tma: bool, dropout: bool) -> Tile:
    """Returns the tile of the GEMM over a 4-bit weight, with the arguments of ``linear``."""
    return _gemm_tile("four_bit", four_bit_op(forward, dropout), left, d_out, r, tma, dropout)


def _gemm_tile(name: str, op: str, left: torch.Tensor, d_out: int, r: int, tma: bool, dropout: bool) -> Tile:
    choice = measured(op + ("_tma" if tma else "_pointer"), left, left.shape[1], d_out, r)
    name += "_tma" * tma + "_dropout" * dropout
    return _tile(choice, r, gemm_rank(r)) if choice else default(name, left.element_size(), limits(left.device), r)


def group_linear(x: torch.Tensor, ranks: Sequence[int], tma: bool) -> Tile:
    """Returns the tile of the fused GEMM that computes y of a group with these ranks."""
    return _group_tile("linear" + "_tma" * tma, x, ranks)


def group_grad_x(dy: torch.Tensor, ranks: Sequence[int], tma: bool, dropout: bool) -> Tile:
    """Returns the tile of the fused GEMM that computes dx of a group with these ranks."""
    name = "group_grad_x" + "_tma" * tma + "_dropout" * dropout
    return _group_tile(name, dy, ranks)


def group_update(dy: torch.Tensor, ranks: Sequence[int], dropout: bool) -> Tile:
    """Returns the tile of the update of a group. With dropout it has two accumulators."""
    tile = _group_tile("update", dy, ranks)
    return tile._replace(outer=tile.outer // 2) if dropout else tile


def _group_tile(name: str, dy: torch.Tensor, ranks: Sequence[int]) -> Tile:
    """Returns the tile for these ranks. Ranks from 17 on take at least two steps: the code of a loop, unlike that of
    one step for each member, does not spill."""
    step = min(GEMM_RANK // 2 if r <= GEMM_RANK else gemm_rank(r) for r in ranks)
    return default(name, dy.element_size(), limits(dy.device), max(ranks))._replace(r=step)


def gemm(forward: bool, dropout: bool) -> str:
    """Returns the GEMM's name in tuned.py. Forward has one name: the mask is applied to S, not in the GEMM."""
    return "linear" if forward else "grad_x" + "_dropout" * dropout


def four_bit_op(forward: bool, dropout: bool) -> str:
    """Returns the name in tuned.py of the GEMM over a 4-bit weight."""
    return "four_bit_" + gemm(forward, dropout)


def update(left: torch.Tensor, r: int, few: bool) -> Tile:
    return default("update" + "_few" * few, left.element_size(), limits(left.device), r)


def batched_update(y: torch.Tensor, r: int, few: bool, aligned: bool) -> Tile:
    """Returns the tile of the update of several adapters, a smaller one for factors that are loaded by elements."""
    tile = update(y, r, few)
    return tile if aligned else tile._replace(outer=tile.outer // 2)


def uses_tma(left: torch.Tensor, weight: torch.Tensor, d_out: int) -> bool:
    """Returns whether the GEMM loads and stores with TMA: 16-bit matrices on sm_90 or later whose addresses and rows
    are multiples of 16 bytes. The rows of the result must be such multiples too, because a TMA store writes whole
    16-byte pieces."""
    return (
        limits(left.device).arch >= 90
        and assumed("tma") is not False
        and d_out % 8 == 0
        and all(
            m.element_size() == 2 and m.data_ptr() % 16 == 0 and m.shape[1] >= 8
            and m.stride(1) == 1 and m.stride(0) % 8 == 0 and m.stride(0) >= m.shape[1]
            for m in (left, weight)
        )
    )  # fmt: skip


def takes_gluon(left: torch.Tensor, weight: torch.Tensor, d_out: int) -> bool:
    """Returns whether the strategy "gluon" can run: it is written for Hopper's tensor cores and TMA."""
    return limits(left.device).arch == GLUON_ARCH and uses_tma(left, weight, d_out)


def strategies(torch_device: torch.device, dtype: torch.dtype, *widths: int) -> tuple[str, ...]:
    """Returns the GEMM's strategies that run on this device with contiguous matrices whose rows have these widths."""
    aligned = dtype.itemsize == 2 and all(width % 8 == 0 for width in widths)
    return ("fused", "cublas", *(("gluon",) if aligned and limits(torch_device).arch == GLUON_ARCH else ()))


def streams(left: torch.Tensor, weight: torch.Tensor, d_out: int) -> bool:
    """Returns whether the fused GEMM can load its operands ahead of their use in pieces of 16 bytes. It loads by TMA
    or, before sm_90, by asynchronous copies, which need sizes and strides that are multiples of 16 elements. Otherwise
    it is slower than cuBLAS."""
    if left.element_size() == 2 and limits(left.device).arch >= 90:
        return uses_tma(left, weight, d_out)
    return all(
        m.data_ptr() % 16 == 0 and m.stride(1) == 1 and m.stride(0) % 16 == 0 and m.shape[1] % 16 == 0
        for m in (left, weight)
    )


def candidates(op: str, element_size: int, card: device.Device, r: int) -> list[tuple[int, ...]]:
    """Returns the tiles (t, outer, inner, warps, stages) that ``lora-fast tune`` measures: the default, every row of
    TABLE for this rank and for this or an older arch, and the default with one number changed. Some of them may not fit
    on the device."""
    default = row(op, element_size, card, r)
    tiles = [default]
    for (name, size, first, _), rows in TABLE.items():
        if (name, size) == (op, element_size) and first <= card.arch:
            tiles += [row[1:] for row in rows if rank_block(r) <= row[0]]
    for i, value in enumerate(default):
        is_stages, is_warps = i == 4, i == 3
        for other in (value - 1, value + 1) if is_stages else (value // 2, value * 2):
            if 1 <= other <= 6 if is_stages else 4 <= other <= 8 if is_warps else 16 <= other <= 512:
                tiles.append((*default[:i], other, *default[i + 1 :]))
    return list(dict.fromkeys(tiles))
