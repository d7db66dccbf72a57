"""Error budgets in bfloat16 at the sizes of real layers."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from gpu_operands import forward_backward, layer, rows
from gpu_section import Jobs, Options
from torch import Tensor

import lora_fast as lf
from lora_fast.kernels import tiles

SIZES = ((8192, 4096, 4096, 16), (8192, 4096, 4096, 64), (8192, 4096, 14336, 16), (777, 1001, 1337, 5))


def errors(options: Options) -> Jobs:
    """The layer in bfloat16 against float64: each error within the budget that the tests hold it to."""
    for n, d_in, d_out, r in ((33, 40, 24, 3),) if options.dry_run else SIZES:
        for strategy in tiles.strategies(options.device, torch.bfloat16, d_in, d_out):
            job = functools.partial(judge, n, d_in, d_out, r, strategy, options.device)
            yield f"{n} tokens, {d_in}→{d_out}, r={r}, {strategy}", job


def judge(n: int, d_in: int, d_out: int, r: int, strategy: str, device: torch.device) -> dict:
    """Of y, dx, da and db: the error, eager torch's, and what is allowed."""
    budget = _tests_budget()
    module = layer(d_in, d_out, r, 0.0, device)
    x, dy = rows(n, d_in, device).requires_grad_(), rows(n, d_out, device)
    given = [t.detach() for t in (x, module.weight, module.lora_A, module.lora_B, dy)]
    exact = by_autograd(budget, *(t.double() for t in given), module.scaling)
    eager = by_autograd(budget, *given, module.scaling)
    with lf.set_backend("triton"), tiles.assume(strategy=strategy):
        made = forward_backward(module, x, dy)
    figures, ok = {}, True
    for name, got, of_eager, right in zip(("y", "dx", "da", "db"), made, eager, exact, strict=True):
        eager_error = budget.error(of_eager, right)
        least = budget.HALVES if name in ("da", "db") else 0.0  # the adapters are float32
        limit = max(budget.EAGER * eager_error, least)
        limit += budget.ULPS[got.dtype] * torch.finfo(got.dtype).eps
        figures[name] = {"error": budget.error(got.detach(), right), "eager": eager_error, "allowed": limit}
        ok &= figures[name]["error"] <= limit
    return {"ok": ok, **figures}


def by_autograd(budget, x, weight, a, b, dy, scaling) -> list[Tensor]:
    """y, dx, da, db of the formula in x's dtype."""
    x, a, b = (t.clone().requires_grad_() for t in (x, a, b))
    y = budget.eager_lora_linear(x, weight, None, a, b, scaling)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]


def _tests_budget():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import budget

    return budget
