"""Pass 2 of the adapter step, for all factors in one launch: a method's changes to gradients and factors, then AdamW.

Math      For each factor p with gradient g, in this order, every line optional but AdamW's:
              g ← g + c p                              c one number per factor (scale regularization)
              g ← M g (a),  g ← g M (b)                M r×r per factor (preconditioner)
              p ← d p,  g ← e g,  m ← e m,  v ← e² v   d, e one number per rank row of a, column of b (ScaLoRA)
              m ← m + (1-β₁)(g - m)     v ← β₂ v + (1-β₂) g²
              p ← (1 - η w) p - η/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + ε)              torch.optim.AdamW
              Gram of the new p, as rounded: p pᵀ (a), pᵀp (b)
          A 16-bit p is rounded to nearest, or stochastically where the step has keys (STOCHASTIC).
          Step counts, one per factor, are read by all of a factor's programs. The last program to finish increments
          its factor's count, unless the factor rests (pointer_table.py).
Grid      One program per chunk of d of one factor, all its rank columns, so products along the rank stay within a
          program. Where no line depends on the rank, a factor is a flat row of numbers.
Shapes    p, g, m, v of one shape and any float each; M, Gram float32 (n, R, R), d, e float32 (n, R), c float32 (n,).
          Arithmetic is float32 ("ieee" products), the scalars float64 (1-β₂ has few digits in float32); p, m, v are
          rounded once, at the store; keys int64 (n,).
Roofline  4 reads and 3 writes of d·r elements; M, partial Grams and the table add r / chunk of that up to rank 64.
          Above, M is read for every tile (factor_tiles.py), and the Gram takes a launch of its own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import limits
from ..factor_tiles import (
    GRAM_RANK,
    add_partials,
    block_k,
    is_last_program,
    load_matrix,
    round_tile,
    store_partial,
    times_matrix,
)
from ..launch import Launch, alignments, check_tensor, on_device, plan, stream_of
from ..pointer_table import (
    INDEX,
    RESTS,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    TableWithGradients,
    chunk_end,
    count_programs,
    find_tables,
    largest_rank,
    load_entry,
    load_flat_sizes,
    load_sizes,
    pointer_at,
    tensor_at,
    tile_offsets,
)
from ..primitives import dot, round_to, scaled_to, to_float32
from ..records import StepWork
from ..tiles import GroupedTile, grouped
from . import gram as grams

UPDATE = tl.constexpr(limits.UPDATE)
HYPER = 5  # hyperparameters of a side: learning rate, β₁, β₂, ε, weight decay


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
def choose_side(is_a, value_b, value_a):
    return tl.where(is_a, double(value_a), double(value_b))


@triton.jit
def learning_rate(p_lr_b, p_lr_a, is_a, lr_b, lr_a, LR_IN_MEMORY: tl.constexpr):
    """Returns the learning rate of a factor's side in float64, from memory with LR_IN_MEMORY."""
    if LR_IN_MEMORY:
        lr = tl.where(is_a, tl.load(p_lr_a).to(tl.float64), tl.load(p_lr_b).to(tl.float64))
    else:
        lr = choose_side(is_a, lr_b, lr_a)
    return lr


@triton.jit
def step_constants(lr, beta1, beta2, eps, decay, t):
    """Returns the constants of AdamW's step t in float32: 1-β₁, β₂, 1-β₂, η/(1-β₁ᵗ), √(1-β₂ᵗ), ε, 1-η w. They are
    computed in float64 once a program, since most cards are 64 times slower in it."""
    step_size, root = lr / (1.0 - power(beta1, t)), tl.sqrt(1.0 - power(beta2, t))
    return (
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        step_size.to(tl.float32),
        root.to(tl.float32),
        eps.to(tl.float32),
        (1.0 - lr * decay).to(tl.float32),
    )


