"""Writes files for other tools: traces of what ran when, and snapshots of the memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .engines import Engine, Engines
from .step_times import step


def trace(engines: Engines, engine: Engine, batch: dict, folder: Path) -> str:
    """Writes a Chrome trace of one step, for https://ui.perfetto.dev or chrome://tracing. Returns the file's name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise Kineto logs into our output
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engines.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        step(engines, engine, batch)
    name = f"trace-{file_name(engine)}.json.gz"
    recorded.export_chrome_trace(str(folder / name))
    return name


def snapshot(engines: Engines, engine: Engine, batch: dict, folder: Path) -> str:
    """Writes the CUDA allocator's history of a step, for https://pytorch.org/memory_viz. Returns the file's name."""
    torch.cuda.memory._record_memory_history(stacks="python")  # resolving C++ frames takes minutes
    try:
        step(engines, engine, batch)
        name = f"memory-{file_name(engine)}.pickle"
        torch.cuda.memory._dump_snapshot(str(folder / name))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return name


def file_name(engine: Engine) -> str:
    return engine.label.lower().replace(" ", "-")
