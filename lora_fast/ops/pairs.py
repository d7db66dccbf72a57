"""The adapter step's operations: the one place that decides who computes them, Triton or plain torch.

First those on r×r matrices, (L, r, r); then those on lists of factors, of one rank for Triton, of one shape for plain
torch (``adapter_step_`` takes any).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from .reference import pairs as reference
from .reference import scalora_solution
from .reference.pairs import (
    GAUGES,
    Grams,
    adamw,
    grams,
    hyperbalance,
    refactor,
    rite_factor,
    rite_update,
    wide,
    with_strides_of,
)
from .reference.scalora_solution import ROUNDINGS, SOLVERS

__all__ = [
    "GAUGES",
    "ROUNDINGS",
    "SOLVERS",
    "Grams",
    "adamw",
    "adapter_step_",
    "add_low_rank_",
    "factor_grams",
    "grams",
    "hyperbalance",
    "imbalance",
    "largest_scalora_rank",
    "muon",
    "pair_grams",
    "refactor",
    "rite_factor",
    "rite_update",
    "scale_reg",
    "scales",
    "scalora_solve",
    "small_inverse",
    "spd_solve",
    "transformed",
    "wide",
    "with_strides_of",
]


def imbalance(ka: Tensor, kb: Tensor, rho: Tensor, lr_a: float | Tensor, lr_b: float | Tensor, lam: float) -> Tensor:
    """iLoRA's middle: see ``reference.pairs.imbalance``."""
    if backend.uses_triton(ka):
        from ..kernels.pairs import regularizers

        return regularizers.imbalance(ka, kb, rho, lr_a, lr_b, lam)
    return reference.imbalance(ka, kb, rho, lr_a, lr_b, lam)


def scale_reg(ka: Tensor, kb: Tensor, entries_a: Tensor, entries_b: Tensor, lam: float, eps: float) -> Tensor:
    """Scale regularization's middle: see ``reference.pairs.scale_reg``."""
    if backend.uses_triton(ka):
        from ..kernels.pairs import regularizers

        return regularizers.scale_reg(ka, kb, entries_a, entries_b, lam, eps)
    return reference.scale_reg(ka, kb, entries_a, entries_b, lam, eps)


def muon(grams: Grams, lr_a: float | Tensor, lr_b: float | Tensor, damping: float) -> Tensor:
    """LoRA-Muon's middle, from the Grams of the factors and of their momenta: see ``reference.pairs.muon``."""
    if backend.uses_triton(grams.ka):
        from ..kernels.pairs import muon as roots

        return roots.muon(*grams[:4], lr_a, lr_b, damping)
    return reference.muon(*grams[:4], lr_a, lr_b, damping)


def scalora_solve(grams: Grams, solver: str) -> tuple[Tensor, Tensor, Tensor]:
    """ScaLoRA's Hadamard system: see ``reference.scalora_solution.scalora_solve``."""
    if backend.uses_triton(grams.ka):
        from ..kernels.pairs import scalora_system

        return scalora_system.scalora_solve(*grams, solver)
    return scalora_solution.scalora_solve(*grams, solver)


def largest_scalora_rank() -> int:
    """Of ``scalora_solve`` on the Triton backend; the twin takes any."""
    from ..kernels.pairs import scalora_system

    return scalora_system.LARGEST


def scales(
    x: Tensor, active: Tensor, kappa: float | Tensor, scaling: Tensor, low: float, high: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """ScaLoRA's scales: see ``reference.scalora_solution.scales``."""
    if backend.uses_triton(x):
        from ..kernels.pairs import scalora_scales

        return scalora_scales.scales(x, active, kappa, scaling, low, high)
    return scalora_solution.scales(x, active, kappa, scaling, low, high)


def spd_solve(matrices: Tensor, rhs: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """See ``reference.pairs.spd_solve``."""
    if backend.uses_triton(matrices):
        from ..kernels.linalg import spd

        return spd.spd_solve(matrices.float(), rhs.float(), damping)
    return reference.spd_solve(matrices, rhs, damping)


def small_inverse(matrices: Tensor) -> Tensor:
    """See ``reference.pairs.small_inverse``."""
    if backend.uses_triton(matrices):
        from ..kernels.linalg import inverse

        return inverse.small_inverse(matrices.float())
    return reference.small_inverse(matrices)


def factor_grams(factors: list[Tensor], is_a: list[bool]) -> Tensor:
    """x xᵀ of an a, xᵀx of a b: (n, r, r)."""
    if backend.uses_triton(factors[0]):
        from ..kernels.pairs import gram

        return gram.factor_grams([x.contiguous() for x in factors], is_a)
    x = wide(torch.stack(factors))
    return x @ x.mT if is_a[0] else x.mT @ x


def pair_grams(a: list[Tensor], b: list[Tensor], da: list[Tensor] | None = None, db: list | None = None) -> Grams:
    """The Grams of a list of pairs, with gradients all five."""
    lists = [a, b] if da is None else [a, b, da, db]
    if backend.uses_triton(a[0]):
        from ..kernels.pairs import gram

        lists = [[x.contiguous() for x in members] for members in lists]
        return Grams(*gram.gram(*lists, wanted=Grams._fields[: 2 if da is None else 5]))
    return grams(*(torch.stack(members) for members in lists))


def transformed(factors: list[Tensor], is_a: bool, matrices: Tensor) -> list[Tensor]:
    """M x of each a, x M of each b, rounded to its dtype."""
    if backend.uses_triton(factors[0]):
        from ..kernels.pairs import transform

        results = [x.clone(memory_format=torch.contiguous_format) for x in factors]
        transform.transform_(results, [is_a] * len(results), matrices.contiguous())
        return results
    x = torch.stack(factors)
    return list((matrices @ wide(x) if is_a else wide(x) @ matrices).to(x.dtype))


def add_low_rank_(weights: list, a: list, b: list, scale: Tensor, rounding: str, seed: int) -> None:
    """weights[i] += b[i] diag(scale[i]) a[i]: see ``reference.scalora_solution.add_low_rank_``."""
    if backend.uses_triton(weights[0]):
        from ..kernels.pairs import add_low_rank

        factors = ([x.contiguous() for x in members] for members in (a, b))
        add_low_rank.add_low_rank_(weights, *factors, scale.contiguous(), rounding, seed)
        return
    for weight, of_a, of_b, of_scale in zip(weights, a, b, scale, strict=True):
        scalora_solution.add_low_rank_(weight, of_a, of_b, of_scale, rounding, seed)


def adapter_step_(factors: list, is_a: list[bool], hyper: Tensor, steps: Tensor, work) -> Tensor | None:
    """See ``functional.adapter_step_``."""
    if factors and backend.uses_triton(factors[0][0]):
        from ..kernels.pairs import adamw as kernel

        return kernel.step_(factors, is_a, hyper, steps, kernel.StepWork(*work))
    return reference.adapter_step_(factors, is_a, hyper, steps, *work)
