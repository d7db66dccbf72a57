"""The Cayley transform of NB-LoRA and its backward, for all pairs at once ("Norm-Bounded Low-Rank Adaptation").

Math      With ã = [a1 | a2], a1 (r, r), and D = diag(scale), I where there is none:
              M = (1 + τ) I + a1ᵀ − a1 + a2 a2ᵀ + b̃ᵀb̃    τ = ε ‖M‖_F, M's rounding errors
              W = M⁻¹    a = [2 Wᵀ − I | −2 Wᵀ a2]    b = −2 b̃ W D
          from ga, gb, with C = b̃ᵀgb:
              T = ga1ᵀ − a2 ga2ᵀ − C D    S = 2 Wᵀ T Wᵀ    R = S + Sᵀ    d scale = −2 · column sums of W∘C
              d a1 = S − Sᵀ    d a2 = −R a2 − 2 W ga2    d b̃ = −b̃ R − 2 gb D Wᵀ
          Seen as d rows of r columns (pointer_table.py), every tall product is x A, or x A + y B, and every sum xᵀy.
Grid      Three launches each way, however many pairs: (1) xᵀy of all factors, sums.py; (2) the r×r algebra and
          the first r columns of a, algebra.py; (3) the tall products, products.py. Parameters of another dtype take
          another three. Parameters have their addresses in a table (pointer_table.py), so they must not move in a CUDA
          graph; all other tensors may move (addresses.py).
Shapes    ã (r, d_in), b̃ (d_out, r), one float dtype a pair → a, b float32, W float64; gradients in ã's dtype. Ranks
          from 1 to 256, mixed; r×r scratch is padded to the largest. Arithmetic is float64. Where the parameters have a
          large part in common (a direction, equal rows, the skew part), it cancels out of every product with W, and
          float32 would lose the result with it. τ keeps a aᵀ + bᵀb ≤ I, however large the parameters are.
Backward  W alone is saved. Results of one call are slices of one buffer.
Roofline  ã and b̃ read twice and written once (backward: three reads more); r×r work is bound by latency.
"""

from collections.abc import Callable

import torch
import triton

from ..grouping import map_groups
from ..launch import on_device
from ..limits import LARGEST_RANK
from ..linalg.blocked import registers
from ..linalg.spd import SLOTS
from ..pointer_table import TL_DTYPE, FactorTable, find_table
from .addresses import Kinds, allocate
from .algebra import WARPS, lora_cayley_backward_kernel, lora_cayley_inverse_kernel
from .products import factor_products
from .sums import factor_sums

__all__ = ["cayley", "cayley_backward"]

Tensors = list[torch.Tensor]


def cayley(free_a: Tensors, free_b: Tensors, scales: Tensors | None = None) -> tuple[Tensors, Tensors, Tensors]:
    """Computes the transform of every pair. Twin: ``reference.cayley.cayley``.

    Args:
        free_a, free_b: (r, d_in) and (d_out, r), one float dtype a pair, r at most d_in.
        scales: float32 (r,), contiguous.

    Returns:
        a (r, d_in) and b · diag(scale) (d_out, r) of every pair, float32, and W (r, r), float64.
    """
    _check(free_a, free_b, scales)
    a, b, inverses = _by_dtype(_forward, 3, free_a, free_b, scales)
    return a, b, inverses


def _forward(free_a: Tensors, free_b: Tensors, scales: Tensors | None) -> tuple[Tensors, Tensors, Tensors]:
    """Computes ``cayley`` for parameters of one dtype."""
    table = _table(free_a, free_b)
    n, r_max, block_r = len(free_a), table.r_max, _block(table.r_max)
    kinds: Kinds = [(x.shape, torch.float32) for x in free_a + free_b]
    kinds += [((len(x), len(x)), torch.float64) for x in free_a]
    listed = allocate(kinds, scales or [], table.device)
    totals = factor_sums(table, listed.addresses, backward=False)
    slots = min(n, SLOTS)
    multipliers, scratch = totals.new_empty((2 * n, r_max, r_max)), totals.new_empty((slots, block_r, block_r))
    with on_device(multipliers):
        lora_cayley_inverse_kernel[(slots,)](
            table.entries, listed.addresses, totals, multipliers, scratch,
            n,
            P=TL_DTYPE[free_a[0].dtype], SCALED=scales is not None, R_MAX=r_max,
            BLOCK_R=block_r, num_warps=WARPS[block_r], maxnreg=255,
        )  # fmt: skip
    factor_products(table, listed.addresses, multipliers, backward=False)
    return listed.results[:n], listed.results[n : 2 * n], listed.results[2 * n :]


