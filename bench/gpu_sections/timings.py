"""Times single ops on a GPU, for the goals. A figure is a list of ``suite.comparison.Row``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

import lora_fast as lf
from gpu_sections.section import Jobs, Options
from lora_fast.measure.ceilings import measure_ceilings
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, measure, once, simply
from suite.ops.bench_linear import BACKWARD, FORWARD
from suite.ops.providers import Operands, compiled, frozen, peft, provider
from suite.registry import module

SHAPES = ((4096, 4096), (4096, 14336))  # d_in, d_out
N_TOKENS, MODEL, RANK = 8192, "Llama-3-8B", 16
RANKS, TOKENS = (16, 32, 64, 256), (1, 64, 1024, 8192)  # of the section grid
ONE_TOKEN = Case("decode", MODEL, (SHAPES[0],), RANK, 1, "bfloat16")
GOAL_STEPS = ("AdamW", "ILoRA", "PiLoRA")
SECONDS, SECONDS_OF_GRID = 0.6, 0.2  # for the timed rounds of a case
LARGEST_ERROR = 1e-2  # of a timed result; three times the rounding error of bfloat16


# ---- Stage 1


def machine(options: Options) -> Jobs:
    """Measures the ceilings of this machine: a large product by cuBLAS, and a copy."""

    def ceilings(dtype: str) -> dict:
        return asdict(measure_ceilings(options.device, dtype, small=options.mode != "device"))

    return [(dtype, functools.partial(ceilings, dtype)) for dtype in ("bfloat16", "float32")]


def gemm(options: Options) -> Jobs:
    """Times the GEMM with the adapter's part by every strategy, and cuBLAS without that part: y and dx."""
    shapes, r, n = (((48, 32),), 4, 16) if options.tiny else (SHAPES, RANK, N_TOKENS)
    cases = [
        Case("linear", MODEL, (shape,), r, n, "bfloat16", variant=variant)
        for shape in shapes
        for variant in (FORWARD, BACKWARD)
    ]
    return [(case.name, functools.partial(rows, case, options)) for case in cases]


def layers(options: Options) -> Jobs:
    """Times the layer by every provider, forward and backward, and the forward alone for one token."""
    jobs = layer_jobs(options, [(shape, RANK, N_TOKENS, dropout) for shape in SHAPES for dropout in (0.0, 0.1)])
    case = replace(ONE_TOKEN, pairs=((48, 32),), r=4) if options.tiny else ONE_TOKEN
    return [*jobs, (case.name, functools.partial(rows, case, options))]


def steps(options: Options) -> Jobs:
    """Times the optimizer's step on all pairs of a model: AdamW, iLoRA, πLoRA, with fixed and with moving gradients."""
    return model_jobs(options, ("step",), lambda case: case.variant.startswith(GOAL_STEPS))


def inverses(options: Options) -> Jobs:
    """Times the r×r inverses of all pairs of a model."""
    return model_jobs(options, ("solve",), lambda case: case.variant == "inverse")


# ---- Stage 2


def grid(options: Options) -> Jobs:
    """Times PEFT's layer, ours by every strategy, and the frozen layer at several ranks and numbers of tokens."""

    def wanted(name: str) -> bool:  # no variants of PEFT
        return name.startswith(("PEFT", "ours", "frozen")) and "," not in name.removeprefix("ours,")

    sizes = [(SHAPES[0], r, n, 0.0) for r in RANKS for n in TOKENS]
    return layer_jobs(options, sizes, SECONDS_OF_GRID, wanted)


def with_compile(options: Options) -> Jobs:
    """Times PEFT's layer and ours, eager and under torch.compile."""
    tiny = Case("layer", MODEL, ((48, 32),), 4, 16, "bfloat16")
    cases = [replace(tiny, pairs=(SHAPES[0],), r=r, n_tokens=N_TOKENS) for r in (16, 64)]
    cases = [tiny] if options.tiny else cases
    return [(case.name, functools.partial(compiled_rows, case, options)) for case in cases]


def other_steps(options: Options) -> Jobs:
    """Times the optimizer's step by the other methods."""
    return model_jobs(options, ("step",), lambda case: not case.variant.startswith(GOAL_STEPS))


def small(options: Options) -> Jobs:
    """Times Grams, r×r systems and the Cayley transform of all pairs of a model, and the merge into four blocks."""
    ops = ("solve", "cayley", "gram", "hadamard", "merge")
    return model_jobs(options, ops, lambda case: case.variant != "inverse")


# ---- What they share


