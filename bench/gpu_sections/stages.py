"""The two stages of bench/gpu.py: their sections in order, and the seconds that each may take.

A stage begins by compiling, then runs its checks side by side, then the timed sections alone. The most important
sections come first, so that a stage that is cut short has measured them. The budgets of a lane, with the start of its
process, fit in its phase, and the phases fit in the stage. The estimates are for an H100 with 16 cores and a filled
cache, and are less than the budgets. Neither has been verified on a GPU.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from gpu_sections.counters import counted, counters
from gpu_sections.errors import errors
from gpu_sections.families import families, large
from gpu_sections.graphs import graphs
from gpu_sections.memcheck import memcheck
from gpu_sections.model_training import training, whole
from gpu_sections.native_tests import suite
from gpu_sections.repeats import repeats
from gpu_sections.section import Section
from gpu_sections.timings import gemm, grid, inverses, layers, machine, other_steps, small, steps, with_compile

START = 9.0  # seconds, estimated, in which a process imports torch, transformers and PEFT
COMPILERS = min(14, os.cpu_count() or 1)  # processes that compile
END = 10.0  # seconds for the cache's archive, the plots and the report

# jobs, budget, most seconds of a job, estimated seconds of a job, processes
SECTIONS = {
    "errors": Section(errors, 44, 20, 0.15, processes=3),
    "graphs": Section(graphs, 26, 20, 0.5),
    "repeats": Section(repeats, 18, 18, 0.6),
    "ceilings": Section(machine, 6, 6, 0.8),
    "gemm": Section(gemm, 12, 10, 1.3),
    "layers": Section(layers, 24, 15, 4.0),
    "steps": Section(steps, 30, 20, 3.5),
    "inverses": Section(inverses, 6, 6, 2.5),
    "training": Section(training, 24, 24, 18),
    "suite": Section(suite, 112, 112, 90),
    "memcheck": Section(memcheck, 112, 112, 60),
    "large": Section(large, 100, 60, 3.0),
    "grid": Section(grid, 30, 15, 1.4),
    "whole": Section(whole, 82, 82, 72),
    "with_compile": Section(with_compile, 42, 40, 18),
    "small": Section(small, 18, 18, 2.0),
    "other_steps": Section(other_steps, 18, 15, 3.5),
    "counters": Section(counters, 38, 38, 25),
}
# run under memcheck, and under ncu
WATCHED = {"families": Section(families, 100, 100, 1), "counted": Section(counted, 60, 60, 5)}
# these need PEFT or transformers
WITH_MODELS = ("layers", "steps", "training", "grid", "whole", "with_compile", "other_steps")


class Phase(NamedTuple):
    """Lanes that run side by side; the sections of a lane run one after the other in the same process."""

    seconds: float
    lanes: tuple[tuple[str, ...], ...]


class Stage(NamedTuple):
    seconds: float
    compile: float
    phases: tuple[Phase, ...]

    @property
    def sections(self) -> list[str]:
        return [name for phase in self.phases for lane in phase.lanes for name in lane]


STAGES = {
    1: Stage(
        210,
        compile=28,
        phases=(
            Phase(55, (("errors",), ("graphs", "repeats"))),
            Phase(115, (("ceilings", "gemm", "layers", "steps", "inverses", "training"),)),
        ),
    ),
    2: Stage(
        400,
        compile=25,
        phases=(
            Phase(122, (("suite",), ("memcheck",), ("large",))),
            Phase(243, (("ceilings", "grid", "whole", "with_compile", "small", "other_steps", "counters"),)),
        ),
    ),
}


def stage_of(names: list[str]) -> Stage:
    """Returns a stage of these sections alone: the checks first, then the timed sections in one lane."""
    checks = [lane for stage in STAGES.values() for lane in stage.phases[0].lanes]
    timed = [name for stage in STAGES.values() for lane in stage.phases[1].lanes for name in lane]
    phases = []
    for lanes in (checks, [list(dict.fromkeys(timed))]):
        chosen = [tuple(name for name in lane if name in names) for lane in lanes]
        chosen = tuple(lane for lane in chosen if lane)
        seconds = [START + sum(SECTIONS[name].seconds for name in lane) for lane in chosen]
        phases += [Phase(max(seconds), chosen)] if chosen else []
    compile_seconds = STAGES[1].compile
    return Stage(compile_seconds + sum(phase.seconds for phase in phases) + END, compile_seconds, tuple(phases))


def estimate(name: str, figures: int) -> float:
    """Returns the estimated seconds of a section with a number of figures, without the start of its processes."""
    section = SECTIONS[name]
    return section.estimate * -(-figures // section.processes)