def cayley_backward(
    free_a: Tensors, free_b: Tensors, scales: Tensors | None, inverses: Tensors, grad_a: Tensors, grad_b: Tensors
) -> tuple[Tensors, Tensors, Tensors | None]:
    """Computes the gradients of the parameters. Twin: ``reference.cayley.cayley_backward``.

    Args:
        free_a, free_b, scales: as in ``cayley``.
        inverses: W of every pair, float64 (r, r).
        grad_a, grad_b: the gradients of a and of the scaled b, any float dtype.

    Returns:
        The gradients of free_a and free_b, in their dtypes, and of scales, float32 (None without scales).
    """
    _check(free_a, free_b, scales)
    float32_grads = ([x.float() for x in xs] for xs in (grad_a, grad_b))
    da, db, dscales = _by_dtype(_backward, 3, free_a, free_b, scales, *float32_grads, inverses)
    return da, db, dscales if scales else None


def _backward(
    free_a: Tensors, free_b: Tensors, scales: Tensors | None, grad_a: Tensors, grad_b: Tensors, inverses: Tensors
) -> tuple[Tensors, Tensors, Tensors]:
    """Computes ``cayley_backward`` for parameters of one dtype. Without scales, their gradients have no elements."""
    table, dtype = _table(free_a, free_b), free_a[0].dtype
    n, r_max, block_r = len(free_a), table.r_max, _block(table.r_max)
    kinds: Kinds = [(x.shape, dtype) for x in free_a + free_b]
    kinds += [((len(x) if scales else 0,), torch.float32) for x in free_a]
    listed = allocate(kinds, grad_a + grad_b + inverses + (scales or []), table.device)
    totals = factor_sums(table, listed.addresses, backward=True)
    slots = min(n, SLOTS)
    multipliers, scratch = totals.new_empty((3 * n, r_max, r_max)), totals.new_empty((slots, 3, block_r, block_r))
    with on_device(multipliers):
        lora_cayley_backward_kernel[(slots,)](
            table.entries, listed.addresses, totals, multipliers, scratch,
            n,
            P=TL_DTYPE[dtype], SCALED=scales is not None, R_MAX=r_max,
            BLOCK_R=block_r, num_warps=WARPS[block_r], maxnreg=registers(block_r),
        )  # fmt: skip
    factor_products(table, listed.addresses, multipliers, backward=True)
    return listed.results[:n], listed.results[n : 2 * n], listed.results[2 * n :]


def _table(free_a: Tensors, free_b: Tensors) -> FactorTable:
    """Returns the table of all a, then all b, in which a pair's row is that of its a."""
    return find_table(free_a + free_b, [True] * len(free_a) + [False] * len(free_b))


def _block(r_max: int) -> int:
    """Returns the largest rank, padded to a power of two."""
    return max(16, triton.next_power_of_2(r_max))


def _by_dtype(compute: Callable, width: int, free_a: Tensors, *lists: Tensors | None) -> tuple[Tensors, ...]:
    """Returns compute's ``width`` result lists. It is called once for all positions whose free_a has one dtype, with
    None in place of a list that is None."""
    rows = [[x.contiguous() for x in xs] if xs else [None] * len(free_a) for xs in (free_a, *lists)]

    def compute_group(*groups: list) -> tuple[Tensors, ...]:
        return compute(*(None if group[0] is None else group for group in groups))

    results = map_groups(compute_group, lambda a, *others: a.dtype, *rows)
    return tuple([result[i] for result in results] for i in range(width))


def _check(free_a: Tensors, free_b: Tensors, scales: Tensors | None) -> None:
    for i, (a, b) in enumerate(zip(free_a, free_b, strict=True)):
        fits = a.ndim == b.ndim == 2 and 1 <= a.shape[0] <= min(a.shape[1], LARGEST_RANK)
        assert fits and b.shape[1] == a.shape[0] and a.dtype == b.dtype, (
            f"pair {i}: expected free_a (r, d_in) and free_b (d_out, r) of one dtype, r at most d_in and "
            f"{LARGEST_RANK}, got {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )
    for i, (a, scale) in enumerate(zip(free_a, scales or [], strict=bool(scales))):
        assert scale.shape == a.shape[:1] and scale.dtype == torch.float32 and scale.is_contiguous(), (
            f"scale {i}: expected contiguous float32 ({len(a)},), got {scale.dtype} {tuple(scale.shape)}"
        )
