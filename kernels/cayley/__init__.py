"""The Cayley transform of NB-LoRA and its backward, for all pairs at once ("Norm-Bounded Low-Rank Adaptation").

Math      With ã = [a1 | a2], a1 (r, r), and D = diag(scale), I where there is none:
              M = I + a1ᵀ − a1 + a2 a2ᵀ + b̃ᵀb̃    W = M⁻¹    a = [2 Wᵀ − I | −2 Wᵀ a2]    b = −2 b̃ W D
          from ga, gb, with C = b̃ᵀgb:
              T = ga1ᵀ − a2 ga2ᵀ − C D    S = 2 Wᵀ T Wᵀ    R = S + Sᵀ    d scale = −2 · column sums of W∘C
              d a1 = S − Sᵀ    d a2 = −R a2 − 2 W ga2    d b̃ = −b̃ R − 2 gb D Wᵀ
          Seen as d rows of r columns (pointer_table.py), every tall product is x A, or x A + y B, and every sum xᵀy.
Grid      three launches each way, however many pairs: (1) xᵀy of all factors, sums.py; (2) the r×r algebra and
          what belongs to a1, algebra.py; (3) the tall products, products.py. One more set for each dtype of
          parameters. Parameters have their addresses in a table (pointer_table.py), so in a CUDA graph they stay where
          they are; all else may move (addresses.py).
Shapes    ã (r, d_in), b̃ (d_out, r), one float dtype a pair → a, b, W float32; gradients in ã's dtype. Ranks from 1 to
          256, mixed; r×r scratch is padded to the largest. Arithmetic is float32, but M and I − M W are float64, sums
          and products: a large skew part, or rows that are nearly alike, would cost M its smallest eigenvalues, and
          a aᵀ + bᵀb = I with them.
Backward  keeps W only. Results of one call are slices of one buffer.
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
from ..pointer_table import TL_DTYPE, Table, whole
from .addresses import place
from .algebra import WARPS, lora_cayley_backward_kernel, lora_cayley_inverse_kernel
from .products import outer
from .sums import inner

__all__ = ["cayley", "cayley_backward"]

Tensors = list[torch.Tensor]


def cayley(free_a: Tensors, free_b: Tensors, scales: Tensors | None = None) -> tuple[Tensors, Tensors, Tensors]:
    """a (r, d_in), b · diag(scale) (d_out, r) and W (r, r) of every pair, float32, from free_a and free_b in one float
    dtype a pair; scales float32 (r,). Twin: ``reference.cayley.cayley``."""
    _check(free_a, free_b, scales)
    return _by_dtype(_forward, 3, free_a, free_b, scales)


def _forward(free_a: Tensors, free_b: Tensors, scales: Tensors | None) -> tuple[Tensors, Tensors, Tensors]:
    """The same for parameters of one dtype."""
    table = _table(free_a, free_b)
    n, r_max, block_r, device = len(free_a), table.r_max, _block(table.r_max), table.device
    shapes = [x.shape for x in free_a + free_b] + [(len(x), len(x)) for x in free_a]
    moving = place([(shape, torch.float32) for shape in shapes], scales or [], device)
    totals = inner(table, moving, backward=False)
    slots = min(n, SLOTS)
    matrices = torch.empty((slots, block_r, block_r), dtype=torch.float64, device=device)
    times, scratch = (
        torch.empty(shape, dtype=torch.float32, device=device)
        for shape in ((2 * n, r_max, r_max), (slots, 2, block_r, block_r))
    )
    with on_device(times):
        lora_cayley_inverse_kernel[(slots,)](
            table.entries, moving.addresses, totals, times, matrices, scratch, n, P=TL_DTYPE[free_a[0].dtype],
            SCALED=scales is not None, R_MAX=r_max, BLOCK_R=block_r, num_warps=WARPS[block_r],
            maxnreg=registers(block_r),
        )  # fmt: skip
    outer(table, moving, times, backward=False)
    return moving.made[:n], moving.made[n : 2 * n], moving.made[2 * n :]


def cayley_backward(
    free_a: Tensors, free_b: Tensors, scales: Tensors | None, inverses: Tensors, grad_a: Tensors, grad_b: Tensors
) -> tuple[Tensors, Tensors, Tensors | None]:
    """The gradients of free_a, free_b, in their dtypes, and of scales (None without), from those of a and of the scaled
    b, any float dtype. Twin: ``reference.cayley.cayley_backward``."""
    _check(free_a, free_b, scales)
    grads = ([x.float() for x in xs] for xs in (grad_a, grad_b, inverses))
    da, db, dscales = _by_dtype(_backward, 3, free_a, free_b, scales, *grads)
    return da, db, dscales if scales else None


def _backward(
    free_a: Tensors, free_b: Tensors, scales: Tensors | None, grad_a: Tensors, grad_b: Tensors, inverses: Tensors
) -> tuple[Tensors, Tensors, Tensors]:
    """The same for parameters of one dtype; gradients of scales that are not there have no elements."""
    table, dtype = _table(free_a, free_b), free_a[0].dtype
    n, r_max, block_r = len(free_a), table.r_max, _block(table.r_max)
    made = [(x.shape, dtype) for x in free_a + free_b] + [((len(x) if scales else 0,), torch.float32) for x in free_a]
    moving = place(made, grad_a + grad_b + inverses + (scales or []), table.device)
    totals = inner(table, moving, backward=True)
    slots = min(n, SLOTS)
    times, scratch = totals.new_empty((3 * n, r_max, r_max)), totals.new_empty((slots, 3, block_r, block_r))
    with on_device(times):
        lora_cayley_backward_kernel[(slots,)](
            table.entries, moving.addresses, totals, times, scratch, n, P=TL_DTYPE[dtype], SCALED=scales is not None,
            R_MAX=r_max, BLOCK_R=block_r, num_warps=WARPS[block_r], maxnreg=registers(block_r),
        )  # fmt: skip
    outer(table, moving, times, backward=True)
    return moving.made[:n], moving.made[n : 2 * n], moving.made[2 * n :]


def _table(free_a: Tensors, free_b: Tensors) -> Table:
    """a's first: the kernels take a pair's row for that of its a."""
    return whole(free_a + free_b, [True] * len(free_a) + [False] * len(free_b))


def _block(r_max: int) -> int:
    """The largest rank, padded."""
    return max(16, triton.next_power_of_2(r_max))


def _by_dtype(compute: Callable, width: int, free_a: Tensors, *lists: Tensors | None) -> tuple[Tensors, ...]:
    """compute's ``width`` result lists, called once for all positions whose free_a has one dtype."""
    given = [[x.contiguous() for x in xs] if xs else [None] * len(free_a) for xs in (free_a, *lists)]
    whole_or_none = lambda members: None if members[0] is None else members
    results = map_groups(lambda *groups: compute(*map(whole_or_none, groups)), lambda a, *others: a.dtype, *given)
    return tuple([result[i] for result in results] for i in range(width))


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
