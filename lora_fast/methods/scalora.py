"""ScaLoRA and ScaLoRA-I (arXiv 2510.23818): every ``interval`` steps, before AdamW, the columns of b and the rows of a
are scaled so that the coming step is the nearest to the full gradient's; the difference goes into the frozen weight:

    W += s b diag(1 − α∘β) a        b ← b diag(α)        a ← diag(β) a
    rows of (m_a, da) *= α, v_a *= α²        columns of (m_b, db) *= β, v_b *= β²

so that W + s b a stays as it was. Notation: the paper's A, B are b, aᵀ. The equations for α, β: reference_scalora.py.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, step
from ..pairs import Pair, check_mergeable
from ..stacks import Shapes, Stack, adamw_state

FLOOR = 1e-3  # of a scale: no column dies
WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class ScaLoRA:
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
    """

    kappa: float | None = None
    interval: int = 10
    solver: str = "nnls"
    rounding: str = "stochastic"
    limit: float | None = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kappa is not None:
            checks.positive(self.kappa, "kappa")
        checks.count(self.interval, "interval")
        checks.choice(self.solver, "solver", step.SOLVERS)
        checks.choice(self.rounding, "rounding", step.ROUNDINGS)
        if self.limit is not None and checks.positive(self.limit, "limit") <= 1:
            raise checks.ArgumentError("limit", "a number above 1, or None", repr(self.limit))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise checks.ArgumentError("seed", "an integer of at least 0", repr(self.seed))

    def check(self, pairs: list[Pair]) -> None:
        check_mergeable(pairs)

    def layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        state_a, state_b = adamw_state(pair)
        if self.rounding == "compensated" and pair.weight.dtype not in WIDE:
            state_b["merge_residual"] = (pair.weight.shape, pair.weight.dtype)
        return state_a, state_b

    def before(self, stacks: list[Stack], memory: dict) -> None:
        due = [stack for stack in stacks if (stack.count - 1) % self.interval == 0]
        if not due:
            return
        solved = self._solve(due)
        kappa = self.kappa if self.kappa is not None else self._calibrated(solved, memory)
        low, high = (FLOOR, None) if self.limit is None else (1 / self.limit, self.limit)
        for stack, (x, alive) in zip(due, solved, strict=True):
            at = kappa.to(x.device, x.dtype) if isinstance(kappa, Tensor) else kappa
            scale = torch.where(alive & (at > 0), (x / at).sqrt().clamp(low, high), 1.0)
            self._apply(stack, *scale.chunk(2, -1))

    def _solve(self, stacks: list[Stack]) -> list[tuple[Tensor, Tensor]]:
        """x (L, 2r) for κ = 1 and which of its entries have a say, for each stack: solved together for each rank."""
        grams = [step.grams(stack.a.value, stack.b.value, *stack.gradients()) for stack in stacks]
        together: dict[tuple, list[int]] = {}
        for i, gram in enumerate(grams):
            together.setdefault((gram.ka.shape[-1], gram.ka.dtype, gram.ka.device), []).append(i)
        solved: dict[int, tuple[Tensor, Tensor]] = {}
        for members in together.values():
            joined = (torch.cat(parts) for parts in zip(*(grams[i] for i in members), strict=True))
            x, alive, _ = step.scalora_solve(*joined, self.solver)
            lengths = [len(grams[i].ka) for i in members]
            solved |= dict(zip(members, zip(x.split(lengths), alive.split(lengths), strict=True), strict=True))
        return [solved[i] for i in range(len(stacks))]

    def _calibrated(self, solved: list[tuple[Tensor, Tensor]], memory: dict) -> Tensor:
        """κ from memory, or, while that holds none (0), the one that makes the geometric mean of β 1. Decided on the
        device: gradients of 0 leave it at 0."""
        device = solved[0][0].device
        beta = torch.cat([x.chunk(2, -1)[1].flatten().to(device, torch.float64) for x, _ in solved])
        alive = torch.cat([alive.chunk(2, -1)[1].flatten().to(device) for _, alive in solved]) & (beta > 0)
        logs = torch.where(alive, beta, 1.0).log().sum() / alive.sum()
        now = torch.where(alive.any(), logs.exp(), 0.0)
        before = memory.get("kappa", torch.zeros((), dtype=torch.float64)).to(device)
        memory["kappa"] = torch.where(before > 0, before, now)
        return memory["kappa"]

    def _apply(self, stack: Stack, alpha: Tensor, beta: Tensor) -> None:
        a, b = stack.a, stack.b
        for i, pair in enumerate(stack.pairs):
            seed = zlib.crc32(f"{self.seed} {stack.count} {pair.name}".encode())  # torch's CPU generator takes 32 bits
            residual = b.state["merge_residual"][i] if "merge_residual" in b.state else None
            rest = pair.scaling * (1 - alpha[i] * beta[i])
            step.merge_(pair.weight.data, a.value[i], b.value[i], rest, self.rounding, seed, residual)
        rows, columns = alpha[:, :, None].to(a.value.dtype), beta[:, None, :].to(a.value.dtype)
        a.value *= beta[:, :, None].to(a.value.dtype)
        b.value *= alpha[:, None, :].to(a.value.dtype)
        a.grad, b.grad = a.grad * rows, b.grad * columns
        a.state["exp_avg"] *= rows
        a.state["exp_avg_sq"] *= rows.square()
        b.state["exp_avg"] *= columns
        b.state["exp_avg_sq"] *= columns.square()
