"""The five r×r Grams of every adapter pair, in one launch.

Math      Ka = a aᵀ   Kb = bᵀb   Kp = da daᵀ   Kq = dbᵀdb   K = da aᵀ
          With x = aᵀ or b and y = daᵀ or db, tiles [BLOCK_D, BLOCK_R], they are xᵀx, yᵀy and yᵀx summed over d.
Grid      (chunks of all factors, blocks of the Gram): one program per chunk of d of one factor; above rank 64 the Gram
          itself is cut into 64×64 blocks, one program each. A factor's last program to arrive, found by an integer
          counter, adds the partial sums in the order of the chunks: the same inputs give the same bits, and there is
          no second launch. Counters are left at zero; launches that share a table must be ordered (one stream).
          da and db lie at a list of addresses beside the table's (pointer_table.py).
Shapes    a, da (r, d_in), b, db (d_out, r), any float, ranks may differ → float32 (n_pairs, R, R), R the largest rank,
          zero beyond a pair's own. 16-bit products are exact in the float32 accumulator, float32 ones "ieee".
Roofline  every operand once against 2 r operations an element and Gram: memory bound for 16-bit; partial sums add
          r / chunk of the bytes for each Gram that a side has (chunk 2048 at r = 16). float32 products take their
          operands from shared memory: up to rank 16 by few warps, so that each thread has more of the Gram.
"""

import torch
import triton
import triton.language as tl

from ..factor_tiles import add_up, deposit, last_to_arrive, load_block
from ..launch import Launch, on_device, plan, stream_of
from ..pointer_table import (
    INDEX,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    Listed,
    entry,
    largest_rank,
    listed,
    pointer_at,
    programs_of,
    sizes,
    tensor_at,
)
from ..primitives import dot
from ..records import Grams
from ..tiles import grouped


