"""Checks that repeated calls give the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lora_fast as lf
from gpu_sections.layer_inputs import forward_backward, layer, rows
from gpu_sections.section import Jobs, Options
from lora_fast.kernels import tiles
from suite.ops.providers import backend


def repeats(options: Options) -> Jobs:
    """Checks that 100 calls on the same inputs give the same bits."""
    n, d = (16, 16) if options.tiny else (2048, 4096)
    count, jobs = 100 if options.mode == "device" else 1, []
    for dropout in (0.0, 0.1):
        for strategy in (None, *tiles.strategies(options.device, torch.bfloat16, d)):
            job = functools.partial(of_layer, n, d, dropout, strategy, count, options.device)
            jobs.append((f"layer, {strategy or 'by estimate'}, dropout {dropout:g}", job))
    shapes = [(d, d)] if options.tiny else [(d, d), (d, 3 * d)] * 2
    return [*jobs, ("optimizer step, PiLoRA", functools.partial(of_step, shapes, count, options.device))]


def of_layer(n: int, d: int, dropout: float, strategy: str | None, count: int, device: torch.device) -> dict:
    x, dy = rows(n, d, device).requires_grad_(), rows(n, d, device)
    module = layer(d, d, 16, dropout, device)

    def run() -> list[Tensor]:
        torch.manual_seed(7)  # every call draws the same dropout mask
        return [t.detach() for t in forward_backward(module, x, dy)]

    with backend("triton", strategy):
        return differing(run, count)


def of_step(shapes: list[tuple[int, int]], count: int, device: torch.device) -> dict:
    pairs = [(torch.randn(16, m, device=device), torch.randn(k, 16, device=device)) for m, k in shapes]

    def run() -> list[Tensor]:
        trained = [(nn.Parameter(a.clone()), nn.Parameter(b.clone()), 2.0) for a, b in pairs]
        for (a, b, _), grads in zip(trained, pairs, strict=True):
            a.grad, b.grad = grads
        lf.optim.LoRAAdamW(trained, methods=lf.methods.PiLoRA()).step()
        return [p.detach() for pair in trained for p in pair[:2]]

    with lf.set_backend("triton"):
        return differing(run, count)


def differing(run: Callable[[], list[Tensor]], count: int) -> dict:
    """Compares ``count`` runs with the results of a first one."""
    first = [t.clone() for t in run()]
    differing_runs = torch.zeros((), dtype=torch.int64, device=first[0].device)  # read once, at the end: no run waits
    for _ in range(count):
        same = [(a == b).all() for a, b in zip(first, run(), strict=True)]
        differing_runs += ~torch.stack(same).all()
    return {"ok": differing_runs.item() == 0, "runs": count, "differing": differing_runs.item()}
