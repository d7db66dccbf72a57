"""The order of a profile: build, take turns, memory, layers one by one, traces."""

from __future__ import annotations

from pathlib import Path

import torch

from ...measure import ceilings
from ...measure.clock import Spread
from ...measure.machine import environment
from ...measure.memory import saved_for_backward
from ..inputs.settings import Settings
from ..output.progress import Bar, bar
from ..output.terminal import Display
from ..reproduce.experiments.session import machine
from . import engines as engine_builder
from . import layer_times, step_times, traces
from .engines import FUSED, Engines
from .profile_result import Measured, Result

SKIPPED = "not asked for (--no-compile)"
OPTIONS = ("model", "rank", "alpha", "dropout", "targets", "steps", "batch", "seq_len", "dtype", "seed")


def measure(settings: Settings, source: str, dtype: object, compiled: bool, folder: Path, display: Display) -> Result:
    """Everything; the traces go into ``folder``, which is made only when the measurements are done."""
    with display.working("Loading the model"):
        engines = engine_builder.build(settings, source, dtype, compiled)
    conditions = machine()
    if engines.device.type == "cuda":
        conditions = f"{torch.cuda.get_device_name(engines.device)}; {conditions}"
    batch = engine_builder.random_batch(engines.device, engines.vocabulary, settings.batch, settings.seq_len)
    count = len(engines.found)
    parts = count * (settings.steps + 3) + len(layer_times.by_shape(engines))
    with bar(display, parts) as progress:
        times, why = step_times.take_turns(engines, batch, settings.steps, progress.doing, progress.advance)
        fallbacks = engines.fallbacks()
        memory = _memory(engines, batch, progress)
        progress.doing("ceilings of the device")
        roof = ceilings.ceilings(engines.device, engines.dtype)
        found = layer_times.measure(engines, batch, settings.rank, roof, progress.doing, progress.advance)
        folder.mkdir(parents=True, exist_ok=True)
        files = _files(engines, batch, folder, progress)
    tokens = settings.batch * settings.seq_len
    measured = {}
    for label, taken in times.items():
        ratios = [one / other for one, other in zip(taken.step, times[FUSED].step, strict=True)]
        parts_of = [Spread.of(values) for values in (taken.forward, taken.backward, taken.optimizer, taken.step)]
        pace = tokens / parts_of[-1].median
        measured[label] = Measured(taken, *parts_of, Spread.of(ratios), pace, *memory[label], files[label])
    return Result(
        settings={name: getattr(settings, name) for name in OPTIONS},
        environment=environment(),
        machine=conditions,
        fusing=str(engines.fusing),
        fused_layers=len(engines.fusing.changed),
        fallbacks=fallbacks,
        skipped=why if compiled else SKIPPED,
        ceilings=roof,
        engines=measured,
        layers=found,
    )


def _memory(engines: Engines, batch: dict, progress: Bar) -> dict[str, tuple[int, int | None]]:
    """Label → bytes kept for backward, peak bytes."""
    found = {}
    for label, engine in engines.found.items():
        progress.doing(f"memory, {label}")
        with engines.precision():
            saved = saved_for_backward(engine.model, batch)
        found[label] = saved, step_times.peak_bytes(engines, engine, batch)
        progress.advance()
    return found


def _files(engines: Engines, batch: dict, folder: Path, progress: Bar) -> dict[str, list[str]]:
    found = {}
    for label, engine in engines.found.items():
        progress.doing(f"trace, {label}")
        found[label] = [traces.trace(engines, engine, batch, folder)]
        if engines.device.type == "cuda":
            found[label].append(traces.snapshot(engines, engine, batch, folder))
        progress.advance()
    return found
