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

from . import gram as grams
from .gram import add_up, deposit, last_to_arrive, load_block
from .launch import check_tensor, on_device
from .primitives import dot, round_to, widened
from .table import (
    COUNT,
    FIRST,
    INDEX,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    Factor,
    Table,
    entry,
    group,
    offsets,
    sizes,
    tensor_at,
)
from .tiles import GroupedTile, grouped

GRAM_RANK = 64  # largest rank class whose Gram is summed while the step writes
HYPER = 5  # columns of ``hyper``: learning rate, β₁, β₂, ε, weight decay


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
def adamw(b_p, b_g, b_m, b_v, hyper, t):
    """New p, m, v, float32. hyper: float64 lr, β₁, β₂, ε, weight decay; t: the count, this step included."""
    lr, beta1, beta2 = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2)
    eps, decay = tl.load(hyper + 3), tl.load(hyper + 4)
    root = tl.sqrt(1.0 - power(beta2, t)).to(tl.float32)
    step_size = (lr / (1.0 - power(beta1, t))).to(tl.float32)
    b_m += (b_g - b_m) * (1.0 - beta1).to(tl.float32)
    b_v = b_v * beta2.to(tl.float32) + b_g * b_g * (1.0 - beta2).to(tl.float32)
    b_p *= (1.0 - lr * decay).to(tl.float32)
    b_p -= step_size * (b_m / (tl.sqrt_rn(b_v) / root + eps.to(tl.float32)))
    return b_p, b_m, b_v


@triton.jit
def load_matrix(matrix, i_k, i_r, r, IS_A: tl.constexpr, R_MAX: tl.constexpr):
    """M as it multiplies a tile [BLOCK_D, rank] from the right: M for b, Mᵀ for a. float32 [BLOCK_K, BLOCK_R]."""
    mask = (i_k < r)[:, None] & (i_r < r)[None, :]
    if IS_A:
        p_matrix = matrix + i_r[None, :] * R_MAX + i_k[:, None]
    else:
        p_matrix = matrix + i_k[:, None] * R_MAX + i_r[None, :]
    return tl.load(p_matrix, mask=mask, other=0.0)


