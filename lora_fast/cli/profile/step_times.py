"""Whole training steps: how long each part takes, engine by engine in turns, and how much memory it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves

from ...measure.clock import Clock
from ...measure.memory import PeakBytes, distinct_bytes
from .engines import COMPILED, Engine, Engines

PARTS = ("forward", "backward", "optimizer")


@dataclass
class Times:
    """Seconds of each part of each counted step."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    def add(self, seconds: tuple[float, float, float]) -> None:
        for part, value in zip(PARTS, seconds, strict=True):
            getattr(self, part).append(value)

    @property
    def step(self) -> list[float]:
        return [sum(parts) for parts in zip(self.forward, self.backward, self.optimizer, strict=True)]


def step(engines: Engines, engine: Engine, batch: dict) -> tuple[float, float, float]:
    """One training step; seconds of forward, backward and optimizer."""
    clock = Clock(engines.device)
    with engines.precision():
        loss = engine.model(**batch).loss
    clock.mark()
    loss.backward()
    clock.mark()
    if engine.optimizer is not None:
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    clock.mark()
    return clock.seconds()


def take_turns(
    engines: Engines, batch: dict, rounds: int, doing: Callable[[str], None], done: Callable[[], None]
) -> tuple[dict[str, Times], str]:
    """``rounds`` steps of each engine, one step of each in turn, another engine first in each round: a machine whose
    speed drifts treats them alike. A step of each before that is not counted.

    Returns:
        Label → times, and why the compiled engine is missing ("" if it is not): compiling may fail.
    """
    why = ""
    for engine in list(engines.found.values()):
        doing(f"warming up {engine.label}")
        try:
            step(engines, engine, batch)
        except Exception as error:
            if engine.label != COMPILED:
                raise
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
            del engines.found[COMPILED]
        done()
    times = {label: Times() for label in engines.found}
    order = list(engines.found.values())
    for i in range(rounds):
        first = i % len(order)
        for engine in order[first:] + order[:first]:
            doing(f"step {i + 1}, {engine.label}")
            times[engine.label].add(step(engines, engine, batch))
            done()
    return times, why


def peak_bytes(engines: Engines, engine: Engine, batch: dict) -> int | None:
    """The most memory a step needs where this engine is alone: its model, its optimizer's state, and the peak of what
    the step itself allocates. None where it cannot be counted: compiled code on a CPU allocates out of sight."""
    state = tree_leaves(engine.optimizer.state_dict()) if engine.optimizer else []
    resident = distinct_bytes([*engine.model.parameters(), *engine.model.buffers(), *state])
    if engines.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(engines, engine, batch)
        return resident + torch.cuda.max_memory_allocated() - before
    if engine.label == COMPILED:
        return None
    with PeakBytes() as counted:
        step(engines, engine, batch)
    return resident + counted.peak
