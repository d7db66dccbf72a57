"""Measures a profile: whole steps in turns, memory, single layers, and traces."""

from __future__ import annotations

from pathlib import Path

import torch

from ...measure.ceilings import measure_ceilings
from ...measure.clock import Spread
from ...measure.machine import conditions, environment
from ...measure.memory import saved_for_backward
from ..inputs.settings import Settings
from ..output.progress import Bar, bar
from ..output.terminal import Display
from . import engines as engine_builder
from . import layer_times, step_times, traces
from .engines import FUSED, Engines
from .profile_result import Measured, Result

SKIPPED = "not requested (--no-compile)"
ADAPTER = ("rank", "alpha", "dropout", "targets", "target_parameters", "dora")
OPTIONS = ("model", *ADAPTER, "steps", "batch", "seq_len", "dtype", "quantize", "seed")


def measure(
    settings: Settings, source: str, dtype: torch.dtype, compiled: bool, folder: Path, display: Display
) -> Result:
    """Measures everything. The traces go into ``folder``, which is created only after the other measurements."""
    assert settings.steps is not None, "the command always sets the number of steps"
    with display.working("Loading the model"):
        engines = engine_builder.build(settings, source, dtype, compiled)
    machine = conditions()
    if engines.device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(engines.device)}; {machine}"
    batch = engine_builder.random_batch(engines.device, engines.vocabulary, settings.batch, settings.seq_len)
    count = len(engines.by_label)
    parts = count * (settings.steps + 3) + len(layer_times.by_shape(engines))
    with bar(display, parts) as progress:
        times, failure = step_times.take_turns(engines, batch, settings.steps, progress.doing, progress.advance)
        fallbacks = engines.fallbacks()
        memory = _memory(engines, batch, progress)
        progress.doing("ceilings of the device")
        roof = measure_ceilings(engines.device, settings.dtype)
        layers = layer_times.measure(engines, batch, settings.rank, roof, progress.doing, progress.advance)
        folder.mkdir(parents=True, exist_ok=True)
        files = _files(engines, batch, folder, progress)
    tokens = settings.batch * settings.seq_len
    measured = {}
    for label, taken in times.items():
        ratios = [seconds / fused for seconds, fused in zip(taken.step, times[FUSED].step, strict=True)]
        step = Spread.of(taken.step)
        saved, peak = memory[label]
        measured[label] = Measured(
            times=taken,
            forward=Spread.of(taken.forward),
            backward=Spread.of(taken.backward),
            optimizer=Spread.of(taken.optimizer),
            step=step,
            over_fused=Spread.of(ratios),
            tokens_per_second=tokens / step.median,
            saved=saved,
            peak=peak,
            files=files[label],
        )
    return Result(
        settings={name: getattr(settings, name) for name in OPTIONS},
        environment=environment(),
        machine=machine,
        fusing=str(engines.fusing),
        fused_layers=len(engines.fusing.changed),
        fallbacks=fallbacks,
        skipped=failure if compiled else SKIPPED,
        ceilings=roof,
        weight_format=engines.weight_format,
        weight_bytes=engines.weights[0],
        plain_weight_bytes=engines.weights[1],
        engines=measured,
        layers=layers,
    )


def _memory(engines: Engines, batch: dict, progress: Bar) -> dict[str, tuple[int, int | None]]:
    """Returns label → bytes kept for backward, peak bytes."""
    figures = {}
    for label, engine in engines.by_label.items():
        progress.doing(f"memory, {label}")
        with engines.precision():
            saved = saved_for_backward(engine.model, batch)
        figures[label] = saved, step_times.peak_bytes(engines, engine, batch)
        progress.advance()
    return figures


def _files(engines: Engines, batch: dict, folder: Path, progress: Bar) -> dict[str, list[str]]:
    """Writes the traces and snapshots. Returns label → names of its files."""
    names = {}
    for label, engine in engines.by_label.items():
        progress.doing(f"trace, {label}")
        names[label] = [traces.trace(engines, engine, batch, folder)]
        if engines.device.type == "cuda":
            names[label].append(traces.snapshot(engines, engine, batch, folder))
        progress.advance()
    return names
