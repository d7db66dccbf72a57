"""The Cayley transform of NB-LoRA and its backward, for all pairs at once ("Norm-Bounded Low-Rank Adaptation").

Math      With ã = [a1 | a2], a1 (r, r), and D = diag(scale), I where there is none:
              M = I + a1ᵀ − a1 + a2 a2ᵀ + b̃ᵀb̃    W = M⁻¹    a = [2 Wᵀ − I | −2 Wᵀ a2]    b = −2 b̃ W D
          from ga, gb, with C = b̃ᵀgb:
              T = ga1ᵀ − a2 ga2ᵀ − C D    S = 2 Wᵀ T Wᵀ    R = S + Sᵀ    d scale = −2 · column sums of W∘C
              d a1 = S − Sᵀ    d a2 = −R a2 − 2 W ga2    d b̃ = −b̃ R − 2 gb D Wᵀ
          Seen as d rows of r columns (table.py), every tall product is x A, or x A + y B, and every sum xᵀy.
Grid      three launches each way, however many pairs: (1) xᵀy of all factors, as gram.py; (2) the r×r algebra and what
          belongs to a1, cayley_middle.py; (3) the tall products, one program per chunk of d. One more set for each
          dtype of parameters.
Shapes    ã (r, d_in), b̃ (d_out, r), one float dtype a pair → a, b, W float32; gradients in ã's dtype. Ranks from 1 to
          256, mixed; r×r scratch is padded to the largest. Arithmetic is float32, but M and I − M W are float64, sums
          and products: a large skew part, or rows that are nearly alike, would cost M its smallest eigenvalues, and
          a aᵀ + bᵀb = I with them.
Backward  keeps W only.
Roofline  ã and b̃ read twice and written once (backward: three reads more); r×r work is bound by latency.
"""

import torch
import triton
import triton.language as tl

from .blocked import registers
from .cayley_middle import WARPS, lora_cayley_backward_kernel, lora_cayley_inverse_kernel, pair_table
from .gram import add_up, deposit, last_to_arrive, load_block
from .launch import LARGEST_RANK, on_device
from .primitives import dot, round_to, widened
from .solve import SLOTS
from .step import load_matrix
from .table import (
    COUNT,
    FIRST,
    INDEX,
    SIDE,
    SIDE_A,
    TL_DTYPE,
    Factor,
    entry,
    group,
    offsets,
    sizes,
    tensor_at,
)
from .tiles import grouped

IN_REGISTERS = 64  # largest rank class whose r×r matrices stay in registers while a factor passes


# ---- xᵀy over the factors


@triton.jit
def load_below(p, i_d, i_r, d, r, IS_A: tl.constexpr, DTYPE: tl.constexpr):
    """Rows i_d of a factor, as DTYPE; of an a, without its first r."""
    b = widened(load_block(p, i_d, i_r, d, r, IS_A)).to(DTYPE)  # [BLOCK_D, BLOCK_R]
    if IS_A:
        b = tl.where((i_d >= r)[:, None], b, 0.0)
    return b


