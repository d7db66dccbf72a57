"""What is timed of single ops on a GPU: the rows of the goals. A figure is a list of measure's rows."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace

from gpu_section import Jobs, Options
from measure import Ceilings, Setting, ceilings, measure, simply
from shapes import Case, Scale
from suite import module

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))  # d_in, d_out
N_TOKENS, MODEL, RANK = 8192, "Llama-3-8B", 16
SECONDS = 1.0  # of timed rounds


def layers(options: Options) -> Jobs:
    """The layer, forward and backward, by every provider."""
    limits = ceilings(options.device, "bfloat16", small=options.dry_run)
    yield "ceilings", limits._asdict
    shapes, tokens = (((48, 32),), 16) if options.dry_run else (SHAPES, N_TOKENS)
    cases = [
        Case("layer", MODEL, (shape,), r, tokens, "bfloat16", dropout)
        for r in ((4,) if options.dry_run else (RANK, 64))
        for shape in shapes
        for dropout in (0.0, 0.1)
    ]
    for case in cases:
        yield case.name, functools.partial(rows, case, options, limits)
    if not options.dry_run:  # last: compiling takes longer than all the rest of a case
        yield f"{cases[0].name}, with torch.compile", functools.partial(rows, cases[0], options, limits, True)


def steps(options: Options) -> Jobs:
    """The optimizer's step on every adapter pair of a 7B model, by every method."""
    yield from grouped(options, ("step",))


def small(options: Options) -> Jobs:
    """Grams, r×r systems, inverses and the Cayley transform of those pairs; the merge into four blocks."""
    yield from grouped(options, ("solve", "cayley", "gram", "hadamard", "merge"))


def grouped(options: Options, ops: tuple[str, ...]) -> Jobs:
    limits = ceilings(options.device, "float32", small=options.dry_run)
    scale = Scale({}, (MODEL,), (RANK,), ("bfloat16",), (0.0,), 0, 0)
    for op in ops:
        cases = module(op).cases(scale)
        if options.dry_run:
            cases = [replace(case, pairs=((24, 16),), r=4) for case in cases[:3]]
        for case in cases:
            yield f"{op}: {case.name}", functools.partial(rows, case, options, limits)


def rows(case: Case, options: Options, limits: Ceilings, compiled: bool = False) -> dict:
    """A case by every provider that runs here."""
    setting = Setting(options.device, triton=True)
    comparison = module(case.op).build(case, setting)
    if not compiled:
        comparison.providers.pop("torch.compile", None)
    comparison.providers = {name: options.surviving(name, build) for name, build in comparison.providers.items()}
    seconds = 0.0 if options.dry_run else SECONDS
    return {"rows": [asdict(row) for row in measure(case, comparison, setting, limits, seconds, simply)]}
