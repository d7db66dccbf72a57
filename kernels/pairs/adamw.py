"""Pass 2 of the adapter step: what a method does to the gradients, AdamW, what it does to the factors, for all factors.

Math      of each factor p with gradient g, in this order, everything optional but AdamW:
              g ← g + c p                              c one number per factor (scale regularization)
              g ← M g (a),  g ← g M (b)                M r×r per factor (preconditioner)
              p ← d p,  g ← e g,  m ← e m,  v ← e² v   d, e one number per rank row of a, column of b (ScaLoRA)
              m ← m + (1-β₁)(g - m)     v ← β₂ v + (1-β₂) g²
              p ← (1 - η w) p - η/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + ε)              torch.optim.AdamW
              Gram of the new p: p pᵀ (a), pᵀp (b)
          Step counts, one per factor, are read by all of a factor's programs and counted up by the last to finish.
          lora_transform_kernel is p ← M p (a), p ← p M (b) alone, or p ← p + M p, p + p M.
Grid      one program per chunk of d of one factor, all its rank columns: products along the rank stay within a program.
          Without anything that knows of the rank a factor is a flat row of numbers.
Shapes    p, g, m, v of one shape and any float each; M, Gram float32 (n, R, R), d, e float32 (n, R), c float32 (n,).
          Arithmetic is float32 ("ieee" products), the scalars float64 (1-β₂ has few digits in float32); p, m, v are
          rounded once, at the store; the Gram is of the rounded p.
Roofline  4 reads and 3 writes of d·r elements; M, partial Grams and the table add r / chunk of it up to rank 64. Above,
          M no longer fits in registers and is read for every tile (from L2), and the Gram takes a launch of its own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..factor_tiles import GRAM_RANK, add_up, block_k, deposit, last_to_arrive, load_matrix, times_matrix
from ..launch import Launch, alignments, check_tensor, on_device, plan, stream_of
from ..pointer_table import (
    INDEX,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    Listed,
    entry,
    flat_sizes,
    largest_rank,
    listed,
    offsets,
    pointer_at,
    programs_of,
    sizes,
    tensor_at,
)
from ..primitives import dot, round_to, to_float32
from ..records import StepWork
from ..tiles import GroupedTile, grouped
from . import gram as grams

HYPER = 5  # numbers of a side: learning rate, β₁, β₂, ε, weight decay


@triton.jit
def power(base, n):
    """base ** n for an integer n ≥ 0, in base's precision, by squaring: the same on every device."""
    result = base * 0.0 + 1.0
    while n > 0:
        if n % 2 == 1:
            result = result * base
        base = base * base
        n = n // 2
    return result


@triton.jit
def double(number):
    return tl.full([], number, tl.float64)  # in the interpreter numbers are Python's


@triton.jit
def of_side(is_a, of_b, of_a):
    return tl.where(is_a, double(of_a), double(of_b))


@triton.jit
def learning_rate(is_a, p_lr_b, p_lr_a, lr_b, lr_a, RATES: tl.constexpr):
    """Returns the learning rate of a factor's side in float64. With RATES it is in memory."""
    if RATES:
        lr = tl.where(is_a, tl.load(p_lr_a).to(tl.float64), tl.load(p_lr_b).to(tl.float64))
    else:
        lr = of_side(is_a, lr_b, lr_a)
    return lr


@triton.jit
def constants(lr, beta1, beta2, eps, decay, t):
    """Returns the numbers of AdamW's step t in float32: 1-β₁, β₂, 1-β₂, η/(1-β₁ᵗ), √(1-β₂ᵗ), ε, 1-η w. They are made
    from float64 once a program, since most cards are 64 times slower in it."""
    step_size, root = lr / (1.0 - power(beta1, t)), tl.sqrt(1.0 - power(beta2, t))
    return (
        (1.0 - beta1).to(tl.float32), beta2.to(tl.float32), (1.0 - beta2).to(tl.float32), step_size.to(tl.float32),
        root.to(tl.float32), eps.to(tl.float32), (1.0 - lr * decay).to(tl.float32),
    )  # fmt: skip


@triton.jit
def adamw(b_p, b_g, b_m, b_v, of_step):
    """New p, m, v, float32; of_step: ``constants``."""
    take_m, keep_v, take_v, step_size, root, eps, keep_p = of_step
    b_m += (b_g - b_m) * take_m
    b_v = b_v * keep_v + b_g * b_g * take_v
    b_p *= keep_p
    b_p -= step_size * (b_m / (tl.sqrt_rn(b_v) / root + eps))
    return b_p, b_m, b_v