@triton.jit
def inner_factor(
    entries, partials, totals, counters, i_tensor, i_chunk, IS_A: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    SAME: tl.constexpr, SUM: tl.constexpr, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One chunk of one factor, one block of xᵀy; SAME: y is x."""
    N_BLOCKS: tl.constexpr = (R_MAX + BLOCK_R - 1) // BLOCK_R
    SIZE: tl.constexpr = R_MAX * R_MAX
    x, y = tensor_at(entries, i_tensor, 0, X, ALIGNED), tensor_at(entries, i_tensor, 1, Y, ALIGNED)
    d, r = sizes(entries, i_tensor, UNIFORM_R, ALIGNED)
    i_row = (tl.program_id(1) // N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_col = (tl.program_id(1) % N_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_sum = tl.zeros([BLOCK_R, BLOCK_R], dtype=SUM)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, tl.minimum(start + CHUNK, d), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_x = load_below(x, i_d, i_row, d, r, IS_A, SUM)
        if not (SAME and R_MAX <= BLOCK_R):
            b_y = load_below(y, i_d, i_col, d, r, IS_A, SUM)
        else:
            b_y = b_x
        b_sum = dot(tl.trans(b_x), b_y, b_sum, "ieee")
    count, p_first = entry(entries, i_tensor, COUNT), partials + entry(entries, i_tensor, FIRST) * SIZE
    p_total = totals + entry(entries, i_tensor, INDEX) * SIZE
    deposit(b_sum, p_first + i_chunk.to(tl.int64) * SIZE, p_total, i_row, i_col, count, R_MAX)
    if count > 1:  # noqa: SIM102 - a jit function evaluates both sides of an `and`
        if last_to_arrive(counters + i_tensor * N_BLOCKS * N_BLOCKS + tl.program_id(1), count):
            add_up(p_first, p_total, SIZE, i_row, i_col, count, R_MAX)


@triton.jit
def lora_cayley_inner_kernel(
    entries, tiles, partials, totals, counters, X: tl.constexpr, Y: tl.constexpr, SAME: tl.constexpr,
    SUM: tl.constexpr, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if entry(entries, i_tensor, SIDE) == SIDE_A:
        inner_factor(
            entries, partials, totals, counters, i_tensor, i_chunk, True, X, Y, SAME, SUM, UNIFORM_R, ALIGNED, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    else:
        inner_factor(
            entries, partials, totals, counters, i_tensor, i_chunk, False, X, Y, SAME, SUM, UNIFORM_R, ALIGNED, R_MAX,
            CHUNK, BLOCK_D, BLOCK_R,
        )  # fmt: skip


# ---- x A + y B over the factors


@triton.jit
def tall_product(
    b_sum, p, matrix, b_matrix, i_d, i_r, d, r, IS_A: tl.constexpr, R_MAX: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """b_sum + rows i_d of p times the matrix, which is in registers where BLOCK_K is BLOCK_R."""
    if BLOCK_K == BLOCK_R:
        b_sum = dot(widened(load_block(p, i_d, i_r, d, r, IS_A)), b_matrix, b_sum, "ieee")
    else:
        for o_k in tl.range(0, R_MAX, BLOCK_K, num_stages=1):
            i_k = o_k + tl.arange(0, BLOCK_K)
            b_p = widened(load_block(p, i_d, i_k, d, r, IS_A))  # [BLOCK_D, BLOCK_K]
            b_sum = dot(b_p, load_matrix(matrix, i_k, i_r, r, False, R_MAX), b_sum, "ieee")
    return b_sum


@triton.jit
def outer_factor(
    entries, factors, i_tensor, i_chunk, n, IS_A: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, OUT: tl.constexpr,
    BACKWARD: tl.constexpr, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One chunk of one factor. A and B among ``factors``: forward i for a, n + i for b, no B; backward i for both, and
    n + i for a, 2n + i for b, i being the pair."""
    SIZE: tl.constexpr = R_MAX * R_MAX
    x, y = tensor_at(entries, i_tensor, 0, X, ALIGNED), tensor_at(entries, i_tensor, 1, Y, ALIGNED)
    out = tensor_at(entries, i_tensor, 2, OUT, ALIGNED)
    d, r = sizes(entries, i_tensor, UNIFORM_R, ALIGNED)
    index = entry(entries, i_tensor, INDEX)  # of a pair's a, n more for its b
    i_r = tl.arange(0, BLOCK_R)
    p_a = factors + index * SIZE
    if BACKWARD:
        p_b = p_a + n * SIZE
        if not IS_A:
            p_a -= n * SIZE
    else:
        p_b = p_a
    b_a, b_b = 0.0, 0.0
    if BLOCK_K == BLOCK_R:
        b_a = load_matrix(p_a, i_r, i_r, r, False, R_MAX)
        if BACKWARD:
            b_b = load_matrix(p_b, i_r, i_r, r, False, R_MAX)
    start = i_chunk.to(tl.int64) * CHUNK
    for o_d in tl.range(start, tl.minimum(start + CHUNK, d), BLOCK_D, num_stages=1):
        i_d = o_d + tl.arange(0, BLOCK_D)
        b_out = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
        b_out = tall_product(b_out, x, p_a, b_a, i_d, i_r, d, r, IS_A, R_MAX, BLOCK_K, BLOCK_R)
        if BACKWARD:
            b_out = tall_product(b_out, y, p_b, b_b, i_d, i_r, d, r, IS_A, R_MAX, BLOCK_K, BLOCK_R)
        mask = (i_d < d)[:, None] & (i_r < r)[None, :]
        if IS_A:
            mask = mask & (i_d >= r)[:, None]
        tl.store(out + offsets(i_d, i_r, d, r, IS_A), round_to(b_out, OUT), mask=mask)


@triton.jit(do_not_specialize=["n"])
def lora_cayley_outer_kernel(
    entries, tiles, factors, n, X: tl.constexpr, Y: tl.constexpr, OUT: tl.constexpr, BACKWARD: tl.constexpr,
    UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr, R_MAX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_tensor, i_chunk = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if entry(entries, i_tensor, SIDE) == SIDE_A:
        outer_factor(
            entries, factors, i_tensor, i_chunk, n, True, X, Y, OUT, BACKWARD, UNIFORM_R, ALIGNED, R_MAX, CHUNK,
            BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        outer_factor(
            entries, factors, i_tensor, i_chunk, n, False, X, Y, OUT, BACKWARD, UNIFORM_R, ALIGNED, R_MAX, CHUNK,
            BLOCK_D, BLOCK_R, BLOCK_K,
        )  # fmt: skip


def cayley(
    free_a: list[torch.Tensor], free_b: list[torch.Tensor], scales: list[torch.Tensor] | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """a (r, d_in), b · diag(scale) (d_out, r) and W (r, r) of every pair, float32, from free_a and free_b in one float
    dtype a pair; scales float32 (r,). Twin: ``reference_cayley.cayley``."""
    _check(free_a, free_b, scales)
    if not free_a:
        return [], [], []
    free_a, free_b = ([x.contiguous() for x in xs] for xs in (free_a, free_b))
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=free_a[0].device)
    a, b, inverses = ([new(*shape) for shape in shapes] for shapes in zip(*map(_shapes, free_a, free_b), strict=True))
    for some in _by_dtype(free_a):
        x_a, x_b, out_a, out_b, w = ([tensors[i] for i in some] for tensors in (free_a, free_b, a, b, inverses))
        scale = [scales[i] for i in some] if scales else None
        n, r_max, block_r = _sizes(x_a)
        factors = [Factor((x, x, out), True, i) for i, (x, out) in enumerate(zip(x_a, out_a, strict=True))]
        factors += [Factor((x, x, out), False, n + i) for i, (x, out) in enumerate(zip(x_b, out_b, strict=True))]
        totals = _inner(factors, r_max, backward=False)
        times, slots = new(2 * n, r_max, r_max), min(n, SLOTS)
        matrices = torch.empty((slots, block_r, block_r), dtype=torch.float64, device=times.device)
        with on_device(times):
            lora_cayley_inverse_kernel[(slots,)](
                pair_table(x_a, out_a, w, scale), totals, times, matrices, new(slots, 2, block_r, block_r), n,
                P=TL_DTYPE[x_a[0].dtype], SCALED=scale is not None, R_MAX=r_max, BLOCK_R=block_r,
                num_warps=WARPS[block_r], maxnreg=registers(block_r),
            )  # fmt: skip
        _outer(factors, times, n, r_max, backward=False)
    return a, b, inverses


def cayley_backward(
    free_a: list[torch.Tensor],
    free_b: list[torch.Tensor],
    scales: list[torch.Tensor] | None,
    inverses: list[torch.Tensor],
    grad_a: list[torch.Tensor],
    grad_b: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor] | None]:
    """The gradients of free_a, free_b, in their dtypes, and of scales (None without), from those of a and of the scaled
    b, any float dtype. Twin: ``reference_cayley.cayley_backward``."""
    _check(free_a, free_b, scales)
    if not free_a:
        return [], [], None
    free_a, free_b = ([x.contiguous() for x in xs] for xs in (free_a, free_b))
    grad_a, grad_b, inverses = ([x.float().contiguous() for x in xs] for xs in (grad_a, grad_b, inverses))
    da, db = ([torch.empty_like(x) for x in xs] for xs in (free_a, free_b))
    dscales = [torch.empty_like(x) for x in scales] if scales else None
    for some in _by_dtype(free_a):
        pick = lambda tensors: [tensors[i] for i in some]  # noqa: B023 - used within this round
        x_a, x_b, out_a, out_b, g_a, g_b = map(pick, (free_a, free_b, da, db, grad_a, grad_b))
        scale = (pick(scales), pick(dscales)) if scales else (None, None)
        n, r_max, block_r = _sizes(x_a)
        factors = [Factor(tensors, True, i) for i, tensors in enumerate(zip(x_a, g_a, out_a, strict=True))]
        factors += [Factor(tensors, False, n + i) for i, tensors in enumerate(zip(x_b, g_b, out_b, strict=True))]
        totals = _inner(factors, r_max, backward=True)
        slots = min(n, SLOTS)
        times = totals.new_empty((3 * n, r_max, r_max))
        with on_device(times):
            lora_cayley_backward_kernel[(slots,)](
                pair_table(g_a, out_a, pick(inverses), *scale), totals, times,
                totals.new_empty((slots, 3, block_r, block_r)), n, P=TL_DTYPE[x_a[0].dtype],
                SCALED=scale[0] is not None, R_MAX=r_max, BLOCK_R=block_r, num_warps=WARPS[block_r],
                maxnreg=registers(block_r),
            )  # fmt: skip
        _outer(factors, times, n, r_max, backward=True)
    return da, db, dscales


def _inner(factors: list[Factor], r_max: int, backward: bool) -> torch.Tensor:
    """xᵀy of the first two tensors of every factor, (n, R, R): float64 forward, where y is x; float32 backward."""
    tile = grouped("gram", max(16, r_max))
    (table,) = group(factors, tile.chunk)
    totals, partials = (
        torch.empty(
            (count, r_max, r_max), dtype=torch.float32 if backward else torch.float64, device=table.entries.device
        )
        for count in (len(factors), table.programs)
    )
    x, y, _ = (TL_DTYPE[of] for of in table.dtypes)
    with on_device(totals):
        lora_cayley_inner_kernel[(table.programs, triton.cdiv(r_max, tile.r) ** 2)](
            table.entries, table.tiles, partials, totals, table.counters, X=x, Y=y, SAME=not backward,
            SUM=tl.float32 if backward else tl.float64, UNIFORM_R=table.uniform_r, ALIGNED=table.aligned,
            R_MAX=r_max, CHUNK=tile.chunk, BLOCK_D=tile.d, BLOCK_R=tile.r, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return totals


def _outer(factors: list[Factor], times: torch.Tensor, n: int, r_max: int, backward: bool) -> None:
    """The third tensor of every factor, from the first two."""
    tile = grouped("step", max(16, r_max))
    (table,) = group(factors, tile.chunk)
    x, y, out = (TL_DTYPE[dtype] for dtype in table.dtypes)
    with on_device(times):
        lora_cayley_outer_kernel[(table.programs,)](
            table.entries, table.tiles, times, n, X=x, Y=y, OUT=out, BACKWARD=backward,
            UNIFORM_R=table.uniform_r, ALIGNED=table.aligned, R_MAX=r_max, CHUNK=tile.chunk, BLOCK_D=tile.d,
            BLOCK_R=tile.r, BLOCK_K=tile.r if tile.r <= IN_REGISTERS else 16,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=128,
        )  # fmt: skip


def _shapes(free_a: torch.Tensor, free_b: torch.Tensor) -> tuple:
    """Of a, b and W."""
    return free_a.shape, free_b.shape, (len(free_a), len(free_a))


def _sizes(free_a: list[torch.Tensor]) -> tuple[int, int, int]:
    """Pairs, largest rank, and that padded."""
    r_max = max(len(x) for x in free_a)
    return len(free_a), r_max, max(16, triton.next_power_of_2(r_max))


def _by_dtype(tensors: list[torch.Tensor]) -> list[list[int]]:
    """Positions of tensors of one dtype."""
    places: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        places.setdefault(x.dtype, []).append(i)
    return list(places.values())


def _check(free_a: list[torch.Tensor], free_b: list[torch.Tensor], scales: list[torch.Tensor] | None) -> None:
    for i, (a, b) in enumerate(zip(free_a, free_b, strict=True)):
        fits = a.ndim == b.ndim == 2 and 1 <= a.shape[0] <= min(a.shape[1], LARGEST_RANK)
        if not fits or b.shape[1] != a.shape[0] or a.dtype != b.dtype:
            raise ValueError(
                f"lora_fast: pair {i}: expected free_a (r, d_in) and free_b (d_out, r) of one dtype, r at most d_in "
                f"and {LARGEST_RANK}, got {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
            )
    for i, (a, scale) in enumerate(zip(free_a, scales or [], strict=bool(scales))):
        if scale.shape != a.shape[:1] or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(
                f"lora_fast: scale {i}: expected contiguous float32 ({len(a)},), got {scale.dtype} {tuple(scale.shape)}"
            )
