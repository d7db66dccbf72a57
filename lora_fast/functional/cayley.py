"""The public function of NB-LoRA's Cayley transform: checks the arguments, then runs the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..kernels.limits import LARGEST_RANK
from ..ops.cayley import Free, factors


def cayley(
    free_a: Tensor | Sequence[Tensor], free_b: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """The Cayley transform of NB-LoRA ("Norm-Bounded Low-Rank Adaptation") of one pair or of lists of pairs with any
    shapes and ranks. It is differentiable; one autograd node serves all pairs and keeps only an (r, r) matrix of each
    besides its arguments.

    Args:
        free_a: (r, d_in), floating, r from 1 to 256 and at most d_in.
        free_b: (d_out, r), in free_a's dtype.

    Returns:
        a (r, d_in) and b (d_out, r) with a aᵀ + bᵀb = I, or lists of them, in float32 (float64 for float64 pairs). A
        NaN in a pair makes that pair NaN.

    Raises:
        ArgumentError: shapes or dtypes that do not fit.
        BackendError: the Triton backend is chosen and cannot run here.
    """
    single = isinstance(free_a, Tensor)
    named: tuple = (("free_a", free_a), ("free_b", free_b))
    lists: Any = ([free_a], [free_b]) if single else [checks.sequence(x, name) for name, x in named]
    _check(*lists)
    a, b = factors(Free(*map(list, lists)))
    return (a[0], b[0]) if single else (a, b)


def _check(free_a: Sequence[Tensor], free_b: Sequence[Tensor]) -> None:
    if len(free_a) != len(free_b) or not free_a:
        raise checks.ArgumentError("free_b", f"{len(free_a) or 'at least one'} matrices, as free_a", len(free_b))
    device = getattr(free_a[0], "device", None)
    for i, (a, b) in enumerate(zip(free_a, free_b, strict=True)):
        for name, x in (("free_a", a), ("free_b", b)):
            checks.tensor(x, f"{name}[{i}]")
            if x.dim() != 2 or x.dtype not in checks.FLOATS or x.device != device or x.layout is not torch.strided:
                got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
                raise checks.ArgumentError(f"{name}[{i}]", f"a floating-point matrix on {device}", got)
        rank, d_in = a.shape
        if not 1 <= rank <= min(d_in, LARGEST_RANK):
            expected = f"shape (r, d_in) with r from 1 to {LARGEST_RANK} and at most d_in"
            raise checks.ArgumentError(f"free_a[{i}]", expected, tuple(a.shape))
        if b.shape[1] != rank or b.dtype != a.dtype:
            expected = f"{a.dtype} of shape (d_out, {rank}) to fit free_a"
            raise checks.ArgumentError(f"free_b[{i}]", expected, f"{b.dtype} {tuple(b.shape)}")
