"""Compares every op with float64, at an even and an odd shape and at several ranks."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

import lora_fast as lf
from gpu_sections.families import FAMILIES, judged
from gpu_sections.layer_inputs import rows
from gpu_sections.section import Jobs, Options
from lora_fast.kernels import tiles
from lora_fast.ops.reference import linear as reference
from suite.ops.providers import backend

RANKS = (8, 16, 32, 64, 128)
SHAPES = ((2048, 4096, 4096), (777, 1001, 1337))  # tokens, d_in, d_out
FEW_TOKENS = ((1, 4096, 4096), (17, 4096, 14336))
ELEMENTS, WIDTHS = 100_000, (264, 1001)  # for the kernel families
ADAPTERS = (torch.float32, torch.bfloat16)
SEED, DROPOUT, SCALING = 1234, 0.1, 2.0
NAMES = ("y", "dx", "da", "db")


def errors(options: Options) -> Jobs:
    """Checks that every op launches and meets the error budget of the tests against float64."""
    ranks, shapes, few, elements, widths = RANKS, SHAPES, FEW_TOKENS, ELEMENTS, WIDTHS
    if options.tiny:
        ranks, shapes, few, elements, widths = (3,), ((33, 40, 24),), (), 1 << 10, (32,)
    jobs = []
    for r in ranks:
        for shape in (*shapes, *few):
            strategies = tiles.strategies(options.device, torch.bfloat16, *shape[1:]) if shape in shapes else ()
            for strategy in (None, *strategies):
                for adapter in ADAPTERS:
                    for dropout in (0.0, DROPOUT):
                        name = "{} tokens, {}→{}".format(*shape) + f", r={r}, {str(adapter).removeprefix('torch.')}"
                        name += f", dropout {dropout:g}" * bool(dropout) + f", {strategy or 'by estimate'}"
                        jobs.append((name, functools.partial(judge, *shape, r, strategy, adapter, dropout, options)))
        for width in widths:
            for name, family in FAMILIES.items():
                job = functools.partial(judged, family, elements, width, r, options.device)
                jobs.append((f"{name}, {width}, r={r}", job))
    return jobs


def judge(
    n: int, d_in: int, d_out: int, r: int, strategy: str | None, adapter: torch.dtype, dropout: float, options: Options
) -> dict:
    """Returns the errors of y, dx, da and db, and the allowed ones, which follow from the errors of PEFT's formula with
    the same mask."""
    budget = _tests_budget()
    torch.manual_seed(n + r)
    x, weight, bias, dy = (rows(*shape, options.device) for shape in ((n, d_in), (d_out, d_in), (1, d_out), (n, d_out)))
    weight, bias = weight / d_in**0.5, bias[0]
    a, b = (torch.randn(shape, device=options.device).to(adapter) for shape in ((r, d_in), (d_out, r)))
    a, b = a / d_in**0.5, b / r**0.5

    def ours(x, a, b):
        return lf.functional.lora_linear(x, weight, bias, a, b, SCALING, dropout, SEED)

    with backend("triton", strategy):
        results = by_autograd(ours, x, a, b, dy)
    if options.mode == "stub":
        return {"ok": True}
    keep = mask(n, d_in, dropout, options.device) if dropout else None

    def formula(x, a, b, weight=weight, bias=bias):
        return budget.eager_lora_linear(x, weight, bias, a, b, SCALING, keep, 1 - dropout)

    exact_formula = functools.partial(formula, weight=weight.double(), bias=bias.double())
    exact = by_autograd(exact_formula, *(t.double() for t in (x, a, b, dy)))
    draws = budget.DRAWS if n * r < 4096 else 1  # the error of few roundings is a matter of luck
    eager_errors = [0.0] * 4
    for i in range(draws):
        factor = 1 + i / draws
        scaled = [x * factor, a, b, dy * factor]
        right = exact if i == 0 else by_autograd(exact_formula, *(t.double() for t in scaled))
        for j, pair in enumerate(zip(by_autograd(formula, *scaled), right, strict=True)):
            eager_errors[j] = max(eager_errors[j], budget.error(*pair))
    figures, ok = {}, True
    for name, got, eager, right in zip(NAMES, results, eager_errors, exact, strict=True):
        least = budget.least_error(x.dtype, adapter) if name in ("da", "db") else 0.0
        allowed = max(budget.EAGER * eager, least) + budget.ULPS[got.dtype] * torch.finfo(got.dtype).eps
        figures[name] = {"error": budget.error(got, right), "allowed": allowed}
        ok &= figures[name]["error"] <= allowed
    worst = max(figures, key=lambda name: figures[name]["error"] / figures[name]["allowed"])
    error, allowed = figures[worst].values()
    failure = {} if ok else {"error": f"{worst}: {error:.2e}, allowed {allowed:.2e}"}
    return {"ok": ok, "largest share": error / allowed, **failure, **figures}


@functools.lru_cache
def mask(n: int, d_in: int, dropout: float, device: torch.device) -> Tensor:
    """Returns the mask that our kernels draw from SEED, (n, d_in); cached, since the reference is slow."""
    return reference.philox_mask(SEED, n, d_in, dropout).to(device)


def by_autograd(run, x: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
    """Returns y, dx, da and db of a function of x, a and b."""
    x, a, b = (t.detach().clone().requires_grad_() for t in (x, a, b))
    y = run(x, a, b)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]


def _tests_budget():
    """Imports the error budget of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
    import budget

    return budget
