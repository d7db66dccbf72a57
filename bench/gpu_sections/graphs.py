"""Checks CUDA graphs: a captured call replays to the bits of an eager call. A dry run captures nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lora_fast as lf
from gpu_sections.layer_inputs import forward_backward, layer, rows
from gpu_sections.section import Jobs, Options
from lora_fast.kernels import tiles
from suite.comparison import relative_error
from suite.ops.providers import backend

AGREE = 16 * torch.finfo(torch.bfloat16).eps  # S and dS are rounded to bfloat16; with another mask the error is about 1
WAITING = ("BaLoRA", "LoRARITE", "RefLoRA")  # their steps call torch.linalg, which waits for the device: not capturable


def graphs(options: Options) -> Jobs:
    """Checks that a captured layer, and a step of every method that does not wait, replay to the bits of eager ones."""
    d, n = (16, 16) if options.tiny else (1024, 512)
    jobs = []
    for strategy in (None, *tiles.strategies(options.device, torch.bfloat16, d)):
        name = strategy or "by estimate"
        jobs.append((f"layer, {name}", functools.partial(of_layer, n, d, strategy, options.device)))
        jobs.append((f"dropout, {name}", functools.partial(of_dropout, n, d, strategy, options.device)))
    jobs.append(("layers of one input", functools.partial(of_group, n, d, options.device)))
    for name in ["AdamW", *(name for name in lf.methods.__all__ if name not in ("compose", *WAITING))]:
        jobs.append((f"step, {name}", functools.partial(of_step, name, d, options.device)))
    return [*jobs, ("training step, NB-LoRA", functools.partial(of_norm_bounded, n, d, options.device))]


@contextlib.contextmanager
def captured(device: torch.device, replays: list[Callable]):
    """Captures what runs inside, and appends the function that replays it to ``replays``."""
    if device.type != "cuda":
        yield
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # loading a module while capturing is an error, so kernels must be warmed up
        yield
    replays.append(graph.replay)


def on_a_side_stream(run: Callable[[], object], device: torch.device) -> None:
    """Warms up a call on a side stream, as torch requires before a capture."""
    if device.type != "cuda":
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def captured_layer(module: nn.Module, x: Tensor, dy: Tensor, device: torch.device) -> tuple[list[Tensor], list]:
    """Warms up and captures forward and backward. Returns their results and the replays (none in a dry run)."""
    on_a_side_stream(lambda: forward_backward(module, x, dy), device)
    replays: list[Callable] = []
    with captured(device, replays):
        results = forward_backward(module, x, dy)
    return results, replays


def of_layer(n: int, d: int, strategy: str | None, device: torch.device) -> dict:
    """Replays forward and backward on other values than those of the capture."""
    x, dy, module = rows(n, d, device).requires_grad_(), rows(n, d, device), layer(d, d, 16, 0.0, device)
    with backend("triton", strategy):
        results, replays = captured_layer(module, x, dy, device)
        with torch.no_grad():
            x.copy_(rows(n, d, device))
        for replay in replays:
            replay()
        results = [t.detach().clone() for t in results]  # before forward_backward sets .grad to None
        same = equal(forward_backward(module, x, dy), results) if replays else None
    return {"ok": same is not False, "captured": bool(replays), "replay equals eager": same}


def of_dropout(n: int, d: int, strategy: str | None, device: torch.device) -> dict:
    """Checks that every replay draws a new mask, which forward and backward share: only then da aᵀ = bᵀdb."""
    x, dy, module = rows(n, d, device).requires_grad_(), rows(n, d, device), layer(d, d, 16, 0.5, device)
    with backend("triton", strategy):
        results, replays = captured_layer(module, x, dy, device)
        copies = []
        for _ in range(2):
            for replay in replays:
                replay()
            copies.append([t.detach().clone() for t in results])
    *_, da, db = copies[1]
    error = relative_error(da.double() @ module.lora_A.double().T, module.lora_B.double().T @ db.double())
    fresh = all(not torch.equal(a, b) for a, b in zip(*copies, strict=True)) if replays else None
    ok = fresh is not False and error <= AGREE
    return {"ok": ok, "captured": bool(replays), "replays draw new masks": fresh, "error of the identity": error}


def of_group(n: int, d: int, device: torch.device) -> dict:
    """Replays forward and backward of three layers that read one x on other values than those of the capture."""
    torch.manual_seed(0)
    x, widths = rows(n, d, device).requires_grad_(), (d, d // 2, d // 2)
    layers = nn.ModuleList(nn.Linear(d, width, device=device, dtype=torch.bfloat16) for width in widths)
    lf.inject_(layers, lf.LoRAConfig(r=min(16, d // 4), alpha=16))
    factors, dys = [p for p in layers.parameters() if p.requires_grad], [rows(n, width, device) for width in widths]
    with torch.no_grad():
        for factor in factors:
            factor.normal_(std=0.02)
    replays: list[Callable] = []

    def run() -> list[Tensor]:
        ys = [layer(x) for layer in layers]
        return [*ys, *torch.autograd.grad(ys, [x, *factors], dys)]

    with lf.set_backend("triton"):
        on_a_side_stream(run, device)  # the first backward shows the group, the later ones load its kernels
        with captured(device, replays):
            results = run()
        with torch.no_grad():
            x.copy_(rows(n, d, device))
        for replay in replays:
            replay()
        same = equal(run(), results) if replays else None
    grouped = len(lf.groups(layers).groups) == 1
    return {"ok": same is not False and grouped, "captured": bool(replays), "replay equals eager": same}


def of_step(name: str, d: int, device: torch.device) -> dict:
    """Checks that eager steps followed by replayed steps, or by eager ones, give the same parameters."""
    results, steps = [], 3 if device.type == "cuda" else 1
    replays: list[Callable] = []
    options = {"interval": 1} if name == "ScaLoRA" else {}  # the host counts longer intervals, which a graph cannot
    for capture in (False, True):
        trained = pairs(d, device)
        methods = () if name == "AdamW" else getattr(lf.methods, name)(**options)
        with lf.set_backend("triton"):
            optimizer = lf.optim.LoRAAdamW(trained, lr=1e-3, methods=methods)
            step = optimizer.step
            if device.type == "cuda":
                for _ in range(steps):
                    step()
                if capture:
                    with captured(device, replays):
                        step()
                    (step,) = replays
            for _ in range(steps):
                step()
        results.append([t.detach().clone() for pair in trained for t in (*pair[:2], pair[3])])
    same = equal(*results)
    return {"ok": same, "captured": bool(replays), "replay equals eager": same}


def of_norm_bounded(n: int, d: int, device: torch.device) -> dict:
    """Checks whole training steps of two norm-bounded layers in the same way as ``of_step``.

    A step is forward (with the transform of both layers in it), backward and the optimizer's step.
    """
    results, steps = [], 3 if device.type == "cuda" else 1
    replays: list[Callable] = []
    torch.manual_seed(0)
    x, dy, r = rows(n, d, device), rows(n, d, device), min(16, d // 4)
    for capture in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(d, d, device=device, dtype=torch.bfloat16) for _ in range(2)))
        lf.inject_(model, lf.NBLoRAConfig(r=r))
        optimizer = lf.optim.LoRAAdamW(model, lr=1e-3)

        def train(model=model, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=False)  # a graph needs gradients at fixed addresses
            model(x).backward(dy)
            optimizer.step()

        with lf.set_backend("triton"):
            on_a_side_stream(train, device)
            if capture and device.type == "cuda":
                with captured(device, replays):
                    train()
            for _ in range(steps):
                (replays[0] if capture and replays else train)()
        results.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    same = equal(*results)
    return {"ok": same, "captured": bool(replays), "replay equals eager": same}


def pairs(d: int, device: torch.device) -> list[tuple]:
    """Returns tuples (a, b, scaling, weight) with gradients; every call draws the same values."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    r, drawn = min(16, d // 4), []
    for m, k in ((d, d), (d, d // 2))[: 1 if device.type == "cpu" else 2]:
        a, b = nn.Parameter(draw(r, m) / m**0.5), nn.Parameter(draw(k, r) / 10)
        a.grad, b.grad = draw(r, m) / 100, draw(k, r) / 100
        drawn.append((a, b, 2.0, draw(k, m)))
    return drawn


def equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))
