"""NB-LoRA Table 6: the time of an r×r inverse. The paper inverts one matrix after the other; ours inverts all matrices
of a model in one batch."""

from __future__ import annotations

import statistics

import torch

from ....functional import small_inverse
from ....measure.clock import wall_seconds
from ....measure.machine import conditions
from .result import Result, draw, unmatched
from .session import Session, one_thread

PAPER = {2: 29, 4: 31, 8: 35, 16: 48, 32: 73, 64: 97, 128: 170, 256: 361}  # µs a matrix, RTX 4090
BATCH = 210  # matrices, as many as SmolLM2 has
OPERATIONS = 2e8  # of a measurement, about, so that all ranks take equally long
KINDS = {
    "one by one": lambda matrices: [torch.linalg.inv(matrix) for matrix in matrices],
    "batched": torch.linalg.inv,
    "batched, ours": small_inverse,
}


def run(session: Session) -> Result:
    ranks = [r for r in PAPER if r <= (32 if session.quick else 256)]
    machine, repeats = conditions(), 3 if session.quick else 9
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with one_thread(), session.progress("ranks", len(ranks)) as done:
        for r in ranks:
            matrices = _matrices(r)
            for kind, invert in KINDS.items():
                taken[kind].append(_microseconds(invert, matrices, repeats))
            done()
    rows = [
        unmatched(f"r = {r}: µs a matrix, {', '.join(KINDS)}", ", ".join(f"{taken[kind][i]:.1f}" for kind in KINDS))
        for i, r in enumerate(ranks)
    ]
    notes = [
        f"Float32, up to {BATCH} matrices I + skew + Gram a batch, one thread, medians of {repeats}; {machine}. "
        "Ours is functional.small_inverse, one step of refinement included.",
        "The paper inverts one by one on a GPU, where the launches dominate the time of a small inverse: "
        + ", ".join(f"{PAPER[r]} µs at r = {r}" for r in ranks)
        + ". There is no comparable figure on a CPU.",
    ]  # fmt: skip

    def paint(axes):
        for kind, values in taken.items():
            axes.plot(ranks, values, marker="o", label=kind)
        axes.plot(ranks, [PAPER[r] for r in ranks], color="grey", linestyle=":", label="paper, RTX 4090")
        axes.set(xscale="log", yscale="log", xlabel="r", ylabel="µs a matrix")
        axes.set_xticks(ranks, map(str, ranks))
        axes.minorticks_off()
        axes.legend()

    plot = draw("nb-lora-inverse", "Time of one inverse.", paint)
    return Result("NB-LoRA, Table 6", rows, [plot], notes, {"ranks": ranks, "microseconds": taken})


def _matrices(r: int) -> torch.Tensor:
    """Returns random matrices whose symmetric part is at least I, like those of the Cayley transform."""
    generator = torch.Generator().manual_seed(0)
    count = max(4, min(BATCH, int(OPERATIONS / r**3)))
    a = torch.randn(count, r, r, generator=generator) / r**0.5
    return torch.eye(r) + a.mT - a + a @ a.mT


def _microseconds(invert, matrices: torch.Tensor, repeats: int) -> float:
    """Returns the median µs a matrix, after one call that warms up."""
    times = [wall_seconds(lambda: invert(matrices), matrices.device) for _ in range(repeats + 1)]
    return 1e6 * statistics.median(times[1:]) / len(matrices)
