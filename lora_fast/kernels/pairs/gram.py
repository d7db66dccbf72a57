"""The five r×r Grams of every adapter pair, in one launch.

Math      Ka = a aᵀ   Kb = bᵀb   Kp = da daᵀ   Kq = dbᵀdb   K = da aᵀ
          With x = aᵀ or b and y = daᵀ or db, tiles [BLOCK_D, BLOCK_R], they are xᵀx, yᵀy and yᵀx summed over d.
Grid      (chunks of all factors, blocks of the Gram): one program per chunk of d of one factor. Above rank 64 the Gram
          itself is cut into 64×64 blocks, one program each. Partial sums are added by the factor's last program
          (factor_tiles.py); launches that share a table must be ordered (one stream), for they share its counters.
          da and db have a list of addresses of their own, besides the table (pointer_table.py).
Shapes    a, da (r, d_in), b, db (d_out, r), any float, ranks may differ → float32 (n_pairs, R, R), R the largest rank,
          zero beyond a pair's own. 16-bit products are exact in the float32 accumulator, float32 ones "ieee".
Roofline  every operand once against 2 r operations an element and Gram: memory bound for 16-bit. Partial sums add
          r / chunk of the bytes for each Gram that a side has (chunk 2048 at r = 16). float32 products read their
          operands from shared memory, up to rank 16 with few warps, so that each thread has more of the Gram.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..factor_tiles import add_partials, is_last_program, load_block, store_partial
from ..launch import Launch, on_device, plan, stream_of
from ..pointer_table import (
    INDEX,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    TableWithGradients,
    chunk_end,
    count_programs,
    find_tables,
    largest_rank,
    load_entry,
    load_sizes,
    pointer_at,
    tensor_at,
)
from ..primitives import dot
from ..records import Grams
from ..tiles import grouped


@triton.jit
def gram_factor(
    entries, gradients, partials, totals, counters,
    i_tensor, i_chunk, n_pairs,
    XX: tl.constexpr, YY: tl.constexpr, YX: tl.constexpr, SLOTS: tl.constexpr,
    DTYPE_X: tl.constexpr, DTYPE_Y: tl.constexpr, STRIDE_Y: tl.constexpr, IS_A: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sums one chunk of one factor. XX, YY, YX: the index of the result of each Gram, -1 where it is not wanted. SLOTS:
    the number of partial sums that a program has room for."""
    ONE_BLOCK: tl.constexpr = R_MAX <= BLOCK_R
    N_BLOCKS: tl.constexpr = (R_MAX + BLOCK_R - 1) // BLOCK_R
    SIZE: tl.constexpr = R_MAX * R_MAX
    SLOT_YY: tl.constexpr = XX >= 0
    SLOT_YX: tl.constexpr = (XX >= 0) + (YY >= 0)
    WIDE: tl.constexpr = ALIGNED and (IS_A or EXPERTS == 1)
    x = tensor_at(entries, i_tensor, 0, DTYPE_X, WIDE)
    if YY >= 0 or YX >= 0:
        y = pointer_at(gradients + i_tensor * STRIDE_Y, DTYPE_Y, WIDE)
    d, r = load_sizes(entries, i_tensor, IS_A, UNIFORM_R, WIDE)
    i_row = (tl.program_id(1) // N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_col = (tl.program_id(1) % N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_xx = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    b_yy = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    b_yx = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in range(start, chunk_end(entries, i_tensor, start, d, CHUNK), BLOCK_D):
        i_d = o_d + tl.arange(0, BLOCK_D)
        if XX >= 0 or YX >= 0:
            b_x = load_block(x, i_d, i_col, d, r, IS_A, EXPERTS)
        if YY >= 0 or YX >= 0:
            b_y = load_block(y, i_d, i_row, d, r, IS_A, EXPERTS)
        if XX >= 0:
            b_x_row = b_x if ONE_BLOCK else load_block(x, i_d, i_row, d, r, IS_A, EXPERTS)
            b_xx = dot(tl.trans(b_x_row), b_x, b_xx, "ieee")
        if YY >= 0:
            b_y_col = b_y if ONE_BLOCK else load_block(y, i_d, i_col, d, r, IS_A, EXPERTS)
            b_yy = dot(tl.trans(b_y), b_y_col, b_yy, "ieee")
        if YX >= 0:
            b_yx = dot(tl.trans(b_y), b_x, b_yx, "ieee")
    count, stride = count_programs(d, CHUNK), EXPERTS * SLOTS * SIZE
    p_partial = partials + tl.program_id(0).to(tl.int64) * SLOTS * SIZE
    p_first = p_partial - i_chunk.to(tl.int64) * stride
    p_total = totals + load_entry(entries, i_tensor, INDEX) % n_pairs * SIZE
    o_xx, o_yy, o_yx = XX * n_pairs * SIZE, YY * n_pairs * SIZE, YX * n_pairs * SIZE
    if XX >= 0:
        store_partial(b_xx, p_partial, p_total + o_xx, i_row, i_col, count, R_MAX)
    if YY >= 0:
        store_partial(b_yy, p_partial + SLOT_YY * SIZE, p_total + o_yy, i_row, i_col, count, R_MAX)
    if YX >= 0:
        store_partial(b_yx, p_partial + SLOT_YX * SIZE, p_total + o_yx, i_row, i_col, count, R_MAX)
    if count > 1:  # noqa: SIM102 - a jit function evaluates both sides of an `and`
        if is_last_program(counters + i_tensor * N_BLOCKS * N_BLOCKS + tl.program_id(1), count):
            if XX >= 0:
                add_partials(p_first, p_total + o_xx, stride, i_row, i_col, count, R_MAX)
            if YY >= 0:
                add_partials(p_first + SLOT_YY * SIZE, p_total + o_yy, stride, i_row, i_col, count, R_MAX)
            if YX >= 0:
                add_partials(p_first + SLOT_YX * SIZE, p_total + o_yx, stride, i_row, i_col, count, R_MAX)


@triton.jit
def lora_gram_kernel(
    entries, gradients, tiles, partials, totals, counters,
    n_pairs,
    DTYPE_A: tl.constexpr, DTYPE_DA: tl.constexpr, STRIDE_DA: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, KP: tl.constexpr, KQ: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if load_entry(entries, i_tensor, SIDE) == SIDE_A:
        gram_factor(
            entries, gradients, partials, totals, counters,
            i_tensor, i_chunk, n_pairs,
            KA, KP, K, SLOTS,
            DTYPE_A, DTYPE_DA, STRIDE_DA, True,
            UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    else:
        gram_factor(
            entries, gradients, partials, totals, counters,
            i_tensor, i_chunk, n_pairs,
            KB, KQ, -1, SLOTS,
            DTYPE_A, DTYPE_DA, STRIDE_DA, False,
            UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip


_SIDE_A, _SIDE_B = ("ka", "kp", "k"), ("kb", "kq")


def gram(
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    da: list[torch.Tensor] | None = None,
    db: list[torch.Tensor] | None = None,
    wanted: tuple[str, ...] = ("ka", "kb"),
) -> Grams:
    """Computes the Grams named in ``wanted`` of every pair: ka = a aᵀ, kb = bᵀb, kp = da daᵀ, kq = dbᵀdb, k = da aᵀ.

    Args:
        a, b: (r, d_in) and (d_out, r), one of each per pair, contiguous.
        da, db: their gradients, contiguous; only where a Gram needs them.
        wanted: fields of ``Grams``.

    Returns:
        float32 (n_pairs, R, R) for each name, None for the others.
    """
    assert {*wanted} <= {*Grams._fields}, f"wanted: expected names among {Grams._fields}, got {wanted}"
    n_pairs, r_max = len(a), max((t.shape[0] for t in a), default=1)
    totals = torch.empty((len(wanted), n_pairs, r_max, r_max), dtype=torch.float32, device=a[0].device if a else None)
    if n_pairs and wanted:
        sides = [(True, a, da)] * bool({*_SIDE_A} & {*wanted}) + [(False, b, db)] * bool({*_SIDE_B} & {*wanted})
        factors = [x for _, xs, _ in sides for x in xs]
        gradients = [x for _, xs, gradients in sides for x in gradients or xs]
        is_a = [side for side, xs, _ in sides for _ in xs]
        indices = [i for _, xs, _ in sides for i in range(len(xs))]
        _launch(find_tables([factors], is_a, gradients, indices), totals, wanted)
    results: list[Any] = [totals[wanted.index(name)] if name in wanted else None for name in Grams._fields]
    return Grams(*results)


def factor_grams(tensors: list[torch.Tensor], is_a: list[bool]) -> torch.Tensor:
    """Computes p pᵀ where the rank is first, pᵀp where it is last: float32 (n, R, R), R the largest rank."""
    r_max = largest_rank(tensors, is_a)
    device = tensors[0].device if tensors else None
    totals = torch.empty((1, len(tensors), r_max, r_max), dtype=torch.float32, device=device)
    if tensors:
        _launch(find_tables([tensors], is_a), totals, (("ka", "kb"),))
    return totals[0]


def table_grams(tables: list[TableWithGradients], n_pairs: int, r: int, wanted: tuple[str, ...]) -> torch.Tensor:
    """Computes the Grams named in ``wanted`` from tables of pairs of rank r, which have the rows of all b, then
    those of all a: float32 (wanted, n_pairs, r, r)."""
    totals = torch.empty((len(wanted), n_pairs, r, r), dtype=torch.float32, device=tables[0].factors.device)
    _launch(tables, totals, wanted)
    return totals


def _launch(tables: list[TableWithGradients], totals: torch.Tensor, wanted: tuple) -> None:
    """``wanted``: for each of the totals the Gram that is stored there, or one of either side."""
    with on_device(totals):
        stream = stream_of(totals)
        for table in tables:
            make = lambda table=table: _GramLaunch(table, totals.shape, wanted)
            key = "gram", table.dtype, table.stride, totals.shape, wanted
            plan(table.factors.plans, key, stream, make)(table, totals, stream)


class _GramLaunch:
    """The launch of ``lora_gram_kernel`` on one table, with what stays the same from step to step."""

    def __init__(self, table: TableWithGradients, shape: torch.Size, wanted: tuple):
        factors, (_, n_pairs, r_max, _) = table.factors, shape
        tile = grouped("gram", max(16, r_max))
        self.tile_map = factors.tile_map(tile.chunk)
        slots = {name: -1 for name in Grams._fields}
        for slot, names in enumerate(wanted):
            slots |= dict.fromkeys([names] if isinstance(names, str) else names, slot)
        partial_sums = max(sum(slots[name] >= 0 for name in side) for side in (_SIDE_A, _SIDE_B))
        self.partials = self.tile_map.programs, partial_sums, r_max, r_max
        self.launch = Launch(
            lora_gram_kernel,
            (self.tile_map.programs, triton.cdiv(r_max, tile.r) ** 2),
            (n_pairs,),
            {"DTYPE_A": TL_DTYPE[factors.dtypes[0]], "DTYPE_DA": TL_DTYPE[table.dtype], "STRIDE_DA": table.stride}
            | {name.upper(): slot for name, slot in slots.items()}
            | {"SLOTS": partial_sums, "UNIFORM_R": factors.uniform_r, "ALIGNED": factors.aligned}
            | {"EXPERTS": factors.experts, "R_MAX": r_max}
            | tile.options()
            | {"maxnreg": {16: 128, 32: 168}.get(tile.r, 255)},  # by itself ptxas spills to fit one more program
        )

    def __call__(self, table: TableWithGradients, totals: torch.Tensor, stream: int | None) -> None:
        partials = torch.empty(self.partials, dtype=torch.float32, device=totals.device)
        factors = table.factors
        tensors = factors.entries, table.addresses, self.tile_map.tiles, partials, totals, factors.counters
        self.launch.go(stream, tensors, ())
