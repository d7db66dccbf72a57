"""ScaLoRA Fig. 1 (arXiv 2510.23818): min over W of ½‖Y − W X‖², W 64×64, X and Y 64×100 and Gaussian, by plain gradient
descent. Full fine-tuning reaches the optimum. LoRA, W = b a of rank 8, stops at the best matrix of that rank, and
ScaLoRA, which merges into W, continues below it.

Notation: G the gradient of W, da = bᵀG, db = G aᵀ, η the learning rate, L = σ₁(X)² the smoothness of the loss; κ = L η.
The loss minus the optimum is reported.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from .... import functional
from .result import Result, Row, compared, draw, number, unmatched
from .session import Session, one_thread

SIZE, SAMPLES, RANK, STEPS, SEED = 64, 100, 8, 200, 0
RATES = {"LoRA": (2e-4, 1e-2), 1: (8e-3, 2.1e-2), 3: (5e-3, 1.3e-2), 10: (4e-3, 8e-3)}  # lowest, highest
INTERVALS = (1, 3, 10)
CAUTION = (1.0, 2.0)  # κ / (L η): with longer intervals, scales for a smoothness above L are better
MARKS = (10, 50, 100, 200)
FLOOR = 1e-3  # least scale, so that no column becomes zero for good
HOPELESS = 1e3  # a gap this many times the first one counts as diverged
GIVEN_RATE = 1.8e-2
# From a transcription of the paper's equations in float64 on this problem, since the paper's figure prints no numbers.
EXPECTED = {
    "start": 2148,
    "floor": 1313,
    "full": (204, 15, 1.5, 0.026),
    "LoRA": 1314,
    1: (1331, 238, 56, 12),
    3: 24,
    10: 57,
    "rank": 63,
}


@dataclass(frozen=True)
class Problem:
    """A problem by ``xx`` = X Xᵀ and ``yx`` = Y Xᵀ, both (64, 64), and its solution ``best``."""

    xx: Tensor
    yx: Tensor
    best: Tensor

    @classmethod
    def random(cls, seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(SIZE, SAMPLES, generator=generator, dtype=torch.float64) for _ in range(2))
        xx, yx = x @ x.T, y @ x.T
        return cls(xx, yx, torch.linalg.solve(xx, yx.T).T)

    def gap(self, w: Tensor) -> Tensor:
        """Returns the loss minus the optimum, ½‖(W − W_best) X‖²: (…, 64, 64) → (…,)."""
        difference = w - self.best
        return 0.5 * ((difference @ self.xx) * difference).sum((-1, -2))

    def floor(self) -> float:
        """Returns the gap of the best W of rank 8: half the sum of W_best X's squared singular values after 8."""
        squared = torch.linalg.eigvalsh(self.best @ self.xx @ self.best.T).flip(0)
        return 0.5 * float(squared[RANK:].sum())


@dataclass(frozen=True)
class Descent:
    """The gaps (starts, steps + 1), infinite after a start diverged, and the rank of each start's accumulated W."""

    gaps: Tensor
    ranks: list[int]


def run(session: Session) -> Result:
    starts, rates = (3, 6) if session.quick else (8, 10)
    problem = Problem.random(SEED)
    smoothness = float(torch.linalg.eigvalsh(problem.xx)[-1])
    generator = torch.Generator().manual_seed(SEED + 1)
    a = torch.randn(starts, RANK, SIZE, generator=generator, dtype=torch.float64) / math.sqrt(SIZE)
    tried = {name: [(rate, 1.0) for rate in _rates(name, rates)] for name in RATES}
    for interval in INTERVALS:
        tried[interval] = [(rate, caution) for caution in CAUTION for rate, _ in tried[interval]]
    with one_thread(), session.progress("runs", sum(map(len, tried.values())) + 1) as done:
        curves = {"full": full(problem, 1 / smoothness)}
        ranks, chosen = {}, {}
        for name, settings in tried.items():
            runs = []
            for rate, caution in settings:
                interval = 0 if name == "LoRA" else name
                runs.append(descend(problem, a, rate, smoothness * caution * rate, interval))
                done()
            curves[name], ranks[name], chosen[name] = best(runs, settings)
        given = descend(problem, a, GIVEN_RATE, smoothness * GIVEN_RATE, 1)
        unstable = int(given.gaps[:, -1].isinf().sum())
        done()
    rows = _rows(problem, curves, ranks) + [
        unmatched(f"ScaLoRA I = 1 at η = {GIVEN_RATE}: starts that diverge", f"{unstable} of {starts}")
    ]
    return Result(
        source="ScaLoRA, Fig. 1",
        rows=rows,
        plots=[_plot(problem, curves)],
        notes=_notes(smoothness, starts, rates, chosen),
        data={"gaps": _text_keys(curves), "chosen": _text_keys(chosen)},
    )


def full(problem: Problem, rate: float) -> list[float]:
    """Returns the gaps of full fine-tuning from W = 0."""
    w, gaps = torch.zeros_like(problem.best), []
    for _ in range(STEPS + 1):
        gaps.append(float(problem.gap(w)))
        w = w - rate * (w @ problem.xx - problem.yx)
    return gaps


