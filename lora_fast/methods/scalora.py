"""ScaLoRA and ScaLoRA-I (arXiv 2510.23818): every ``interval`` steps, before AdamW, the columns of b and the rows of a
are scaled so that the coming step is the nearest to the full gradient's; the difference goes into the frozen weight:

    W += s b diag(1 − α∘β) a        b ← b diag(α)        a ← diag(β) a
    rows of (m_a, da) *= α, v_a *= α²        columns of (m_b, db) *= β, v_b *= β²

so that W + s b a stays as it was. Notation: the paper's A, B are b, aᵀ. The equations for
α and β are in ops/reference/scalora_solution.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..batches.batch import Batch, Shapes, adamw_state
from ..batches.pairs import Pair, check_mergeable
from ..batches.partition import runs_on_triton
from ..kernels.grouping import group_by
from ..kernels.limits import LARGEST_SCALORA_RANK, ROUNDINGS, SOLVERS
from ..kernels.records import Grams
from ..layers import merge_log
from .method import Method

FLOOR = 1e-3  # of a scale: no column dies
WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class ScaLoRA(Method):
    """Optimal scaling of the factors, with the rest merged into the weight.

    Args:
        kappa: κ = L lr s²: larger, smaller scales. None: chosen at the first scaling step so that the geometric mean of
            β is 1.
        interval: steps from one scaling to the next; the first is at the first step.
        solver: "nnls" (the optimum), "paper" (a scale per column, else one for all), "column", "scalar".
        rounding: of 16-bit weights, "stochastic", "nearest" or "compensated" (16 bits more per entry). "nearest" loses
            most of the merge in bfloat16.
        limit: scales stay between 1 / limit and limit; None for no limit but that no column dies.
        seed: of the stochastic rounding.
        keep: what of the weights' change ``lf.save_adapter`` can store: "weights" (they are saved whole, to the bit) or
            "terms" (each merge's low-rank term, kept in the CPU's memory). It can store neither of a parameter of many
            experts (PEFT's ``target_parameters``): save the merged model.
    """

    kappa: float | None = None
    interval: int = 10
    solver: str = "nnls"
    rounding: str = "stochastic"
    limit: float | None = 4.0
    seed: int = 0
    keep: str = "weights"

    def __post_init__(self) -> None:
        if self.kappa is not None:
            checks.positive(self.kappa, "kappa")
        checks.count(self.interval, "interval")
        checks.choice(self.solver, "solver", SOLVERS)
        checks.choice(self.rounding, "rounding", ROUNDINGS)
        checks.choice(self.keep, "keep", merge_log.KEEP)
        if self.limit is not None and checks.positive(self.limit, "limit") <= 1:
            raise checks.ArgumentError("limit", "a number above 1, or None", repr(self.limit))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise checks.ArgumentError("seed", "an integer of at least 0", repr(self.seed))

    def check(self, pairs: list[Pair]) -> None:
        check_mergeable(pairs)
        if not runs_on_triton(pairs):
            return
        for pair in pairs:
            if pair.rank > LARGEST_SCALORA_RANK:
                expected = f"a rank of at most {LARGEST_SCALORA_RANK} for ScaLoRA on the Triton backend"
                raise checks.ArgumentError(f"{pair.name}.lora_A", expected, pair.rank)
            if not pair.weight.is_contiguous():
                expected = "a contiguous weight, for ScaLoRA's merges on the Triton backend"
                raise checks.ArgumentError(f"{pair.name}.weight", expected, f"strides {pair.weight.stride()}")

    def layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        state_a, state_b = adamw_state(pair)
        if self.rounding == "compensated" and pair.weight.dtype not in WIDE:
            state_b["merge_residual"] = (pair.weight.shape, pair.weight.dtype)
        return state_a, state_b

    def before_all(self, batches: list[Batch], memory: dict) -> None:
        due = [batch for batch in batches if batch.due(self.interval, phase=1)]
        if not due:
            return
        together = _by_rank(due)
        solved = [members[0].ops.scalora_solve(*grams, self.solver)[:2] for members, grams in together]
        kappa = self.kappa if self.kappa is not None else self._calibrated(solved, memory)
        low, high = (FLOOR, None) if self.limit is None else (1 / self.limit, self.limit)
        for (members, _), (x, active) in zip(together, solved, strict=True):
            scaling = _joined([batch.per_pair("scaling", lambda pair: pair.scaling) for batch in members])
            self._apply(members, *members[0].ops.scales(x, active, kappa, scaling, low, high))

    def _calibrated(self, solved: list[tuple[Tensor, Tensor]], memory: dict) -> Tensor:
        """κ from memory, or, while that holds none (0), the one that makes the geometric mean of β 1. Decided on the
        device: gradients of 0 leave it at 0."""
        device = solved[0][0].device
        beta = _joined([x.chunk(2, -1)[1].flatten().to(device, torch.float64) for x, _ in solved])
        active = _joined([active.chunk(2, -1)[1].flatten().to(device) for _, active in solved]) & (beta > 0)
        logs = torch.where(active, beta, 1.0).log().sum() / active.sum()
        now = torch.where(active.any(), logs.exp(), 0.0)
        kappa = memory["kappa"] = memory.get("kappa", torch.zeros((), dtype=torch.float64)).to(device)
        return kappa.copy_(torch.where(kappa > 0, kappa, now))  # in place: a CUDA graph reads it at this address again

    def _apply(self, members: list[Batch], factors: Tensor, gradients: Tensor, rest: Tensor) -> None:
        """Merge and scale; the tensors hold the members' products one after the other (twice in the first two)."""
        lengths = [batch.products for batch in members]
        split = lambda x: [part.flatten(0, 1) for part in x.unflatten(0, (2, -1)).split(lengths, 1)]
        parts = zip(members, split(factors), split(gradients), rest.split(lengths), strict=True)
        for batch, of_factors, of_gradients, of_merge in parts:
            of_pairs = of_merge.split([pair.experts for pair in batch.pairs])
            for pair, of_pair in zip(batch.pairs, of_pairs, strict=True):
                keep = self.keep if pair.experts == 1 else "weights"  # an adapter's files have no place for experts'
                merge_log.record(pair.layer, pair.a, pair.b, of_pair, keep)
            batch.merge(of_merge, self.rounding, self.seed)
            batch.scale(of_factors, of_gradients)


def _by_rank(batches: list[Batch]) -> list[tuple[list[Batch], Grams]]:
    """Batches of one rank, dtype and device, and all their Grams in one tensor each: they are solved together."""
    listed = [(batch, batch.grams(gradients=True)) for batch in batches]
    groups = group_by(listed, lambda entry: (entry[1].ka.shape[-1], entry[1].ka.dtype, entry[1].ka.device))
    joined = lambda group: Grams(*map(_joined, zip(*(grams for _, grams in group), strict=True)))
    return [([batch for batch, _ in group], joined(group)) for group in groups.values()]


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