def layer_jobs(
    options: Options, sizes: list[tuple], seconds: float = SECONDS, wanted: Callable[[str], bool] = lambda name: True
) -> Jobs:
    """Returns a job for the layer at each of ``sizes`` (shape, rank, tokens, dropout).

    ``wanted`` takes the name of a provider and returns whether it is measured.
    """
    sizes = [((48, 32), 4, 16, dropout) for dropout in (0.0, 0.1)] if options.tiny else sizes
    cases = [Case("layer", MODEL, (shape,), r, n, "bfloat16", dropout) for shape, r, n, dropout in sizes]
    return [(case.name, functools.partial(rows, case, options, seconds, wanted)) for case in cases]


def model_jobs(options: Options, ops: tuple[str, ...], wanted: Callable[[Case], bool]) -> Jobs:
    """Returns a job for each wanted case of these ops on all pairs of ``MODEL``."""
    scale = Scale({}, (MODEL,), (RANK,), ("bfloat16",), (0.0,), 0, 0)
    jobs = []
    for op in ops:
        cases = [case for case in module(op).cases(scale) if wanted(case)]
        if options.tiny:
            cases = [replace(case, pairs=((24, 16),), r=4) for case in cases]
        jobs += [(f"{op}: {case.name}", functools.partial(rows, case, options)) for case in cases]
    return jobs


def rows(
    case: Case, options: Options, seconds: float = SECONDS, wanted: Callable[[str], bool] = lambda name: True
) -> dict:
    """Measures a case by every wanted provider except torch.compile."""
    setting = Setting(options.device, triton=True)
    comparison = module(case.op).build(case, setting)
    names = [name for name in comparison.providers if name != "torch.compile" and wanted(name)]
    comparison.providers = {name: comparison.providers[name] for name in names}
    return measured(case, comparison, options, seconds)


def measured(case: Case, comparison: Comparison, options: Options, seconds: float) -> dict:
    """Measures the providers of a case. On the stub driver ours run once, to compile their kernels."""
    if options.mode == "stub":
        for name, build in comparison.providers.items():
            if is_ours(name):
                once(build())
        return {}
    comparison.providers = {name: options.surviving(name, build) for name, build in comparison.providers.items()}
    seconds = seconds if options.mode == "device" else 0.0
    limits = options.ceilings("float32" if case.op in ("step", "solve", "cayley", "gram", "hadamard") else case.dtype)
    measured_rows = measure(case, comparison, Setting(options.device, triton=True), limits, seconds, simply)
    values = {"rows": [asdict(row) for row in measured_rows]}
    errors = {row.provider: row.error for row in measured_rows if is_ours(row.provider) and row.error is not None}
    wrong = [f"{name}: relative L2 error {error:.2e}" for name, error in errors.items() if error > LARGEST_ERROR]
    return values | judged(wrong, {row.provider: row.unavailable for row in measured_rows if row.unavailable})


def judged(wrong: list[str], unavailable: dict[str, str]) -> dict:
    """Returns "ok" and "error" of a figure with failed providers: False if one of ours failed, otherwise None.

    Args:
        wrong: descriptions of wrong results of ours. unavailable: provider → why it was not measured.
    """
    failures = wrong + [f"{name}: {reason}" for name, reason in unavailable.items()]
    if not failures:
        return {}
    return {"ok": False if wrong or any(map(is_ours, unavailable)) else None, "error": "; ".join(failures)[:1000]}


def is_ours(provider: str) -> bool:
    return provider.startswith("ours")


def compiled_rows(case: Case, options: Options) -> dict:
    """Measures PEFT's layer and ours, eager and compiled."""
    torch._dynamo.reset()
    op = Operands.of(case, options.device)
    costs = module("layer").build(case, Setting(options.device, triton=True)).costs

    def ours(x):
        return lf.functional.lora_linear(x, op.weight, None, op.lora_A, op.lora_B, op.scaling)

    def compiled_peft() -> Provider:
        eager = peft(op, case, torch.float32)
        return compiled(lambda run: replace(eager, forward=run, compiled=True), eager.forward, reset=False)

    def compiled_ours() -> Provider:
        return compiled(lambda run: provider(op, lambda: run(op.x), compiled=True), ours, reset=False)

    providers = {
        "PEFT": lambda: peft(op, case, torch.float32),
        "ours": lambda: provider(op, lambda: ours(op.x)),
        "frozen linear": lambda: frozen(op),
    }
    if options.mode == "device":
        providers |= {"PEFT, torch.compile": compiled_peft, "ours, torch.compile": compiled_ours}
    return measured(case, Comparison(providers, costs), options, SECONDS)