@triton.jit
def adamw(b_p, b_g, b_m, b_v, constants):
    """Returns the new p, m, v in float32. ``constants``: of ``step_constants``."""
    one_minus_beta1, beta2, one_minus_beta2, step_size, root, eps, decay_factor = constants
    b_m += (b_g - b_m) * one_minus_beta1
    b_v = b_v * beta2 + b_g * b_g * one_minus_beta2
    b_p *= decay_factor
    b_p -= step_size * (b_m / (tl.sqrt_rn(b_v) / root + eps))
    return b_p, b_m, b_v


@triton.jit
def step_factor(
    entries, gradients, steps, keys, additive, matrices, scale_p, scale_g, partials, totals, counters,
    i_tensor, i_chunk, t, constants,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    IS_A: tl.constexpr, ADD: tl.constexpr, MATRIX: tl.constexpr, SCALE: tl.constexpr, GRAM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Runs the step on one chunk of one factor."""
    SIZE: tl.constexpr = R_MAX * R_MAX
    WIDE: tl.constexpr = ALIGNED and (IS_A or EXPERTS == 1)  # experts' b are interleaved: read element by element
    p, g = tensor_at(entries, i_tensor, 0, P, WIDE), pointer_at(gradients + i_tensor, G, WIDE)
    m, v = tensor_at(entries, i_tensor, 1, M, WIDE), tensor_at(entries, i_tensor, 2, V, WIDE)
    if BLOCK_R == 1:
        d, r = load_flat_sizes(entries, i_tensor, ALIGNED)
    else:
        d, r = load_sizes(entries, i_tensor, IS_A, UNIFORM_R, WIDE)
    index, count = load_entry(entries, i_tensor, INDEX), count_programs(d, CHUNK)
    i_r = tl.arange(0, BLOCK_R)
    m_r = i_r < r
    if MATRIX:
        p_matrix = matrices + index * SIZE
        if BLOCK_K == BLOCK_R:
            b_matrix = load_matrix(p_matrix, i_r, i_r, r, IS_A, R_MAX)
    c = 0.0
    if ADD:
        c = tl.load(additive + index)
    key = tl.load(keys + index) if STOCHASTIC else 0
    if SCALE:
        b_scale_p = tl.load(scale_p + index * R_MAX + i_r, mask=m_r, other=0.0)[None, :]
        b_scale_g = tl.load(scale_g + index * R_MAX + i_r, mask=m_r, other=0.0)[None, :]
    if GRAM:
        b_gram = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, chunk_end(entries, i_tensor, start, d, CHUNK), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        mask = (i_d < d)[:, None] & m_r[None, :]
        o_tile = tile_offsets(i_d, i_r, d, r, IS_A, EXPERTS)  # [BLOCK_D, BLOCK_R], as all that follows
        b_p = tl.load(p + o_tile, mask=mask, other=0.0)
        # A 16-bit p in the operand of an "ieee" dot needs ``to_float32`` (primitives.keep_ieee).
        b_p = to_float32(b_p) if ADD and MATRIX else b_p.to(tl.float32)
        b_m = tl.load(m + o_tile, mask=mask, other=0.0).to(tl.float32)
        b_v = tl.load(v + o_tile, mask=mask, other=0.0).to(tl.float32)
        if MATRIX and BLOCK_K < BLOCK_R:
            b_g = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
            b_g = times_matrix(
                b_g, g, p, p_matrix,
                i_d, i_r, d, r, c,
                IS_A, ADD, EXPERTS,
                R_MAX, BLOCK_K,
            )  # fmt: skip
        else:
            b_g = to_float32(tl.load(g + o_tile, mask=mask, other=0.0))
            if ADD:
                b_g += c * b_p
            if MATRIX:
                b_g = dot(b_g, b_matrix, tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32), "ieee")
        if SCALE:
            # Rounded as the merge rounds it, so that what is merged is what the factors lose.
            b_p, b_g = scaled_to(b_p, b_scale_p, P), b_g * b_scale_g
            b_m, b_v = b_m * b_scale_g, b_v * b_scale_g * b_scale_g
        b_p, b_m, b_v = adamw(b_p, b_g, b_m, b_v, constants)
        b_new = round_tile(b_p, key, t, i_d, o_d, UPDATE, P, STOCHASTIC, BLOCK_D, BLOCK_R)
        tl.store(p + o_tile, b_new, mask=mask)
        tl.store(m + o_tile, round_to(b_m, M), mask=mask)
        tl.store(v + o_tile, round_to(b_v, V), mask=mask)
        if GRAM:
            b_new = tl.where(mask, b_new, tl.zeros_like(b_new))  # 0 / (0 + ε) is NaN beyond the mask where ε is 0
            b_gram = dot(tl.trans(b_new), b_new, b_gram, "ieee")
    if GRAM:
        p_partial, p_total = partials + tl.program_id(0).to(tl.int64) * SIZE, totals + index * SIZE
        store_partial(b_gram, p_partial, p_total, i_r, i_r, count, R_MAX)
    if is_last_program(counters + i_tensor, count):
        tl.store(steps + index, t)
        if GRAM and count > 1:
            stride = EXPERTS * SIZE
            add_partials(p_partial - i_chunk.to(tl.int64) * stride, p_total, stride, i_r, i_r, count, R_MAX)


# do_not_specialize: the alignment of a learning rate's address must not choose another compiled kernel.
@triton.jit(do_not_specialize=["p_lr_b", "p_lr_a"])
def lora_step_kernel(
    entries, gradients, tiles, hyper, p_lr_b, p_lr_a, steps, keys, additive, matrices, scale_p, scale_g, partials,
    totals, counters,
    lr_b: tl.float64, beta1_b: tl.float64, beta2_b: tl.float64, eps_b: tl.float64, decay_b: tl.float64,
    lr_a: tl.float64, beta1_a: tl.float64, beta2_a: tl.float64, eps_a: tl.float64, decay_a: tl.float64,
    stride_hyper,
    ROWS: tl.constexpr, LR_IN_MEMORY: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    ADD: tl.constexpr, MATRIX: tl.constexpr, SCALE: tl.constexpr, GRAM: tl.constexpr, STOCHASTIC: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS: hyperparameters are float64 rows, ``stride_hyper`` apart, one for every factor; else they are the numbers
    of each side. LR_IN_MEMORY: of these numbers, the learning rates are read at p_lr_b and p_lr_a."""
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    index, is_a = load_entry(entries, i_tensor, INDEX), load_entry(entries, i_tensor, SIDE) == SIDE_A
    t = tl.load(steps + index) + tl.where(load_entry(entries, i_tensor, RESTS) == 0, 1.0, 0.0)
    if ROWS:
        row = hyper + index * stride_hyper
        lr, beta1, beta2 = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        eps, decay = tl.load(row + 3), tl.load(row + 4)
    else:
        lr = learning_rate(p_lr_b, p_lr_a, is_a, lr_b, lr_a, LR_IN_MEMORY)
        beta1, beta2 = choose_side(is_a, beta1_b, beta1_a), choose_side(is_a, beta2_b, beta2_a)
        eps, decay = choose_side(is_a, eps_b, eps_a), choose_side(is_a, decay_b, decay_a)
    constants = step_constants(lr, beta1, beta2, eps, decay, t.to(tl.int32))
    walk_as_a = False if BLOCK_R == 1 else is_a  # a flat row of numbers has no side
    if walk_as_a:
        step_factor(
            entries, gradients, steps, keys, additive, matrices, scale_p, scale_g, partials, totals, counters,
            i_tensor, i_chunk, t, constants,
            P, G, M, V,
            True, ADD, MATRIX, SCALE, GRAM, STOCHASTIC,
            UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        step_factor(
            entries, gradients, steps, keys, additive, matrices, scale_p, scale_g, partials, totals, counters,
            i_tensor, i_chunk, t, constants,
            P, G, M, V,
            False, ADD, MATRIX, SCALE, GRAM, STOCHASTIC,
            UNIFORM_R, ALIGNED, EXPERTS, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip


class Settings(NamedTuple):
    """Hyperparameters as arguments of the launch.

    Attributes:
        numbers: learning rate, β₁, β₂, ε, weight decay of b's factors, then of a's.
        rates: the learning rates of b and of a in device memory, float tensors of one element, which are then read in
            place of the numbers.
    """

    numbers: tuple[float, ...]
    rates: tuple[torch.Tensor, torch.Tensor] | None = None


NO_SETTINGS = Settings((0.0,) * 2 * HYPER)  # for hyperparameters in rows: the kernel ignores the numbers


def step_(
    factors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    is_a: list[bool],
    hyper: torch.Tensor,
    steps: torch.Tensor,
    work: StepWork | None = None,
) -> torch.Tensor | None:
    """Runs one optimizer step on every factor (p, g, m, v), in place; g is only read. Twin:
    ``reference.pairs.adapter_step_``.

    Args:
        factors: contiguous tensors of one shape, of any float dtype each.
        is_a: whether the rank is first (r, d_in), or last (d_out, r).
        hyper: float64 (n, 5) or (1, 5), on the device: learning rate, β₁, β₂, ε, weight decay.
        steps: float32 (n,), on the device: the steps taken, incremented here.
        work: what the step does besides AdamW.

    Returns:
        The Grams of the new p, float32 (n, R, R), with ``work.gram``; else None.
    """
    work = work or StepWork()
    n, r_max = len(factors), largest_rank([f[0] for f in factors], is_a)
    check_tensor("hyper", hyper, (1 if len(hyper) == 1 else n, HYPER), torch.float64)
    _check_work(n, r_max, steps, work)
    if n == 0:
        return hyper.new_empty((0, r_max, r_max), dtype=torch.float32) if work.gram else None
    p, g, m, v = ([tensors[i] for tensors in factors] for i in range(4))
    totals = _empty_totals(n, r_max, steps.device) if work.gram and _gram_in_pass(r_max) else None
    _launch_step(find_tables([p, m, v], is_a, g), hyper, steps, work, totals, r_max)
    torch.autograd.graph.increment_version(p)
    return grams.factor_grams(p, is_a) if work.gram and totals is None else totals


def step_tables_(
    tables: list[TableWithGradients], n: int, r: int, settings: Settings, steps: torch.Tensor, work: StepWork
) -> torch.Tensor | None:
    """Runs ``step_`` on tables of n factors of rank r, with columns p, m, v and the gradients. The caller increments
    version counters, and computes Grams above ``GRAM_RANK``, where this function returns None."""
    _check_work(n, r, steps, work)
    totals = _empty_totals(n, r, steps.device) if work.gram and _gram_in_pass(r) else None
    _launch_step(tables, settings, steps, work, totals, r)
    return totals


def _empty_totals(n: int, r_max: int, device: torch.device) -> torch.Tensor:
    return torch.empty((n, r_max, r_max), dtype=torch.float32, device=device)


def _gram_in_pass(r_max: int) -> bool:
    return grouped("step", max(16, r_max)).r <= GRAM_RANK


def _launch_step(
    tables: list[TableWithGradients],
    hyper: torch.Tensor | Settings,
    steps: torch.Tensor,
    work: StepWork,
    totals: torch.Tensor | None,
    r_max: int,
) -> None:
    """``hyper``: rows in memory, or ``Settings``."""
    rows = hyper if isinstance(hyper, torch.Tensor) else None
    numbers, rates = NO_SETTINGS if rows is not None else hyper
    flags = work.additive is not None, work.matrices is not None, work.scale_p is not None, totals is not None
    many_rows, rate_dtypes = None if rows is None else len(rows) > 1, rates and tuple(rate.dtype for rate in rates)
    aligned = alignments([x for x in (rows, steps, *work[:4], work.keys) if x is not None])
    with on_device(steps):
        stream = stream_of(steps)
        for table in tables:
            stochastic = work.keys is not None and table.factors.dtypes[0].itemsize == 2
            kind = *flags, stochastic
            make = lambda table=table, kind=kind: _StepLaunch(table, r_max, rows, rates is not None, *kind)
            key = "step", table.dtype, r_max, many_rows, rate_dtypes, aligned, *kind
            plan(table.factors.plans, key, stream, make)(table, rows, rates, numbers, steps, work, totals, stream)


class _StepLaunch:
    """The launch of ``lora_step_kernel`` on one table, with what stays the same from step to step."""

    def __init__(
        self,
        table: TableWithGradients,
        r_max: int,
        rows: torch.Tensor | None,
        lr_in_memory: bool,
        add: bool,
        matrix: bool,
        scale: bool,
        gram: bool,
        stochastic: bool,
    ):
        factors = table.factors
        # The noise has a numbering for rows and one for flat numbers; the twin takes the latter for AdamW alone, too.
        flat = not (matrix or scale or gram or (add and stochastic)) and factors.experts == 1
        tile = grouped("step", 1 if flat else max(16, r_max))
        self.tile_map = factors.tile_map(tile.chunk, flat)
        self.partials = (self.tile_map.programs, r_max, r_max) if gram else None
        types = zip("PGMV", (factors.dtypes[0], table.dtype, *factors.dtypes[1:]), strict=True)
        self.launch = Launch(
            lora_step_kernel,
            (self.tile_map.programs,),
            (HYPER if rows is not None and len(rows) > 1 else 0,),
            {"ROWS": rows is not None, "LR_IN_MEMORY": lr_in_memory}
            | {name: TL_DTYPE[dtype] for name, dtype in types}
            | {"ADD": add, "MATRIX": matrix, "SCALE": scale, "GRAM": gram, "STOCHASTIC": stochastic}
            | {"UNIFORM_R": 1 if flat else factors.uniform_r, "ALIGNED": factors.aligned, "EXPERTS": factors.experts}
            | {"R_MAX": 1 if flat else r_max}
            | tile.options(BLOCK_K=block_k(tile))
            | _register_limit(tile, add, matrix, gram, stochastic),
        )

    def __call__(
        self,
        table: TableWithGradients,
        rows: torch.Tensor | None,
        rates: tuple[torch.Tensor, torch.Tensor] | None,
        numbers: tuple[float, ...],
        steps: torch.Tensor,
        work: StepWork,
        totals: torch.Tensor | None,
        stream: int | None,
    ) -> None:
        partials = steps
        if self.partials:
            partials = torch.empty(self.partials, dtype=torch.float32, device=steps.device)
        # Every pointer argument needs a tensor. ``steps`` replaces those that are None; the kernel does not read them.
        hyper, lr_b, lr_a = steps if rows is None else rows, *(rates or (steps, steps))
        keys, *optional, totals = [steps if x is None else x for x in (work.keys, *work[:4], totals)]
        factors = table.factors
        self.launch.go(
            stream,
            (
                factors.entries, table.addresses, self.tile_map.tiles, hyper, lr_b, lr_a, steps, keys, *optional,
                partials, totals, factors.counters,
            ),
            numbers,
        )  # fmt: skip


def _register_limit(tile: GroupedTile, add: bool, matrix: bool, gram: bool, stochastic: bool) -> dict[str, int]:
    """Returns the limit of a thread's registers, where ptxas by itself spills to fit one more program on a
    multiprocessor."""
    if (gram or (add and matrix and stochastic)) and tile.r >= 64:
        return {"maxnreg": 255}
    if tile.r <= 64 and (matrix or (gram and stochastic)):
        return {"maxnreg": 128}
    return {"maxnreg": 80} if gram else {}


def _check_work(n: int, r_max: int, steps: torch.Tensor, work: StepWork) -> None:
    check_tensor("steps", steps, (n,), torch.float32)
    assert (work.scale_p is None) == (work.scale_g is None), "scale_p, scale_g: expected both or neither, got one"
    scales = (n, r_max)
    shapes = {"additive": (n,), "matrices": (n, r_max, r_max), "scale_p": scales, "scale_g": scales}
    for name, shape in shapes.items():
        if getattr(work, name) is not None:
            check_tensor(name, getattr(work, name), shape, torch.float32)
    if work.keys is not None:
        check_tensor("keys", work.keys, (n,), torch.int64)