def descend(problem: Problem, a: Tensor, rate: float, kappa: float, interval: int) -> Descent:
    """Runs gradient descent on W + b a from W = 0, b = 0 and each a of (starts, 8, 64).

    ``interval``: steps between ScaLoRA's scalings and merges; 0 for LoRA.
    """
    b = torch.zeros_like(a).mT.contiguous()
    w = torch.zeros(len(a), SIZE, SIZE, dtype=a.dtype)
    gaps = torch.full((len(a), STEPS + 1), math.inf, dtype=a.dtype)
    running = torch.ones(len(a), dtype=torch.bool)
    for step in range(STEPS + 1):
        total = w + b @ a
        gap = problem.gap(total)
        if step == 0:
            limit = HOPELESS * gap.max()
        running = running & (gap < limit)  # a NaN compares False
        gaps[running, step] = gap[running]
        g = torch.where(running[:, None, None], total @ problem.xx - problem.yx, 0.0)
        a, b = (torch.where(running[:, None, None], factor, 0.0) for factor in (a, b))
        da, db = b.mT @ g, g @ a.mT
        if interval and step % interval == 0:
            alpha, beta = scale(w, a, b, da, db, kappa)
            a, b, da, db = beta.mT * a, alpha * b, alpha.mT * da, beta * db
        a, b = a - rate * da, b - rate * db
    return Descent(gaps, torch.linalg.matrix_rank(torch.where(gaps[:, -1:, None].isinf(), 0.0, total)).tolist())


def scale(w: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """Returns α and β as (starts, 1, 8), and merges into w the part of b a that they remove."""
    scales = functional.scalora_scaling(list(a), list(b), list(da), list(db), scaling=1.0, kappa=kappa)[:2]
    alpha, beta = (torch.stack(scale).clamp(min=FLOOR) for scale in scales)
    for i in range(len(w)):
        functional.add_low_rank_(w[i], a[i], b[i], 1 - alpha[i] * beta[i])
    return alpha[:, None], beta[:, None]


def best(runs: list[Descent], settings: list[tuple]) -> tuple[list[float], int, tuple]:
    """Selects the best run of each start. Returns the medians over the starts of its curve, rank and settings."""
    last = torch.stack([run.gaps[:, -1] for run in runs])  # (runs, starts)
    picks = last.argmin(0).tolist()
    curves = torch.stack([runs[pick].gaps[start] for start, pick in enumerate(picks)])
    rank = statistics.median_low(runs[pick].ranks[start] for start, pick in enumerate(picks))
    middle = tuple(map(statistics.median_low, zip(*(settings[pick] for pick in picks), strict=True)))
    return curves.median(0).values.tolist(), rank, middle


def _rows(problem: Problem, curves: dict, ranks: dict) -> list[Row]:
    rows = [
        compared("gap of W = 0", EXPECTED["start"], curves["full"][0]),
        compared("gap of the best W of rank 8", EXPECTED["floor"], problem.floor()),
    ]
    for name, expected in (("full", EXPECTED["full"]), ("LoRA", (EXPECTED["LoRA"],)), (1, EXPECTED[1])):
        for mark, value in zip(MARKS[-len(expected) :], expected, strict=True):
            rows.append(compared(f"{_title(name)}, gap after {mark} steps", value, curves[name][mark]))
    rows += [compared(f"{_title(i)}, gap after {STEPS} steps", EXPECTED[i], curves[i][STEPS]) for i in INTERVALS[1:]]
    return [*rows, compared("ScaLoRA I = 1, rank of W", EXPECTED["rank"], ranks[1])]


def _notes(smoothness: float, starts: int, rates: int, chosen: dict) -> list[str]:
    return [
        f"Seed {SEED}, float64, {STEPS} steps, L = {smoothness:.1f}; b = 0, a Gaussian of variance 1/{SIZE}, {starts} "
        "draws of it.",
        f"Full fine-tuning at rate 1/L; else, for each draw, the best at the last step of {rates} rates: "
        + ", ".join(f"{low:g} to {high:g} ({_title(name)})" for name, (low, high) in RATES.items())
        + f"; for ScaLoRA with κ of {CAUTION[0]:g} and {CAUTION[1]:g} times L η. Curves and figures: medians over "
        "the draws.",
        f"Chosen, medians: LoRA η = {chosen['LoRA'][0]:.2g}; "
        + "; ".join(f"{_title(i)} η = {chosen[i][0]:.2g}, κ = {chosen[i][1]:g} L η" for i in INTERVALS)
        + ".",
        "At a rate at which a start converges, its loss may still rise in the first steps.",
        "The numbers in the paper's column come from an independent transcription of its equations on the same "
        "problem, since the figure itself is a plot.",
    ]


def _plot(problem: Problem, curves: dict):
    def paint(axes):
        for name, curve in curves.items():
            (line,) = axes.plot(curve, label=f"{_title(name)}: {number(curve[-1])}")
            expected = EXPECTED[name] if isinstance(EXPECTED[name], tuple) else (EXPECTED[name],)
            axes.plot(MARKS[-len(expected) :], expected, "o", color=line.get_color(), markerfacecolor="white")
        axes.axhline(problem.floor(), color="grey", linestyle=":", linewidth=1)
        axes.plot([], [], "o", color="grey", markerfacecolor="white", label="expected")
        axes.set(xlabel="steps", ylabel="loss minus optimum", yscale="log", ylim=(1e-2, 1e4))
        axes.legend(fontsize=9)

    caption = "Lines: ours. Circles: the numbers in the paper's column. Dotted: the best W of rank 8."
    return draw("scalora-regression", caption, paint)


def _title(name: str | int) -> str:
    return {"full": "full fine-tuning", "LoRA": "LoRA"}.get(name, f"ScaLoRA I = {name}")


def _rates(name: str | int, count: int) -> list[float]:
    low, high = map(math.log10, RATES[name])
    return torch.logspace(low, high, count, dtype=torch.float64).tolist()


def _text_keys(values: dict) -> dict[str, object]:
    return {str(name): value for name, value in values.items()}
