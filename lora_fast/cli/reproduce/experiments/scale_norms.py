"""Scale regularization (Tan): the norms of a and b and the ratio of their scales during training. In LoRA b starts at 0
and stays small compared with a; the regulariser makes the two more equal."""

from __future__ import annotations

from ...finetune.record import Record
from ...output.palette import colours
from . import finetunes
from .result import Result, claim, draw, unmatched
from .session import Session

METHODS = ["lora", "lora+", "sing-lora", "lora-rite", "scale-reg"]
FIGURES = {"norm_a": "‖a‖", "norm_b": "‖b‖", "rms_ratio": "rms of a over rms of b"}


def run(session: Session) -> Result:
    records = finetunes.train(session, METHODS)
    ratio = {name: record.last("adapter/rms_ratio_mean") for name, record in records.items()}
    ours, plain = ratio["scale-reg"], ratio["lora"]
    rows = [
        claim("ratio of the scales at the end, scale-reg, nearer to 1 than LoRA's", "yes",
              f"{ours:.2f} against {plain:.2f}", abs(ours - 1) < abs(plain - 1)),
        *(unmatched(f"{name}: ‖a‖, ‖b‖, ratio at the end", _end(record)) for name, record in records.items()),
    ]  # fmt: skip
    notes = [
        finetunes.conditions(session),
        "Means over all adapters, geometric for the ratio. At the start b = 0, so there is no ratio.",
        "sing-lora: both factors are one matrix, so their ratio only contains the ramp, which counts in ‖b‖, and the "
        "rows that the smaller factor lacks.",
    ]
    plot = draw("scale-norms", "Means over all adapters.", lambda axes: _paint(axes, records), panels=3)
    data = {name: record.adapter for name, record in records.items()}
    return Result("Scale regularization, norms over training", rows, [plot], notes, data)


def _end(record: Record) -> str:
    return ", ".join(f"{record.last(f'adapter/{figure}_mean'):.3g}" for figure in FIGURES)


def _paint(axes, records: dict[str, Record]) -> None:
    colour = colours(records)
    for axis, (figure, title) in zip(axes, FIGURES.items(), strict=True):
        for name, record in records.items():
            axis.plot(*record.curve(f"adapter/{figure}_mean"), color=colour[name], label=name)
        axis.set(xlabel="steps", title=title)
    axes[2].set(yscale="log")
    axes[2].axhline(1, color="grey", linestyle=":", linewidth=1)
    axes[0].legend(fontsize=9)
