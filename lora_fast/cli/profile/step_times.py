"""Measures whole training steps: the time of each part, with the engines in turns, and the peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch.utils._pytree import tree_leaves

from ...measure.clock import Clock, turns
from ...measure.memory import distinct_bytes, stored_bytes
from ...measure.memory import peak_bytes as peak_bytes_of
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
    """Runs one training step and returns the seconds of forward, backward and optimizer."""
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
    forward, backward, optimizer = clock.seconds()
    return forward, backward, optimizer


def take_turns(
    engines: Engines, batch: dict, rounds: int, doing: Callable[[str], None], done: Callable[[], None]
) -> tuple[dict[str, Times], str]:
    """Times ``rounds`` steps of each engine in turns, after one step of each that warms up.

    Args:
        doing: called with a description before each step. done: called after each step.

    Returns:
        Label → times, and why the compiled engine is missing, since compiling may fail ("" if it is not missing).
    """
    failure = ""
    for engine in list(engines.by_label.values()):
        doing(f"warming up {engine.label}")
        try:
            step(engines, engine, batch)
        except Exception as error:
            if engine.label != COMPILED:
                raise
            failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
            del engines.by_label[COMPILED]
        done()
    times = {label: Times() for label in engines.by_label}
    for turn, engine in turns(list(engines.by_label.values()), rounds, warm_up=0):
        doing(f"step {turn + 1}, {engine.label}")
        times[engine.label].add(step(engines, engine, batch))
        done()
    return times, failure


def peak_bytes(engines: Engines, engine: Engine, batch: dict) -> int | None:
    """Returns the most memory that a step needs if the engine is alone on the device.

    That is its model, the state of its optimizer, and the peak of the step's own allocations. None where it cannot be
    counted: on a CPU the allocations of compiled code are not visible.
    """
    if engine.label == COMPILED and engines.device.type != "cuda":
        return None
    state = tree_leaves(engine.optimizer.state_dict()) if engine.optimizer else []
    resident = stored_bytes(engine.model) + distinct_bytes(state)
    return resident + peak_bytes_of(lambda: step(engines, engine, batch), engines.device)
