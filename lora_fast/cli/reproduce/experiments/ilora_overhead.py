"""iLoRA Fig. 1: what the regulariser of the imbalance adds to the time of a training step. The paper measures GPT-2
medium on a GPU, rank 4; here it is SmolLM2-135M on a CPU."""

from __future__ import annotations

import statistics

from .... import methods
from ....optim import LoRAAdamW
from . import overhead
from .overhead import Times
from .result import Result, claim, draw, noted
from .session import Session, machine

RANK = 4  # as in the paper
NIL = 0.05  # share of a step: what "about nil" is taken to mean


def run(session: Session) -> Result:
    rounds = 4 if session.quick else 15
    conditions = machine()
    model, batches = overhead.prepare(session, RANK)
    optimizers = {"LoRA": LoRAAdamW(model, lr=1e-4), "iLoRA": LoRAAdamW(model, lr=1e-4, methods=[methods.ILoRA()])}
    times = {name: Times() for name in optimizers}
    overhead.warm(model, next(batches), list(optimizers.values()))
    with session.progress("pairs of steps", rounds) as done:
        for turn in range(rounds):
            for name in sorted(optimizers, reverse=turn % 2 == 1):
                times[name].gradients.append(overhead.gradients(model, next(batches)))
                times[name].optimizer.append(overhead.update(optimizers[name]))
            done()
    passes = statistics.median(times["LoRA"].gradients + times["iLoRA"].gradients)
    plain, ours = times["LoRA"].median(), times["iLoRA"].median()
    ratio = (passes + ours) / (passes + plain)
    rows = [
        claim(f"time of a step, iLoRA over LoRA (≤ {1 + NIL:g})", "about 1", f"{ratio:.3f}", ratio <= 1 + NIL),
        noted("optimizer step of iLoRA over plain AdamW's", f"{ours / plain:.2f}"),
    ]
    tokens = f"{overhead.BATCH}×{overhead.seq_len(session)} tokens"
    notes = [
        f"SmolLM2-135M, float32, rank {RANK} on its 210 linear layers, {tokens}; {conditions}. The paper: GPT-2 "
        f"medium, rank {RANK}, on a GPU.",
        f"{rounds} pairs of steps in alternating order. Forward and backward are the same operations for both, so the "
        f"ratio takes one median for them ({passes:.3f} s) and adds each optimizer's ({1e3 * plain:.1f} ms for AdamW, "
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

    plot = draw("ilora-overhead", "Medians. The paper reports no overhead to speak of.", paint)
    return Result("iLoRA, Fig. 1", rows, [plot], notes, {name: vars(t) for name, t in times.items()})