@triton.jit
def gram_factor(
    entries, beside, partials, totals, counters, i_tensor, i_chunk, n_pairs,
    XX: tl.constexpr, YY: tl.constexpr, YX: tl.constexpr, SLOTS: tl.constexpr, IS_A: tl.constexpr,
    DTYPE_X: tl.constexpr, DTYPE_Y: tl.constexpr, STRIDE_Y: tl.constexpr, UNIFORM_R: tl.constexpr,
    ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One chunk of one factor. XX, YY, YX: the result a Gram goes to, -1 where it is not wanted. SLOTS: partial sums
    that a program has room for."""
    WHOLE: tl.constexpr = R_MAX <= BLOCK_R
    N_BLOCKS: tl.constexpr = (R_MAX + BLOCK_R - 1) // BLOCK_R
    SIZE: tl.constexpr = R_MAX * R_MAX
    SLOT_YY: tl.constexpr = XX >= 0
    SLOT_YX: tl.constexpr = (XX >= 0) + (YY >= 0)
    WIDE: tl.constexpr = ALIGNED and (IS_A or EXPERTS == 1)
    x = tensor_at(entries, i_tensor, 0, DTYPE_X, WIDE)
    if YY >= 0 or YX >= 0:
        y = pointer_at(beside + i_tensor * STRIDE_Y, DTYPE_Y, WIDE)
    d, r = sizes(entries, i_tensor, IS_A, UNIFORM_R, WIDE)
    i_row = (tl.program_id(1) // N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_col = (tl.program_id(1) % N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_xx = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    b_yy = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    b_yx = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in range(start, tl.minimum(start + CHUNK, d), BLOCK_D):
        i_d = o_d + tl.arange(0, BLOCK_D)
        if XX >= 0 or YX >= 0:
            b_x = load_block(x, i_d, i_col, d, r, IS_A, EXPERTS)
        if YY >= 0 or YX >= 0:
            b_y = load_block(y, i_d, i_row, d, r, IS_A, EXPERTS)
        if XX >= 0:
            b_x_row = b_x if WHOLE else load_block(x, i_d, i_row, d, r, IS_A, EXPERTS)
            b_xx = dot(tl.trans(b_x_row), b_x, b_xx, "ieee")
        if YY >= 0:
            b_y_col = b_y if WHOLE else load_block(y, i_d, i_col, d, r, IS_A, EXPERTS)
            b_yy = dot(tl.trans(b_y), b_y_col, b_yy, "ieee")
        if YX >= 0:
            b_yx = dot(tl.trans(b_y), b_x, b_yx, "ieee")
    count, stride = programs_of(d, CHUNK), EXPERTS * SLOTS * SIZE
    p_mine = partials + tl.program_id(0).to(tl.int64) * SLOTS * SIZE
    p_first = p_mine - i_chunk.to(tl.int64) * stride
    p_total = totals + entry(entries, i_tensor, INDEX) % n_pairs * SIZE
    o_xx, o_yy, o_yx = XX * n_pairs * SIZE, YY * n_pairs * SIZE, YX * n_pairs * SIZE
    if XX >= 0:
        deposit(b_xx, p_mine, p_total + o_xx, i_row, i_col, count, R_MAX)
    if YY >= 0:
        deposit(b_yy, p_mine + SLOT_YY * SIZE, p_total + o_yy, i_row, i_col, count, R_MAX)
    if YX >= 0:
        deposit(b_yx, p_mine + SLOT_YX * SIZE, p_total + o_yx, i_row, i_col, count, R_MAX)
    if count > 1:  # noqa: SIM102 - a jit function evaluates both sides of an `and`
        if last_to_arrive(counters + i_tensor * N_BLOCKS * N_BLOCKS + tl.program_id(1), count):
            if XX >= 0:
                add_up(p_first, p_total + o_xx, stride, i_row, i_col, count, R_MAX)
            if YY >= 0:
                add_up(p_first + SLOT_YY * SIZE, p_total + o_yy, stride, i_row, i_col, count, R_MAX)
            if YX >= 0:
                add_up(p_first + SLOT_YX * SIZE, p_total + o_yx, stride, i_row, i_col, count, R_MAX)


@triton.jit
def lora_gram_kernel(
    entries, beside, tiles, partials, totals, counters, n_pairs, DTYPE_A: tl.constexpr, DTYPE_DA: tl.constexpr,
    STRIDE_DA: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, KP: tl.constexpr, KQ: tl.constexpr, K: tl.constexpr,
    SLOTS: tl.constexpr, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if entry(entries, i_tensor, SIDE) == SIDE_A:
        gram_factor(
            entries, beside, partials, totals, counters, i_tensor, i_chunk, n_pairs, KA, KP, K, SLOTS, True, DTYPE_A,
            DTYPE_DA, STRIDE_DA, UNIFORM_R, ALIGNED, EXPERTS, R_MAX, CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    else:
        gram_factor(
            entries, beside, partials, totals, counters, i_tensor, i_chunk, n_pairs, KB, KQ, -1, SLOTS, False, DTYPE_A,
            DTYPE_DA, STRIDE_DA, UNIFORM_R, ALIGNED, EXPERTS, R_MAX, CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip


_SIDE_A, _SIDE_B = ("ka", "kp", "k"), ("kb", "kq")


def gram(
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    da: list[torch.Tensor] | None = None,
    db: list[torch.Tensor] | None = None,
    wanted: tuple[str, ...] = ("ka", "kb"),
) -> Grams:
    """a (r, d_in), b (d_out, r) and their gradients, one of each per pair → the Grams named in ``wanted``: ka = a aᵀ,
    kb = bᵀb, kp = da daᵀ, kq = dbᵀdb, k = da aᵀ. All tensors contiguous; da and db only where wanted."""
    unknown = set(wanted) - set(Grams._fields)
    if unknown:
        raise ValueError(f"lora_fast: wanted: expected some of {Grams._fields}, got {sorted(unknown)}")
    n_pairs, r_max = len(a), max((t.shape[0] for t in a), default=1)
    totals = torch.empty((len(wanted), n_pairs, r_max, r_max), dtype=torch.float32, device=a[0].device if a else None)
    if n_pairs and wanted:
        sides = [(True, a, da)] * bool({*_SIDE_A} & {*wanted}) + [(False, b, db)] * bool({*_SIDE_B} & {*wanted})
        factors = [x for _, xs, _ in sides for x in xs]
        beside = [x for _, xs, gradients in sides for x in gradients or xs]
        is_a = [side for side, xs, _ in sides for _ in xs]
        indices = [i for _, xs, _ in sides for i in range(len(xs))]
        _launch(listed([factors], is_a, beside, indices), totals, wanted)
    return _named(totals, wanted)


def factor_grams(tensors: list[torch.Tensor], is_a: list[bool]) -> torch.Tensor:
    """p pᵀ where rank is first, pᵀp where it is last, for any list: float32 (n, R, R), R the largest rank."""
    r_max = largest_rank(tensors, is_a)
    device = tensors[0].device if tensors else None
    totals = torch.empty((1, len(tensors), r_max, r_max), dtype=torch.float32, device=device)
    if tensors:
        _launch(listed([tensors], is_a), totals, (("ka", "kb"),))
    return totals[0]


def grams_of(pairs: list[Listed], n_pairs: int, r: int, wanted: tuple[str, ...]) -> torch.Tensor:
    """The Grams named in ``wanted``, of tables of pairs of rank r, which have the rows of all b, then those of all a:
    float32 (wanted, n_pairs, r, r)."""
    shape, device = (len(wanted), n_pairs, r, r), pairs[0].table.device
    totals = torch.empty(shape, dtype=torch.float32, device=device)
    _launch(pairs, totals, wanted)
    return totals


def _launch(factors: list[Listed], totals: torch.Tensor, wanted: tuple) -> None:
    """``wanted``: for each of the totals the Gram that goes there, or one of either side."""
    with on_device(totals):
        stream = stream_of(totals)
        for listed in factors:
            make = lambda listed=listed: _GramLaunch(listed, totals.shape, wanted)
            key = "gram", listed.dtype, listed.stride, totals.shape, wanted
            plan(listed.table.plans, key, stream, make)(listed, totals, stream)


class _GramLaunch:
    def __init__(self, factors: Listed, shape: torch.Size, wanted: tuple):
        table, (_, n_pairs, r_max, _) = factors.table, shape
        tile = grouped("gram", max(16, r_max))
        self.tiles = table.tiles(tile.chunk)
        slots = {name: -1 for name in Grams._fields}
        for slot, names in enumerate(wanted):
            slots |= dict.fromkeys([names] if isinstance(names, str) else names, slot)
        partial_sums = max(sum(slots[name] >= 0 for name in side) for side in (_SIDE_A, _SIDE_B))
        self.partials = self.tiles.programs, partial_sums, r_max, r_max
        self.launch = Launch(
            lora_gram_kernel,
            (self.tiles.programs, triton.cdiv(r_max, tile.r) ** 2),
            (n_pairs,),
            {"DTYPE_A": TL_DTYPE[table.dtypes[0]], "DTYPE_DA": TL_DTYPE[factors.dtype], "STRIDE_DA": factors.stride}
            | {name.upper(): slot for name, slot in slots.items()}
            | {"SLOTS": partial_sums, "UNIFORM_R": table.uniform_r, "ALIGNED": table.aligned}
            | {"EXPERTS": table.experts, "R_MAX": r_max, "CHUNK": tile.chunk, "BLOCK_D": tile.d, "BLOCK_R": tile.r}
            | {"num_warps": tile.warps, "num_stages": tile.stages}
            | {"maxnreg": {16: 128, 32: 168}.get(tile.r, 255)},  # left to itself ptxas spills to fit one program more
        )

    def __call__(self, factors: Listed, totals: torch.Tensor, stream: int | None) -> None:
        partials = torch.empty(self.partials, dtype=torch.float32, device=totals.device)
        table = factors.table
        given = table.entries, factors.addresses, self.tiles.pairs, partials, totals, table.counters
        self.launch.go(stream, given, ())


def _named(totals: torch.Tensor, wanted: tuple[str, ...]) -> Grams:
    return Grams(*(totals[wanted.index(name)] if name in wanted else None for name in Grams._fields))
