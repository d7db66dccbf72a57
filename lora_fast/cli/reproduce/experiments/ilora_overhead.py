"""iLoRA Fig. 1: the time that the regulariser of the imbalance adds to a training step. The paper measures GPT-2 medium
on a GPU, rank 4; this experiment measures SmolLM2-135M on a CPU."""

from __future__ import annotations

import statistics

from .... import methods
from ....measure.clock import turns
from ....measure.machine import conditions
from ....optim import LoRAAdamW
from . import overhead
from .overhead import Times
from .result import Result, claim, draw, unmatched
from .session import Session

RANK = 4  # as in the paper
NEGLIGIBLE = 0.05  # share of a step


def run(session: Session) -> Result:
    rounds = 4 if session.quick else 15
    machine = conditions()  # before the load of this experiment
    model, batches = overhead.prepare(session, RANK)
    optimizers = {"LoRA": LoRAAdamW(model, lr=1e-4), "iLoRA": LoRAAdamW(model, lr=1e-4, methods=[methods.ILoRA()])}
    times = {name: Times() for name in optimizers}
    overhead.warm(model, next(batches), list(optimizers.values()))
    with session.progress("steps", 2 * rounds) as done:
        for _, name in turns(list(optimizers), rounds, warm_up=0):
            times[name].gradients.append(overhead.gradients(model, next(batches)))
            times[name].optimizer.append(overhead.update(optimizers[name]))
            done()
    passes = statistics.median(times["LoRA"].gradients + times["iLoRA"].gradients)
    plain, ours = times["LoRA"].median(), times["iLoRA"].median()
    ratio = (passes + ours) / (passes + plain)
    rows = [
        claim(
            f"time of a step, iLoRA over LoRA (≤ {1 + NEGLIGIBLE:g})",
            "about 1",
            f"{ratio:.3f}",
            ratio <= 1 + NEGLIGIBLE,
        ),
        unmatched("optimizer step of iLoRA over plain AdamW's", f"{ours / plain:.2f}"),
    ]
    tokens = f"{overhead.BATCH}×{overhead.seq_len(session)} tokens"
    notes = [
        f"SmolLM2-135M, float32, rank {RANK} on its 210 linear layers, {tokens}; {machine}. The paper: GPT-2 "
        f"medium, rank {RANK}, on a GPU.",
        f"{rounds} pairs of steps in alternating order. Both run the same forward and backward pass, so the ratio "
        f"uses one median for it ({passes:.3f} s) and adds each optimizer's ({1e3 * plain:.1f} ms for AdamW, "
        f"{1e3 * ours:.1f} ms for iLoRA).",
    ]

    def paint(axes):
        names = ("LoRA", "iLoRA")
        bars = axes.bar(names, [passes] * 2, color="#c8cdd5", width=0.5, label="forward and backward")
        axes.bar(names, [plain, ours], bottom=[passes] * 2, width=0.5, label="optimizer")
        axes.bar_label(bars, [f"{passes + t:.3f} s" for t in (plain, ours)], label_type="center")
        axes.set(ylabel="seconds a step", ylim=(0, 1.25 * passes + max(plain, ours)))
        axes.grid(axis="x", visible=False)
        axes.legend()

    plot = draw("ilora-overhead", "Medians. The paper reports a negligible overhead.", paint)
    return Result("iLoRA, Fig. 1", rows, [plot], notes, {name: vars(t) for name, t in times.items()})