@triton.jit
def times_matrix(
    b_acc, x, p, c, matrix, i_d, i_r, d, r, IS_A: tl.constexpr, ADD: tl.constexpr, R_MAX: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """b_acc + (x + c p) M for rows i_d where M is too large for registers: float32 [BLOCK_D, BLOCK_R]."""
    for o_k in tl.range(0, R_MAX, BLOCK_K, num_stages=1):
        i_k = o_k + tl.arange(0, BLOCK_K)
        b_x = widened(load_block(x, i_d, i_k, d, r, IS_A))  # [BLOCK_D, BLOCK_K]
        if ADD:
            b_x += c * widened(load_block(p, i_d, i_k, d, r, IS_A))
        b_acc = dot(b_x, load_matrix(matrix, i_k, i_r, r, IS_A, R_MAX), b_acc, "ieee")
    tl.debug_barrier()  # all of x and p is read before any of it is written
    return b_acc


@triton.jit
def step_factor(
    entries, hyper, steps, additive, matrices, scale_p, scale_g, partials, totals, counters,
    stride_hyper, i_tensor, i_chunk,
    IS_A: tl.constexpr, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    ADD: tl.constexpr, MATRIX: tl.constexpr, SCALE: tl.constexpr, GRAM: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One chunk of one factor."""
    SIZE: tl.constexpr = R_MAX * R_MAX
    p, g = tensor_at(entries, i_tensor, 0, P, ALIGNED), tensor_at(entries, i_tensor, 1, G, ALIGNED)
    m, v = tensor_at(entries, i_tensor, 2, M, ALIGNED), tensor_at(entries, i_tensor, 3, V, ALIGNED)
    d, r = sizes(entries, i_tensor, UNIFORM_R, ALIGNED)
    index, count = entry(entries, i_tensor, INDEX), entry(entries, i_tensor, COUNT)
    t = tl.load(steps + index) + 1.0
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
        o_tile = offsets(i_d, i_r, d, r, IS_A)  # [BLOCK_D, BLOCK_R], as all that follows
        b_p = tl.load(p + o_tile, mask=mask, other=0.0)
        b_p = widened(b_p) if ADD and MATRIX else b_p.to(tl.float32)
        b_m = tl.load(m + o_tile, mask=mask, other=0.0).to(tl.float32)
        b_v = tl.load(v + o_tile, mask=mask, other=0.0).to(tl.float32)
        if MATRIX and BLOCK_K < BLOCK_R:
            b_g = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
            b_g = times_matrix(b_g, g, p, c, p_matrix, i_d, i_r, d, r, IS_A, ADD, R_MAX, BLOCK_K)
        else:
            b_g = widened(tl.load(g + o_tile, mask=mask, other=0.0))
            if ADD:
                b_g += c * b_p
            if MATRIX:
                b_g = dot(b_g, b_matrix, tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32), "ieee")
        if SCALE:
            b_p, b_g = b_p * b_scale_p, b_g * b_scale_g
            b_m, b_v = b_m * b_scale_g, b_v * b_scale_g * b_scale_g
        b_p, b_m, b_v = adamw(b_p, b_g, b_m, b_v, hyper + index * stride_hyper, t.to(tl.int32))
        b_new = round_to(b_p, P)
        tl.store(p + o_tile, b_new, mask=mask)
        tl.store(m + o_tile, round_to(b_m, M), mask=mask)
        tl.store(v + o_tile, round_to(b_v, V), mask=mask)
        if GRAM:
            b_new = tl.where(mask, b_new, tl.zeros_like(b_new))
            b_gram = dot(tl.trans(b_new), b_new, b_gram, "ieee")
    if GRAM:
        p_first, p_total = partials + entry(entries, i_tensor, FIRST) * SIZE, totals + index * SIZE
        deposit(b_gram, p_first + i_chunk.to(tl.int64) * SIZE, p_total, i_r, i_r, count, R_MAX)
    if last_to_arrive(counters + i_tensor, count):
        tl.store(steps + index, t)
        if GRAM and count > 1:
            add_up(p_first, p_total, SIZE, i_r, i_r, count, R_MAX)


@triton.jit
def lora_step_kernel(
    entries, tiles, hyper, steps, additive, matrices, scale_p, scale_g, partials, totals, counters,
    stride_hyper,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    ADD: tl.constexpr, MATRIX: tl.constexpr, SCALE: tl.constexpr, GRAM: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    is_a = False if BLOCK_R == 1 else entry(entries, i_tensor, SIDE) == SIDE_A
    if is_a:
        step_factor(
            entries, hyper, steps, additive, matrices, scale_p, scale_g, partials, totals, counters, stride_hyper,
            i_tensor, i_chunk, True, P, G, M, V, ADD, MATRIX, SCALE, GRAM, UNIFORM_R, ALIGNED,
            R_MAX, CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        step_factor(
            entries, hyper, steps, additive, matrices, scale_p, scale_g, partials, totals, counters, stride_hyper,
            i_tensor, i_chunk, False, P, G, M, V, ADD, MATRIX, SCALE, GRAM, UNIFORM_R, ALIGNED,
            R_MAX, CHUNK, BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip


@triton.jit
def transform_factor(
    entries, matrices, i_tensor, i_chunk, IS_A: tl.constexpr, P: tl.constexpr, ADD: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tensor_at(entries, i_tensor, 0, P, ALIGNED)
    d, r = sizes(entries, i_tensor, UNIFORM_R, ALIGNED)
    matrix = matrices + entry(entries, i_tensor, INDEX) * R_MAX * R_MAX
    i_r = tl.arange(0, BLOCK_R)
    if BLOCK_K == BLOCK_R:
        b_matrix = load_matrix(matrix, i_r, i_r, r, IS_A, R_MAX)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, tl.minimum(start + CHUNK, d), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_new = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
        if BLOCK_K < BLOCK_R:
            if ADD:
                b_new += load_block(p, i_d, i_r, d, r, IS_A).to(tl.float32)
            b_new = times_matrix(b_new, p, p, 0.0, matrix, i_d, i_r, d, r, IS_A, False, R_MAX, BLOCK_K)
        else:
            b_p = widened(load_block(p, i_d, i_r, d, r, IS_A))  # [BLOCK_D, BLOCK_R]
            b_new = dot(b_p, b_matrix, b_p if ADD else b_new, "ieee")
        mask = (i_d < d)[:, None] & (i_r < r)[None, :]
        tl.store(p + offsets(i_d, i_r, d, r, IS_A), round_to(b_new, P), mask=mask)


@triton.jit
def lora_transform_kernel(
    entries, tiles, matrices, P: tl.constexpr, ADD: tl.constexpr, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr,
    R_MAX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if entry(entries, i_tensor, SIDE) == SIDE_A:
        transform_factor(
            entries, matrices, i_tensor, i_chunk, True, P, ADD, UNIFORM_R, ALIGNED, R_MAX, CHUNK, BLOCK_D, BLOCK_R,
            BLOCK_K,
        )  # fmt: skip
    else:
        transform_factor(
            entries, matrices, i_tensor, i_chunk, False, P, ADD, UNIFORM_R, ALIGNED, R_MAX, CHUNK, BLOCK_D, BLOCK_R,
            BLOCK_K,
        )  # fmt: skip


class Work(NamedTuple):
    """What ``step_`` does besides AdamW; row i belongs to factor i, R is the largest rank."""

    additive: torch.Tensor | None = None  # c, float32 (n,)
    matrices: torch.Tensor | None = None  # M, float32 (n, R, R)
    scale_p: torch.Tensor | None = None  # d, float32 (n, R)
    scale_g: torch.Tensor | None = None  # e, float32 (n, R)
    gram: bool = False


def step_(
    factors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    is_a: list[bool],
    hyper: torch.Tensor,
    steps: torch.Tensor,
    work: Work | None = None,
) -> torch.Tensor | None:
    """One optimizer step of every factor (p, g, m, v), in place; g is only read. Returns the Grams of the new p,
    float32 (n, R, R), where ``work.gram``.

    is_a: rank first (r, d_in), or last (d_out, r). hyper: float64 (n, 5) or (1, 5), on the device: learning rate, β₁,
    β₂, ε, weight decay. steps: float32 (n,), on the device: the steps taken, counted up here."""
    work = work or Work()
    n, r_max = len(factors), _largest_rank(factors, is_a)
    _check_work(n, r_max, hyper, steps, work)
    if n == 0:
        return hyper.new_empty((0, r_max, r_max), dtype=torch.float32) if work.gram else None
    flat = not work.gram and work.matrices is None and work.scale_p is None
    tile = grouped("step", 1 if flat else max(16, r_max))
    in_pass = work.gram and tile.r <= GRAM_RANK
    totals = torch.empty((n, r_max, r_max), dtype=torch.float32, device=hyper.device) if in_pass else None
    rows = [Factor(tensors, side, i) for i, (tensors, side) in enumerate(zip(factors, is_a, strict=True))]
    for table in group(rows, tile.chunk, flat):
        _launch_step(table, hyper, steps, work, totals, 1 if flat else r_max, tile)
    torch.autograd.graph.increment_version([tensors[0] for tensors in factors])
    if work.gram and not in_pass:
        return grams.factor_grams([tensors[0] for tensors in factors], is_a)
    return totals


def _launch_step(table: Table, hyper, steps, work: Work, totals, r_max: int, tile: GroupedTile) -> None:
    types = dict(zip("PGMV", (TL_DTYPE[dtype] for dtype in table.dtypes), strict=True))
    partials = None
    if totals is not None:
        partials = torch.empty((table.programs, r_max, r_max), dtype=torch.float32, device=hyper.device)
    with on_device(hyper):
        lora_step_kernel[(table.programs,)](
            table.entries, table.tiles, hyper, steps, work.additive, work.matrices, work.scale_p, work.scale_g,
            partials, totals, table.counters, HYPER if hyper.shape[0] > 1 else 0,
            **types, ADD=work.additive is not None, MATRIX=work.matrices is not None,
            SCALE=work.scale_p is not None, GRAM=totals is not None,
            UNIFORM_R=table.uniform_r, ALIGNED=table.aligned, R_MAX=r_max, CHUNK=tile.chunk, BLOCK_D=tile.d,
            BLOCK_R=tile.r, BLOCK_K=_block_k(tile), num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=_registers(tile, work.matrices is not None, totals is not None),
        )  # fmt: skip


def _registers(tile: GroupedTile, matrix: bool, gram: bool) -> int | None:
    """A thread's, said where ptxas, left to itself, spills to fit one program more on a multiprocessor."""
    if gram:
        return 255 if tile.r * (1 + matrix) >= 64 else None
    return 128 if matrix and tile.r == 16 else None


def transform_(tensors: list[torch.Tensor], is_a: list[bool], matrices: torch.Tensor, add: bool = False) -> None:
    """p ← M p (rank first) or p ← p M (rank last) for every factor, in place; with ``add``, p ← p + M p or p + p M.
    matrices: float32 (n, R, R), R the largest rank."""
    r_max = _largest_rank([(t,) for t in tensors], is_a)
    check_tensor("matrices", matrices, (len(tensors), r_max, r_max), torch.float32)
    if not tensors:
        return
    tile = grouped("transform", max(16, r_max))
    rows = [Factor((t,), side, i) for i, (t, side) in enumerate(zip(tensors, is_a, strict=True))]
    with on_device(matrices):
        for table in group(rows, tile.chunk):
            lora_transform_kernel[(table.programs,)](
                table.entries, table.tiles, matrices, P=TL_DTYPE[table.dtypes[0]], ADD=add,
                UNIFORM_R=table.uniform_r, ALIGNED=table.aligned, R_MAX=r_max, CHUNK=tile.chunk, BLOCK_D=tile.d,
                BLOCK_R=tile.r, BLOCK_K=_block_k(tile), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    torch.autograd.graph.increment_version(tensors)


def _block_k(tile: GroupedTile) -> int:
    """Rows of M in one product: all of them up to rank 64, where M then stays in registers."""
    return tile.r if tile.r <= GRAM_RANK else 16


def _largest_rank(factors: list[tuple], is_a: list[bool]) -> int:
    return max((f[0].shape[0 if side else 1] for f, side in zip(factors, is_a, strict=True)), default=1)


def _check_work(n: int, r_max: int, hyper: torch.Tensor, steps: torch.Tensor, work: Work) -> None:
    check_tensor("hyper", hyper, (1 if hyper.shape[0] == 1 else n, HYPER), torch.float64)
    check_tensor("steps", steps, (n,), torch.float32)
    if (work.scale_p is None) != (work.scale_g is None):
        raise ValueError("lora_fast: scale_p and scale_g come together, got one of them")
    scales = (n, r_max)
    shapes = {"additive": (n,), "matrices": (n, r_max, r_max), "scale_p": scales, "scale_g": scales}
    for name, shape in shapes.items():
        if getattr(work, name) is not None:
            check_tensor(name, getattr(work, name), shape, torch.float32)