@triton.jit
def step_factor(
    entries, beside, steps, additive, matrices, scale_p, scale_g, partials, totals, counters, i_tensor, i_chunk, t,
    of_step, IS_A: tl.constexpr, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    ADD: tl.constexpr, MATRIX: tl.constexpr, SCALE: tl.constexpr, GRAM: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One chunk of one factor."""
    SIZE: tl.constexpr = R_MAX * R_MAX
    WIDE: tl.constexpr = ALIGNED and (IS_A or EXPERTS == 1)
    p, g = tensor_at(entries, i_tensor, 0, P, WIDE), pointer_at(beside + i_tensor, G, WIDE)
    m, v = tensor_at(entries, i_tensor, 1, M, WIDE), tensor_at(entries, i_tensor, 2, V, WIDE)
    if BLOCK_R == 1:
        d, r = flat_sizes(entries, i_tensor, ALIGNED)
    else:
        d, r = sizes(entries, i_tensor, IS_A, UNIFORM_R, WIDE)
    index, count = entry(entries, i_tensor, INDEX), programs_of(d, CHUNK)
    i_r = tl.arange(0, BLOCK_R)
    m_r = i_r < r
    if MATRIX:
        p_matrix = matrices + index * SIZE
        if BLOCK_K == BLOCK_R:
            b_matrix = load_matrix(p_matrix, i_r, i_r, r, IS_A, R_MAX)
    c = 0.0
    if ADD:
        c = tl.load(additive + index)
    if SCALE:
        b_scale_p = tl.load(scale_p + index * R_MAX + i_r, mask=m_r, other=0.0)[None, :]
        b_scale_g = tl.load(scale_g + index * R_MAX + i_r, mask=m_r, other=0.0)[None, :]
    if GRAM:
        b_gram = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, tl.minimum(start + CHUNK, d), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        mask = (i_d < d)[:, None] & m_r[None, :]
        o_tile = offsets(i_d, i_r, d, r, IS_A, EXPERTS)  # [BLOCK_D, BLOCK_R], as all that follows
        b_p = tl.load(p + o_tile, mask=mask, other=0.0)
        b_p = to_float32(b_p) if ADD and MATRIX else b_p.to(tl.float32)
        b_m = tl.load(m + o_tile, mask=mask, other=0.0).to(tl.float32)
        b_v = tl.load(v + o_tile, mask=mask, other=0.0).to(tl.float32)
        if MATRIX and BLOCK_K < BLOCK_R:
            b_g = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
            b_g = times_matrix(b_g, g, p, c, p_matrix, i_d, i_r, d, r, IS_A, ADD, EXPERTS, R_MAX, BLOCK_K)
        else:
            b_g = to_float32(tl.load(g + o_tile, mask=mask, other=0.0))
            if ADD:
                b_g += c * b_p
            if MATRIX:
                b_g = dot(b_g, b_matrix, tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32), "ieee")
        if SCALE:
            b_p, b_g = b_p * b_scale_p, b_g * b_scale_g
            b_m, b_v = b_m * b_scale_g, b_v * b_scale_g * b_scale_g
        b_p, b_m, b_v = adamw(b_p, b_g, b_m, b_v, of_step)
        b_new = round_to(b_p, P)
        tl.store(p + o_tile, b_new, mask=mask)
        tl.store(m + o_tile, round_to(b_m, M), mask=mask)
        tl.store(v + o_tile, round_to(b_v, V), mask=mask)
        if GRAM:
            b_new = tl.where(mask, b_new, tl.zeros_like(b_new))
            b_gram = dot(tl.trans(b_new), b_new, b_gram, "ieee")
    if GRAM:
        p_mine, p_total = partials + tl.program_id(0).to(tl.int64) * SIZE, totals + index * SIZE
        deposit(b_gram, p_mine, p_total, i_r, i_r, count, R_MAX)
    if last_to_arrive(counters + i_tensor, count):
        tl.store(steps + index, t)
        if GRAM and count > 1:
            stride = EXPERTS * SIZE
            add_up(p_mine - i_chunk.to(tl.int64) * stride, p_total, stride, i_r, i_r, count, R_MAX)


@triton.jit(do_not_specialize=["p_lr_b", "p_lr_a"])
def lora_step_kernel(
    entries, beside, tiles, hyper, p_lr_b, p_lr_a, steps, additive, matrices, scale_p, scale_g, partials, totals,
    counters,
    lr_b: tl.float64, beta1_b: tl.float64, beta2_b: tl.float64, eps_b: tl.float64, decay_b: tl.float64,
    lr_a: tl.float64, beta1_a: tl.float64, beta2_a: tl.float64, eps_a: tl.float64, decay_a: tl.float64, stride_hyper,
    ROWS: tl.constexpr, RATES: tl.constexpr, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    ADD: tl.constexpr, MATRIX: tl.constexpr, SCALE: tl.constexpr, GRAM: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS: hyperparameters are float64 rows, ``stride_hyper`` apart, one for every factor; else numbers of each side,
    RATES: but for the learning rates, which are at p_lr_b and p_lr_a."""
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    index, is_a = entry(entries, i_tensor, INDEX), entry(entries, i_tensor, SIDE) == SIDE_A
    t = tl.load(steps + index) + 1.0
    if ROWS:
        row = hyper + index * stride_hyper
        lr, beta1, beta2, eps, decay = (
            tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4),
        )  # fmt: skip
    else:
        lr = learning_rate(is_a, p_lr_b, p_lr_a, lr_b, lr_a, RATES)
        beta1, beta2 = of_side(is_a, beta1_b, beta1_a), of_side(is_a, beta2_b, beta2_a)
        eps, decay = of_side(is_a, eps_b, eps_a), of_side(is_a, decay_b, decay_a)
    of_step = constants(lr, beta1, beta2, eps, decay, t.to(tl.int32))
    as_a = False if BLOCK_R == 1 else is_a
    if as_a:
        step_factor(
            entries, beside, steps, additive, matrices, scale_p, scale_g, partials, totals, counters, i_tensor, i_chunk,
            t, of_step, True, P, G, M, V, ADD, MATRIX, SCALE, GRAM, UNIFORM_R, ALIGNED, EXPERTS, R_MAX, CHUNK,
            BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        step_factor(
            entries, beside, steps, additive, matrices, scale_p, scale_g, partials, totals, counters, i_tensor, i_chunk,
            t, of_step, False, P, G, M, V, ADD, MATRIX, SCALE, GRAM, UNIFORM_R, ALIGNED, EXPERTS, R_MAX, CHUNK,
            BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip


class Settings(NamedTuple):
    """Hyperparameters of b's factors, then of a's: learning rate, β₁, β₂, ε, weight decay of each. ``rates``: learning
    rates that are read on the device, of b and of a, in place of the numbers: float tensors of one element."""

    numbers: tuple[float, ...]
    rates: tuple[torch.Tensor, torch.Tensor] | None = None


NO_SETTINGS = Settings((0.0,) * 2 * HYPER)  # where they are in memory


def step_(
    factors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    is_a: list[bool],
    hyper: torch.Tensor,
    steps: torch.Tensor,
    work: StepWork | None = None,
) -> torch.Tensor | None:
    """One optimizer step of every factor (p, g, m, v), in place; g is only read. Returns the Grams of the new p,
    float32 (n, R, R), where ``work.gram``.

    is_a: rank first (r, d_in), or last (d_out, r). hyper: float64 (n, 5) or (1, 5), on the device: learning rate, β₁,
    β₂, ε, weight decay. steps: float32 (n,), on the device: the steps taken, counted up here."""
    work = work or StepWork()
    n, r_max = len(factors), largest_rank([f[0] for f in factors], is_a)
    check_tensor("hyper", hyper, (1 if len(hyper) == 1 else n, HYPER), torch.float64)
    _check_work(n, r_max, steps, work)
    if n == 0:
        return hyper.new_empty((0, r_max, r_max), dtype=torch.float32) if work.gram else None
    p, g, m, v = ([tensors[i] for tensors in factors] for i in range(4))
    totals = _totals(n, r_max, steps.device) if work.gram and _gram_in_pass(r_max) else None
    _launch_step(listed([p, m, v], is_a, g), hyper, steps, work, totals, r_max)
    torch.autograd.graph.increment_version(p)
    return grams.factor_grams(p, is_a) if work.gram and totals is None else totals


def step_tables_(
    factors: list[Listed], n: int, r: int, settings: Settings, steps: torch.Tensor, work: StepWork
) -> torch.Tensor | None:
    """Runs ``step_`` on tables of n factors of rank r, with columns p, m, v and the gradients beside them. Version
    counters are the caller's, and so are Grams above ``GRAM_RANK``: there it returns None."""
    _check_work(n, r, steps, work)
    totals = _totals(n, r, steps.device) if work.gram and _gram_in_pass(r) else None
    _launch_step(factors, settings, steps, work, totals, r)
    return totals


def _totals(n: int, r_max: int, device: torch.device) -> torch.Tensor:
    return torch.empty((n, r_max, r_max), dtype=torch.float32, device=device)


def _gram_in_pass(r_max: int) -> bool:
    return grouped("step", max(16, r_max)).r <= GRAM_RANK


def _launch_step(factors: list[Listed], hyper, steps, work: StepWork, totals: torch.Tensor | None, r_max: int) -> None:
    """``hyper``: rows in memory, or ``Settings``."""
    rows = hyper if isinstance(hyper, torch.Tensor) else None
    numbers, rates = NO_SETTINGS if rows is not None else hyper
    flags = work.additive is not None, work.matrices is not None, work.scale_p is not None, totals is not None
    in_rows, dtypes = None if rows is None else len(rows) > 1, rates and tuple(rate.dtype for rate in rates)
    kind = in_rows, dtypes, alignments([x for x in (rows, steps, *work[:4]) if x is not None]), *flags
    with on_device(steps):
        stream = stream_of(steps)
        for listed in factors:
            make = lambda listed=listed: _StepLaunch(listed, r_max, rows, rates is not None, *flags)
            launch = plan(listed.table.plans, ("step", listed.dtype, r_max, *kind), stream, make)
            launch(listed, rows, rates, numbers, steps, work, totals, stream)


class _StepLaunch:
    def __init__(
        self, factors: Listed, r_max: int, rows: torch.Tensor | None, rates: bool, add: bool, matrix: bool, scale: bool,
        gram: bool,
    ):  # fmt: skip
        table = factors.table
        flat = not (matrix or scale or gram) and table.experts == 1
        tile = grouped("step", 1 if flat else max(16, r_max))
        self.tiles = table.tiles(tile.chunk, flat)
        self.partials = (self.tiles.programs, r_max, r_max) if gram else None
        types = zip("PGMV", (table.dtypes[0], factors.dtype, *table.dtypes[1:]), strict=True)
        self.launch = Launch(
            lora_step_kernel,
            (self.tiles.programs,),
            (HYPER if rows is not None and len(rows) > 1 else 0,),
            {"ROWS": rows is not None, "RATES": rates}
            | {name: TL_DTYPE[dtype] for name, dtype in types}
            | {"ADD": add, "MATRIX": matrix, "SCALE": scale, "GRAM": gram}
            | {"UNIFORM_R": 1 if flat else table.uniform_r, "ALIGNED": table.aligned, "EXPERTS": table.experts}
            | {"R_MAX": 1 if flat else r_max, "CHUNK": tile.chunk, "BLOCK_D": tile.d, "BLOCK_R": tile.r}
            | {"BLOCK_K": block_k(tile), "num_warps": tile.warps, "num_stages": tile.stages}
            | _registers(tile, matrix, gram),
        )

    def __call__(
        self, factors: Listed, rows, rates, numbers: tuple, steps, work: StepWork, totals, stream: int | None
    ) -> None:
        """A tensor that is there stands in for each that is not: no kernel looks at it."""
        partials = steps
        if self.partials:
            partials = torch.empty(self.partials, dtype=torch.float32, device=steps.device)
        hyper, lr_b, lr_a = steps if rows is None else rows, *(rates or (steps, steps))
        optional = [steps if x is None else x for x in (*work[:4], totals)]
        table, addresses, *_ = factors
        given = table.entries, addresses, self.tiles.pairs, hyper, lr_b, lr_a, steps, *optional[:4], partials
        self.launch.go(stream, (*given, optional[4], table.counters), numbers)


def _registers(tile: GroupedTile, matrix: bool, gram: bool) -> dict[str, int]:
    """Returns the limit of a thread's registers where ptxas, left to itself, spills to fit one program more on a
    multiprocessor."""
    if gram and tile.r >= 64:
        return {"maxnreg": 255}
    if matrix and tile.r <= 64:
        return {"maxnreg": 128}
    return {"maxnreg": 80} if gram else {}


def _check_work(n: int, r_max: int, steps: torch.Tensor, work: StepWork) -> None:
    check_tensor("steps", steps, (n,), torch.float32)
    if (work.scale_p is None) != (work.scale_g is None):
        raise ValueError("lora_fast: scale_p and scale_g come together, got one of them")
    scales = (n, r_max)
    shapes = {"additive": (n,), "matrices": (n, r_max, r_max), "scale_p": scales, "scale_g": scales}
    for name, shape in shapes.items():
        if getattr(work, name) is not None:
            check_tensor(name, getattr(work, name), shape, torch.float32)
