"""NB-LoRA Fig. 3: the held-out loss at each learning rate. Plain LoRA has a best rate and diverges above it; the norm
of a bounded adapter cannot exceed its bound."""

from __future__ import annotations

import math

from ...finetune.record import Record
from . import finetunes
from .result import Result, claim, draw, number, unmatched
from .session import Session

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
QUICK = (1e-3, 1e-1)
METHODS = {"lora": "LoRA", "nb-lora": "NB-LoRA"}


def run(session: Session) -> Result:
    rates = QUICK if session.quick else RATES
    records = finetunes.train(session, [f"{method}:lr={rate:g}" for method in METHODS for rate in rates])
    losses = {m: [_loss(records[f"{m}:lr={rate:g}"]) for rate in rates] for m in METHODS}
    plain, bounded = losses["lora"], losses["nb-lora"]
    start = records[f"lora:lr={rates[0]:g}"].held_out[0][1]
    rows = [
        claim(f"held-out loss at a rate of {rates[-1]:g}, NB-LoRA below LoRA", "yes",
              f"{number(bounded[-1])} against {number(plain[-1])}", bounded[-1] < plain[-1]),
        claim("rates at which training ends above its start, NB-LoRA's fewer, or none", "yes",
              f"{_above(bounded, start)} against {_above(plain, start)} of {len(rates)}",
              _above(bounded, start) < _above(plain, start) or _above(bounded, start) == 0),
        unmatched("best held-out loss of all rates, LoRA and NB-LoRA", f"{min(plain):.3f} and {min(bounded):.3f}"),
        *(unmatched(f"at {rate:g}, LoRA and NB-LoRA", f"{number(a)} and {number(b)}")
          for rate, a, b in zip(rates, plain, bounded, strict=True)),
    ]  # fmt: skip
    notes = [finetunes.conditions(session), "NB-LoRA with a nuclear norm of at most the rank. The paper trains ViTs."]
    plot = draw(
        "nb-lora-rates", "Held-out loss at the end of training.", lambda axes: _paint(axes, rates, losses, start)
    )
    return Result("NB-LoRA, Fig. 3", rows, [plot], notes, {"rates": rates, "losses": losses})


def _loss(record: Record) -> float:
    return math.inf if record.diverged else record.held_out[-1][1]


def _above(losses: list[float], start: float) -> int:
    return sum(loss > start for loss in losses)


def _paint(axes, rates: tuple[float, ...], losses: dict[str, list[float]], start: float) -> None:
    for method, values in losses.items():
        axes.plot(rates, values, marker="o", label=METHODS[method])
    axes.axhline(start, color="grey", linestyle=":", linewidth=1, label="before training")
    axes.set(xlabel="learning rate", ylabel="held-out loss", xscale="log")
    axes.legend()
