"""NB-LoRA Table 6: the time of an r×r inverse. The paper inverts one matrix after the other; here all of a model's are
one batch."""

from __future__ import annotations

import statistics
import time

import torch

from ....functional import small_inverse
from .result import Result, draw, noted
from .session import Session, machine, one_thread

PAPER = {2: 29, 4: 31, 8: 35, 16: 48, 32: 73, 64: 97, 128: 170, 256: 361}  # µs a matrix, RTX 4090
BATCH, WORK = 210, 2e8  # matrices: SmolLM2's; about as many operations a measurement, so that all take alike
KINDS = {
    "one by one": lambda matrices: [torch.linalg.inv(matrix) for matrix in matrices],
    "batched": torch.linalg.inv,
    "batched, ours": small_inverse,
}


def run(session: Session) -> Result:
    ranks = [r for r in PAPER if r <= (32 if session.quick else 256)]
    conditions, repeats = machine(), 3 if session.quick else 9
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with one_thread(), session.progress("ranks", len(ranks)) as done:
        for r in ranks:
            matrices = _matrices(r)
            for kind, invert in KINDS.items():
                taken[kind].append(_microseconds(invert, matrices, repeats))
            done()
    rows = [
        noted(f"r = {r}: µs a matrix, {', '.join(KINDS)}", ", ".join(f"{taken[kind][i]:.1f}" for kind in KINDS))
        for i, r in enumerate(ranks)
    ]
    notes = [
        f"Float32, up to {BATCH} matrices I + skew + Gram a batch, one thread, medians of {repeats}; {conditions}. "
        "Ours is functional.small_inverse, one step of refinement included.",
        "The paper inverts one by one on a GPU, where a small inverse is all launches: "
        + ", ".join(f"{PAPER[r]} µs at r = {r}" for r in ranks)
        + ". On a CPU there is nothing to compare with that.",
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
    """Their symmetric part is at least I, as the Cayley transform's is."""
    generator = torch.Generator().manual_seed(0)
    count = max(4, min(BATCH, int(WORK / r**3)))
    a = torch.randn(count, r, r, generator=generator) / r**0.5
    return torch.eye(r) + a.mT - a + a @ a.mT


def _microseconds(invert, matrices: torch.Tensor, repeats: int) -> float:
    """A matrix; the first call warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        invert(matrices)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[1:]) / len(matrices)
