"""ScaLoRA and ScaLoRA-I (arXiv 2510.23818): every ``interval`` steps, before AdamW, the columns of b and the rows of a
are scaled so that the next step is the nearest to that of the full gradient. The difference is merged into the weight:

    W += s b diag(1 − α∘β) a        b ← b diag(α)        a ← diag(β) a
    rows of (m_a, da) *= α, v_a *= α²        columns of (m_b, db) *= β, v_b *= β²

so that W + s b a does not change. Notation: the paper's A, B are b, aᵀ. The equations for α and β are in
ops/reference/scalora_solution.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from .. import checks
from ..batches.batch import Batch, Shapes, adamw_state
from ..batches.pairs import Pair, check_mergeable
from ..batches.partition import runs_on_triton
from ..kernels.grouping import group_by
from ..kernels.limits import LARGEST_SCALORA_RANK, ROUNDINGS, SOLVERS
from ..kernels.records import Grams, Scaled
from ..layers import merge_log
from .method import Method

NEGLIGIBLE = 1e-3  # κ's calibration leaves out smaller scales: relative to the largest of a pair, on a unit diagonal
FLOOR = 1e-3  # least scale without a limit, so that no column becomes 0 and stays 0
UNROUNDED = (torch.float32, torch.float64)  # dtypes of weights that need no compensation


@dataclass(frozen=True)
class ScaLoRA(Method):
    """Optimal scaling of the factors, with the difference merged into the weight.

    Args:
        kappa: κ = L lr s², where L is the smoothness of the loss. A larger κ gives smaller scales. None chooses κ at
            the first scaling step so that the geometric mean of β is 1.
        interval: steps from one scaling to the next. The first scaling is at the first step.
        solver: "nnls" (the optimum), "paper" (a scale for each column where valid, else one for all), "column",
            "scalar".
        rounding: rounding of 16-bit weights: "stochastic", "nearest" or "compensated" (16 more bits for each entry).
            "nearest" loses most of the merge in bfloat16.
        limit: scales are clipped to 1 / limit and limit. None clips them from below only, to 1e-3.
        seed: seed of the stochastic rounding.
        keep: the form in which ``lf.save_adapter`` can store the change of the weights: "weights" (whole and exact) or
            "terms" (the low-rank term of each merge, kept in the CPU's memory). It can store neither for a parameter of
            many experts (PEFT's ``target_parameters``). Save the merged model there.
    """

    changes_weights = True

    kappa: float | None = None
    interval: int = 10
    solver: str = "nnls"
    rounding: str = "stochastic"
    limit: float | None = 4.0
    seed: int = 0
    keep: str = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa is not None:
            checks.positive(self.kappa, "kappa")
        checks.count(self.interval, "interval")
        checks.choice(self.solver, "solver", SOLVERS)
        checks.choice(self.rounding, "rounding", ROUNDINGS)
        checks.choice(self.keep, "keep", merge_log.KEEP)
        if self.limit is not None and checks.positive(self.limit, "limit") <= 1:
            raise checks.ArgumentError("limit", "a number above 1, or None", checks.shown(self.limit))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise checks.ArgumentError("seed", "an integer of at least 0", checks.shown(self.seed))

    def check(self, pairs: list[Pair]) -> None:
        check_mergeable(pairs)
        for pair in filter(runs_on_triton, pairs):
            if pair.rank > LARGEST_SCALORA_RANK:
                expected = f"a rank of at most {LARGEST_SCALORA_RANK} for ScaLoRA on the Triton backend"
                raise checks.ArgumentError(f"{pair.name}.lora_A", expected, pair.rank)
            if not pair.mergeable_weight.is_contiguous():
                expected = "a contiguous weight, for ScaLoRA's merges on the Triton backend"
                raise checks.ArgumentError(f"{pair.name}.weight", expected, f"strides {pair.mergeable_weight.stride()}")

    def layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        state_a, state_b = adamw_state(pair)
        weight = pair.mergeable_weight
        if self.rounding == "compensated" and weight.dtype not in UNROUNDED:
            state_b["merge_residual"] = (weight.shape, weight.dtype)
        return state_a, state_b

    def before_all(self, batches: list[Batch], memory: dict) -> None:
        due = {batch: batch.due(self.interval, phase=1) for batch in batches}
        scaled = [batch for batch in batches if any(due[batch])]
        if not scaled:
            return
        groups = _by_rank(scaled)
        solutions = [members[0].ops.scalora_solve(*grams, self.solver)[:2] for members, grams in groups]
        for i, ((members, _), (x, active)) in enumerate(zip(groups, solutions, strict=True)):
            if not all(flag for batch in members for flag in due[batch]):  # the other pairs keep their factors
                chosen = _concatenate([batch.rows(due[batch]) for batch in members])[:, None]
                solutions[i] = x, active & chosen
        kappa: float | Tensor | None = self.kappa
        if kappa is None:
            kappa = self._calibrate(solutions, [grams for _, grams in groups], memory)
        low, high = (FLOOR, None) if self.limit is None else (1 / self.limit, self.limit)
        for (members, _), (x, active) in zip(groups, solutions, strict=True):
            scaling = _concatenate([batch.per_pair("scaling", lambda pair: pair.scaling) for batch in members])
            self._apply(members, due, *members[0].ops.scales(x, active, kappa, scaling, low, high))

    def _calibrate(self, solutions: list[tuple[Tensor, Tensor]], grams: list[Grams], memory: dict) -> Tensor:
        """Returns κ from memory if it is above 0 there. Otherwise stores the κ that makes the geometric mean of β 1, or
        that of α where no β is above 0, as in layers with one output; when all gradients are 0, κ stays 0. The choice
        is made on the device, so that the host does not wait."""
        device = solutions[0][0].device
        counted = [_counted(*solution, gram) for solution, gram in zip(solutions, grams, strict=True)]
        calibrated = torch.zeros((), dtype=torch.float64, device=device)
        for half in (0, 1):  # α², then β², at κ = 1
            squares = _concatenate([x.chunk(2, -1)[half].flatten().to(device, torch.float64) for x, _ in solutions])
            chosen = _concatenate([flags.chunk(2, -1)[half].flatten().to(device) for flags in counted])
            # The squares are proportional to 1 / κ, so their geometric mean is the κ that makes it 1.
            logs = torch.where(chosen, squares, 1.0).log().sum() / chosen.sum()
            calibrated = torch.where(chosen.any(), logs.exp(), calibrated)
        kappa = memory["kappa"] = memory.get("kappa", torch.zeros((), dtype=torch.float64, device=device)).to(device)
        # In place, because a CUDA graph reads κ at this address at every replay.
        return kappa.copy_(torch.where(kappa > 0, kappa, calibrated))

    def _apply(
        self,
        members: list[Batch],
        due: dict[Batch, list[bool]],
        factor_scales: Tensor,
        gradient_scales: Tensor,
        residual_scale: Tensor,
    ) -> None:
        """Merges and scales the pairs that are due. The tensors concatenate the products of all members:
        ``residual_scale`` has L rows, the others 2L."""
        lengths = [batch.products for batch in members]

        def split(scales: Tensor) -> list[Tensor]:
            """Splits (2L, r) into one (2L, r) for each batch."""
            return [part.flatten(0, 1) for part in scales.unflatten(0, (2, -1)).split(lengths, 1)]

        parts = zip(members, split(factor_scales), split(gradient_scales), residual_scale.split(lengths), strict=True)
        for batch, batch_factor_scales, batch_gradient_scales, batch_residual_scale in parts:
            sizes = [pair.experts for pair in batch.pairs]
            pair_scales = (x.split(sizes) for x in (batch_residual_scale, *batch_factor_scales.chunk(2)))
            for pair, *rows in compress(zip(batch.pairs, *pair_scales, strict=True), due[batch]):
                scale, alpha, beta = rows
                if self.keep == "weights" or pair.experts > 1:  # adapter files have no place for terms of experts
                    merge_log.record(pair.layer, pair.a, pair.b, scale)
                else:
                    scaled = Scaled(pair.scaling, alpha[0], beta[0])
                    merge_log.record(pair.layer, pair.a, pair.b, scale[0], self.keep, scaled)
            batch.merge(batch_residual_scale, batch_factor_scales, due[batch], self.rounding, self.seed)
            batch.scale(batch_factor_scales, batch_gradient_scales)


def _counted(x: Tensor, active: Tensor, grams: Grams) -> Tensor:
    """Returns which entries of a solution (L, 2r) count in the calibration of κ. Rounding leaves small entries where
    the optimum is 0. They are small in the system that is scaled to a unit diagonal; entries themselves differ by the
    factors' sizes. A pair that is not finite has none."""
    ka, kb, kp, kq = (gram.diagonal(dim1=-2, dim2=-1).double() for gram in grams[:4])
    scaled = x * torch.cat([kb * kp, kq * ka], -1).sqrt()
    return active & (scaled > NEGLIGIBLE * scaled.amax(-1, keepdim=True))


def _by_rank(batches: list[Batch]) -> list[tuple[list[Batch], Grams]]:
    """Groups batches by rank, dtype and device, and concatenates their Grams, so that each group is solved in one
    call."""
    entries = [(batch, batch.grams(gradients=True)) for batch in batches]
    groups = group_by(entries, lambda entry: (entry[1].ka.shape[-1], entry[1].ka.dtype, entry[1].ka.device))
    return [
        ([batch for batch, _ in group], Grams(*map(_concatenate, zip(*(grams for _, grams in group), strict=True))))
        for group in groups.values()
    ]


def _concatenate(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """torch.cat, without its copy where there is one tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
