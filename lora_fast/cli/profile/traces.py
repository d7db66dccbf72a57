"""Files for other tools: what ran when, and what held the memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .engines import Engine, Engines
from .step_times import step


def trace(engines: Engines, engine: Engine, batch: dict, folder: Path) -> str:
    """One step as a Chrome trace (open it in https://ui.perfetto.dev or chrome://tracing); the file's name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes its own progress among ours
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engines.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        step(engines, engine, batch)
    name = f"trace-{file_name(engine)}.json.gz"
    recorded.export_chrome_trace(str(folder / name))
    return name


def snapshot(engines: Engines, engine: Engine, batch: dict, folder: Path) -> str:
    """The CUDA allocator's history over one step (open it in https://pytorch.org/memory_viz); the file's name."""
    torch.cuda.memory._record_memory_history(stacks="python")  # C++ frames take minutes to name
    try:
        step(engines, engine, batch)
        name = f"memory-{file_name(engine)}.pickle"
        torch.cuda.memory._dump_snapshot(str(folder / name))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return name


def file_name(engine: Engine) -> str:
    return engine.label.lower().replace(" ", "-")
