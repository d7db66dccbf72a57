"""The kernels of the adapter step, for all pairs at once: the Triton module of the op family ``pairs``.

``lora_fast.ops.reference.pairs`` is its torch twin, with the same functions and arguments; the twin's docstrings
specify both. ``lora_fast.backend.ops("pairs", tensor)`` returns one of the two modules. The functions here convert
arguments to what the launchers take: float32 matrices and contiguous tensors.

    gram            pass 1: r×r Grams of every pair        regularizers    the algebra of iLoRA and of ScaleReg
    scalora_system  ScaLoRA's equations                    scalora_scales  ScaLoRA's scales
    inverse_mean    LoRA-Muon's matrices                   momentum        LoRA-Muon's momentum and move
    adamw           pass 2: changes to gradients, AdamW    transform       factors times r×r matrices
    add_low_rank    merges into the weights
"""

import torch
from torch import Tensor

from ..linalg import inverse, spd
from ..records import Grams, StepWork
from . import adamw, add_low_rank, gram, transform
from .inverse_mean import muon
from .regularizers import imbalance, scale_reg
from .scalora_scales import scales
from .scalora_system import scalora_solve

__all__ = [
    "adapter_step_",
    "add_low_rank_",
    "factor_grams",
    "imbalance",
    "muon",
    "pair_grams",
    "scale_reg",
    "scales",
    "scalora_solve",
    "small_inverse",
    "spd_inverse",
    "spd_solve",
    "transformed",
]


def spd_solve(matrices: Tensor, rhs: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    return spd.spd_solve(matrices.float(), rhs.float(), damping)


def spd_inverse(matrices: Tensor, damping: float) -> Tensor:
    return spd.spd_inverse(matrices.float(), damping)


def small_inverse(matrices: Tensor) -> Tensor:
    return inverse.small_inverse(matrices.float())


def factor_grams(factors: list[Tensor], is_a: list[bool]) -> Tensor:
    return gram.factor_grams([x.contiguous() for x in factors], is_a)


def pair_grams(
    a: list[Tensor], b: list[Tensor], da: list[Tensor] | None = None, db: list[Tensor] | None = None
) -> Grams:
    a, b = ([x.contiguous() for x in tensors] for tensors in (a, b))
    if da is None or db is None:
        return gram.gram(a, b)
    da, db = ([x.contiguous() for x in tensors] for tensors in (da, db))
    return gram.gram(a, b, da, db, Grams._fields)


def transformed(factors: list[Tensor], is_a: bool, matrices: Tensor) -> list[Tensor]:
    results = [x.clone(memory_format=torch.contiguous_format) for x in factors]
    transform.transform_(results, [is_a] * len(results), matrices.contiguous())
    return results


def add_low_rank_(
    weights: list[Tensor], a: list[Tensor], b: list[Tensor], scale: Tensor, rounding: str = "nearest", seed: int = 0
) -> None:
    a, b = ([x.contiguous() for x in tensors] for tensors in (a, b))
    add_low_rank.add_low_rank_(weights, a, b, scale.contiguous(), rounding, seed)


def adapter_step_(
    factors: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    is_a: list[bool],
    hyper: Tensor,
    steps: Tensor,
    work: StepWork,
) -> Tensor | None:
    additive, matrices, scale_p, scale_g = (x if x is None else x.contiguous() for x in work[:4])
    work = StepWork(additive, matrices, scale_p, scale_g, work.gram, work.keys)
    return adamw.step_(factors, is_a, hyper.contiguous(), steps, work)
