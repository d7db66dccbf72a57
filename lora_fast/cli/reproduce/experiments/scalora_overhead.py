"""ScaLoRA Table 10: the time over LoRA's if the factors are scaled, and the residual is merged into the weights, every
I steps; and the share of layers with the column solution. The paper measures on a GPU; this experiment measures
SmolLM2-135M on a CPU, in float32, where a merge reads and writes 106 million weights."""

from __future__ import annotations

import statistics

from .... import functional, methods
from ....batches import pairs
from ....measure.machine import conditions
from ....optim import LoRAAdamW
from . import overhead as steps
from .overhead import Times
from .result import Result, Row, compared, draw, overhead, unmatched
from .session import Session

PAPER = {1: 1.42, 3: 1.15, 10: 1.04, 30: 1.02, 100: 1.01}
COLUMN_SHARE = 80  # percent, in the paper
RANKS, SHARE_STEPS = (4, 8, 16), 4  # of the experiment on the share
SCALING, RESTING = "a step that scales", "a step that does not"


def run(session: Session) -> Result:
    rounds = 3 if session.quick else 12
    machine = conditions()  # before the load of this experiment
    times = measure(session, rounds)
    passes = statistics.median(second for taken in times.values() for second in taken.gradients)
    lora, scaling, resting = (taken.median() for taken in times.values())
    ratios = {i: over_lora(i, passes, lora, scaling, resting) for i in PAPER}
    shares = column_shares(session)
    rows: list[Row] = [overhead(f"time over LoRA's, I = {i}", PAPER[i], ratio) for i, ratio in ratios.items()]
    rows.append(unmatched("optimizer step that scales and merges over plain AdamW's", f"{scaling / lora:.1f}"))
    rows += [
        compared(f"layers taking the column solution, rank {rank}, %", COLUMN_SHARE, share)
        for rank, share in shares.items()
    ]
    notes = [
        f"SmolLM2-135M, float32, rank {steps.RANK} on its 210 linear layers, {steps.BATCH}×{steps.seq_len(session)} "
        f"tokens; {machine}. The paper: GPUs.",
        f"{rounds} rounds of three steps: LoRA, ScaLoRA scaling, ScaLoRA not scaling. Medians: forward and backward, "
        f"the same for all, {passes:.3f} s; optimizer {lora:.4f}, {scaling:.4f}, {resting:.4f} s. A row is the mean "
        "over I steps, of which one scales.",
        "The column solution applies to layers whose unconstrained optimum has no negative scale. Its share is a mean "
        f"over {SHARE_STEPS} scaling steps after the first one (where b = 0). With a larger rank, more scales must be "
        "positive.",
    ]

    def paint(axes):
        axes.plot(PAPER.keys(), PAPER.values(), "o--", color="grey", markerfacecolor="white", label="paper, GPU")
        axes.plot(ratios.keys(), ratios.values(), "o-", label="ours, CPU")
        axes.set(xlabel="I, steps between scalings", ylabel="time over LoRA's", xscale="log")
        axes.set_xticks(list(PAPER), [str(i) for i in PAPER])
        axes.minorticks_off()
        axes.legend()

    plot = draw("scalora-overhead", "Dashed: Table 10.", paint)
    data = {"seconds": {kind: vars(taken) for kind, taken in times.items()}, "column_shares": shares}
    return Result("ScaLoRA, Table 10", rows, [plot], notes, data)


def measure(session: Session, rounds: int) -> dict[str, Times]:
    """Times LoRA's steps, ScaLoRA's steps that scale, and ScaLoRA's steps that do not, in turns on one model."""
    model, batches = steps.prepare(session)
    plain = LoRAAdamW(model, lr=1e-4)
    scalora = LoRAAdamW(model, lr=1e-4, methods=[methods.ScaLoRA(interval=2)])  # scales at every other of its steps
    # The order within a round is fixed, unlike in measure.clock.turns, since ScaLoRA scales at every other step.
    times = {"LoRA": Times(), SCALING: Times(), RESTING: Times()}
    steps.warm(model, next(batches), [plain, scalora, scalora])
    with session.progress("steps, three by three", rounds) as done:
        for _ in range(rounds):
            for taken, optimizer in zip(times.values(), (plain, scalora, scalora), strict=True):
                taken.gradients.append(steps.gradients(model, next(batches)))
                taken.optimizer.append(steps.update(optimizer))
            done()
    return times


def column_shares(session: Session) -> dict[int, float]:
    """Returns rank → percent of the layers that take the column solution."""
    shares = {}
    for rank in RANKS:
        model, batches = steps.prepare(session, rank)
        optimizer = LoRAAdamW(model, lr=1e-4, methods=[methods.ScaLoRA(interval=1)])
        step_shares = []
        with session.progress(f"column solutions, rank {rank}", SHARE_STEPS + 1) as done:
            for _ in range(SHARE_STEPS + 1):
                steps.gradients(model, next(batches))
                step_shares.append(column_share(pairs.find_pairs(model)))
                optimizer.step()
                done()
        shares[rank] = 100 * statistics.mean(step_shares[1:])
    return shares


def over_lora(interval: int, passes: float, lora: float, scaling: float, resting: float) -> float:
    """Returns the time over LoRA's of ``interval`` steps of which one scales."""
    return (passes + (scaling + (interval - 1) * resting) / interval) / (passes + lora)


def column_share(adapters: list[pairs.Pair]) -> float:
    """Returns the share of pairs that take the column solution at their present gradients."""
    factors = zip(*((pair.a.detach(), pair.b.detach(), pair.a.grad, pair.b.grad) for pair in adapters), strict=True)
    info = functional.scalora_scaling(*map(list, factors), adapters[0].scaling, 1.0, "paper")[2]
    return statistics.mean(int(flag) == 0 for flag in info)
