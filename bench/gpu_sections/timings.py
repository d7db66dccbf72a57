"""Times single ops on a GPU: the rows of the goals. A figure is a list of measure's rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

import lora_fast as lf
from gpu_sections.section import Jobs, Options
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, ceilings, measure, once, simply
from suite.ops.bench_linear import BACKWARD, FORWARD
from suite.ops.providers import Operands, compiled, frozen, peft, provider
from suite.registry import module

SHAPES = ((4096, 4096), (4096, 14336))  # d_in, d_out
N_TOKENS, MODEL, RANK = 8192, "Llama-3-8B", 16
RANKS, TOKENS = (16, 32, 64, 256), (1, 64, 1024, 8192)  # of the grid
GOAL_STEPS = ("AdamW", "ILoRA", "PiLoRA")
SECONDS, SECONDS_OF_GRID = 0.6, 0.2  # of a case's timed rounds
LARGEST_ERROR = 1e-2  # of a result that is timed; three times what bfloat16 leaves


# ---- Stage 1


def machine(options: Options) -> Jobs:
    """What this machine reaches: a large product by cuBLAS and a copy."""
    small = options.mode != "device"
    limits = lambda dtype: lambda: ceilings(options.device, dtype, small)._asdict()
    return [(dtype, limits(dtype)) for dtype in ("bfloat16", "float32")]


def gemm(options: Options) -> Jobs:
    """The GEMM with the adapter's part, by every strategy, beside cuBLAS without it: y and dx."""
    shapes, r, n = (((48, 32),), 4, 16) if options.tiny else (SHAPES, RANK, N_TOKENS)
    cases = [
        Case("linear", MODEL, (shape,), r, n, "bfloat16", variant=v) for shape in shapes for v in (FORWARD, BACKWARD)
    ]
    return [(case.name, functools.partial(rows, case, options)) for case in cases]


def layers(options: Options) -> Jobs:
    """The layer, forward and backward, by every provider."""
    return cached_factors(options, [(shape, RANK, N_TOKENS, dropout) for shape in SHAPES for dropout in (0.0, 0.1)])


def steps(options: Options) -> Jobs:
    """The optimizer's step on every adapter pair of a 7B model: AdamW, iLoRA, πLoRA, gradients moving or not."""
    return grouped(options, ("step",), lambda case: case.variant.startswith(GOAL_STEPS))


def inverses(options: Options) -> Jobs:
    """The r×r inverses of those pairs."""
    return grouped(options, ("solve",), lambda case: case.variant == "inverse")


# ---- Stage 2


def grid(options: Options) -> Jobs:
    """The layer by the GEMM's strategies at several ranks and numbers of tokens: PEFT, ours, frozen."""
    shape = SHAPES[0]
    names = ("PEFT", "ours", "frozen")
    chosen = [(shape, r, n, 0.0) for r in RANKS for n in TOKENS]
    return cached_factors(
        options, chosen, SECONDS_OF_GRID, lambda name: name.startswith(names) and "," not in name.removeprefix("ours,")
    )


def with_compile(options: Options) -> Jobs:
    """PEFT's layer and ours, eager and under torch.compile."""
    tiny = Case("layer", MODEL, ((48, 32),), 4, 16, "bfloat16")
    cases = [replace(tiny, pairs=(SHAPES[0],), r=r, n_tokens=N_TOKENS) for r in (16, 64)]
    cases = [tiny] if options.tiny else cases
    return [(case.name, functools.partial(compiled_rows, case, options)) for case in cases]


def other_steps(options: Options) -> Jobs:
    """The optimizer's step by the other methods."""
    return grouped(options, ("step",), lambda case: not case.variant.startswith(GOAL_STEPS))


def small(options: Options) -> Jobs:
    """Grams, r×r systems and the Cayley transform of those pairs; the merge into four blocks."""
    ops = ("solve", "cayley", "gram", "hadamard", "merge")
    return grouped(options, ops, lambda case: case.variant != "inverse")


# ---- What they share


def cached_factors(
    options: Options,
    chosen: list[tuple],
    seconds: float = SECONDS,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Jobs:
    """``chosen``: (shape, rank, tokens, dropout); ``wanted``: which providers, by name."""
    chosen = [((48, 32), 4, 16, dropout) for dropout in (0.0, 0.1)] if options.tiny else chosen
    cases = [Case("layer", MODEL, (shape,), r, n, "bfloat16", dropout) for shape, r, n, dropout in chosen]
    return [(case.name, functools.partial(rows, case, options, seconds, wanted)) for case in cases]


def grouped(options: Options, ops: tuple[str, ...], wanted: Callable[[Case], bool]) -> Jobs:
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
    """Measures a case by every provider that runs here and is wanted, all but torch.compile."""
    setting = Setting(options.device, triton=True)
    comparison = module(case.op).build(case, setting)
    names = [name for name in comparison.providers if name != "torch.compile" and wanted(name)]
    comparison.providers = {name: comparison.providers[name] for name in names}
    return measured(case, comparison, options, seconds)


def measured(case: Case, comparison: Comparison, options: Options, seconds: float) -> dict:
    """Measures the providers of a case. On the stub driver ours run once, for what they launch."""
    if options.mode == "stub":
        for name, build in comparison.providers.items():
            if name.startswith("ours"):
                once(build())
        return {}
    comparison.providers = {name: options.surviving(name, build) for name, build in comparison.providers.items()}
    seconds = seconds if options.mode == "device" else 0.0
    limits = options.ceilings("float32" if case.op in ("step", "solve", "cayley", "gram", "hadamard") else case.dtype)
    found = measure(case, comparison, Setting(options.device, triton=True), limits, seconds, simply)
    values = {"rows": [asdict(row) for row in found]}
    errors = {row.provider: row.error for row in found if row.provider.startswith("ours") and row.error is not None}
    wrong = [f"{name}: relative L2 error {error:.2e}" for name, error in errors.items() if error > LARGEST_ERROR]
    return values | judged(wrong, {row.provider: row.unavailable for row in found if row.unavailable})


def judged(wrong: list[str], unavailable: dict[str, str]) -> dict:
    """Returns what a figure says of providers that failed: that is wrong of ours, and not known of others."""
    told = wrong + [f"{name}: {reason}" for name, reason in unavailable.items()]
    if not told:
        return {}
    return {"ok": False if wrong or any(map(is_ours, unavailable)) else None, "error": "; ".join(told)[:1000]}


def is_ours(provider: str) -> bool:
    return provider.startswith("ours")


def compiled_rows(case: Case, options: Options) -> dict:
    """Measures a layer by PEFT and by us, eager and compiled."""
    torch._dynamo.reset()
    op = Operands.of(case, options.device)
    ours = lambda x: lf.functional.lora_linear(x, op.weight, None, op.lora_A, op.lora_B, op.scaling)
    of_layer = module("layer").build(case, Setting(options.device, triton=True))

    def compiled_peft() -> Provider:
        eager = peft(op, case, torch.float32)
        build = lambda run: replace(eager, forward=run, compiled=True)
        return compiled(build, eager.forward, reset=False)

    def compiled_ours() -> Provider:
        return compiled(lambda run: provider(op, lambda: run(op.x), compiled=True), ours, reset=False)

    providers = {
        "PEFT": lambda: peft(op, case, torch.float32),
        "ours": lambda: provider(op, lambda: ours(op.x)),
        "frozen linear": lambda: frozen(op),
    }
    if options.mode == "device":
        providers |= {"PEFT, torch.compile": compiled_peft, "ours, torch.compile": compiled_ours}
    return measured(case, Comparison(providers, of_layer.work), options, SECONDS)
