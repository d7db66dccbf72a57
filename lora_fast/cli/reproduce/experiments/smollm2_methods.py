"""Trains SmolLM2-135M with every method from the same start, with equal steps and one learning rate, and compares the
loss curves and the held-out loss."""

from __future__ import annotations

import math

from ...finetune.record import Record
from ...inputs.method_options import METHODS
from ...output.palette import colours
from . import finetunes
from .result import Result, draw, unmatched
from .session import Session


def run(session: Session) -> Result:
    records = finetunes.train(session, list(METHODS))
    order = sorted(records, key=lambda name: held_out(records[name]))
    rows = [
        unmatched(
            f"{name}, held-out loss before → after", f"{before(records[name]):.4f} → {held_out(records[name]):.4f}"
        )
        for name in order
    ]
    diverged = [f"{name}: {record.diverged}." for name, record in records.items() if record.diverged]
    plot = draw(
        "smollm2-methods",
        "Left: training loss, mean of each step and the two before it. Right: loss on held-out text.",
        lambda axes: _paint(axes, records),
        panels=2,
    )
    data = {name: {"losses": record.losses, "held_out": record.held_out} for name, record in records.items()}
    notes = [finetunes.conditions(session), "The rows are in the order of the result.", *diverged]
    return Result("the methods' papers use other models and texts", rows, [plot], notes, data)


def before(record: Record) -> float:
    """Returns the held-out loss before training."""
    return record.held_out[0][1]


def held_out(record: Record) -> float:
    """Returns the held-out loss after training; infinite if the run diverged."""
    return math.inf if record.diverged else record.held_out[-1][1]


def _paint(axes, records: dict[str, Record]) -> None:
    colour = colours(records)
    for width, (name, record) in zip(
        range(len(records), 0, -1), records.items(), strict=True
    ):  # so that equal curves stay visible
        look = {"color": colour[name], "label": name, "linewidth": 0.7 + 0.6 * width}
        recent = [record.losses[max(0, i - 2) : i + 1] for i in range(len(record.losses))]
        axes[0].plot([sum(window) / len(window) for window in recent], **look)
        axes[1].plot(*zip(*record.held_out, strict=True), "o-", markersize=4, **look)
    for axis, what in zip(axes, ("training loss", "held-out loss"), strict=True):
        axis.set(xlabel="steps", ylabel=f"{what} (nats per token)")
    axes[1].legend(fontsize=8, ncols=2)
