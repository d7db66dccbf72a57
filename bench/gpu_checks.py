"""What only a GPU can show, beside speed: the same bits call after call, graphs, large tensors, memory errors.

Each section is a generator of (name, figures); a figure "ok" says whether it is as it should be. Sizes of a dry run are
tiny and go through Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from measure import relative_error
from torch import Tensor, nn

import lora_fast as lf
from lora_fast.kernels import tiles

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("fused", "cublas")
Figures = Iterator[tuple[str, dict]]


class Options(NamedTuple):
    """``seconds``: the section's budget."""

    dry_run: bool
    device: torch.device
    seconds: float


def layer(d_in: int, d_out: int, r: int, dropout: float, device: torch.device) -> lf.LoRALinear:
    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out, bias=False, device=device, dtype=torch.bfloat16)
    module = lf.LoRALinear.from_linear(linear, r=r, alpha=2 * r, dropout=dropout)
    nn.init.normal_(module.lora_B, std=0.02)
    return module


def forward_backward(module: lf.LoRALinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, da, db."""
    for t in (x, module.lora_A, module.lora_B):
        t.grad = None
    y = module(x)
    y.backward(dy)
    return [y, x.grad, module.lora_A.grad, module.lora_B.grad]


def rows(n: int, d: int, device: torch.device) -> Tensor:
    return torch.randn(n, d, device=device).bfloat16()


# ---- Error budgets


def errors(options: Options) -> Figures:
    """The layer in bfloat16 against float64: each error within the budget that the tests hold it to."""
    sys.path.insert(0, str(ROOT / "tests"))
    import budget

    large = ((8192, 4096, 4096, 16), (8192, 4096, 4096, 64), (8192, 4096, 14336, 16), (777, 1001, 1337, 5))
    for n, d_in, d_out, r in ((33, 40, 24, 3),) if options.dry_run else large:
        module = layer(d_in, d_out, r, 0.0, options.device)
        x, dy = rows(n, d_in, options.device).requires_grad_(), rows(n, d_out, options.device)
        names = ("y", "dx", "da", "db")
        wide = [t.detach().double() for t in (x, module.weight, module.lora_A, module.lora_B, dy)]
        exact = _by_autograd(budget, *wide, module.scaling)
        eager = _by_autograd(budget, x.detach(), module.weight, module.lora_A, module.lora_B, dy, module.scaling)
        allowed = [budget.error(t, right) for t, right in zip(eager, exact, strict=True)]
        for strategy in STRATEGIES:
            with lf.set_backend("triton"), tiles.assume(strategy=strategy):
                made = forward_backward(module, x, dy)
            figures, ok = {}, True
            for name, got, right, of_eager in zip(names, made, exact, allowed, strict=True):
                limit = budget.EAGER * of_eager + budget.ULPS[torch.bfloat16] * torch.finfo(torch.bfloat16).eps
                figures[name] = {"error": budget.error(got.detach(), right), "eager": of_eager, "allowed": limit}
                ok &= figures[name]["error"] <= limit
            yield f"{n} tokens, {d_in}→{d_out}, r={r}, {strategy}", {"ok": ok, **figures}


def _by_autograd(budget, x, weight, a, b, dy, scaling) -> list[Tensor]:
    """y, dx, da, db of the formula in x's dtype."""
    x, a, b = (t.detach().clone().requires_grad_() for t in (x, a, b))
    y = budget.eager_lora_linear(x, weight.detach(), None, a, b, scaling)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]


# ---- Repeats


def repeats(options: Options) -> Figures:
    """1,000 calls on the same inputs give the same bits."""
    n, d, count = (16, 16, 1) if options.dry_run else (2048, 4096, 1000)
    x, dy = rows(n, d, options.device).requires_grad_(), rows(n, d, options.device)
    for dropout in (0.0, 0.1):
        module = layer(d, d, 16, dropout, options.device)
        for strategy in STRATEGIES:

            def run(module=module):
                torch.manual_seed(7)  # of the mask
                return [t.detach() for t in forward_backward(module, x, dy)]

            with lf.set_backend("triton"), tiles.assume(strategy=strategy):
                yield f"layer, {strategy}, dropout {dropout:g}", _differing(run, count)
    shapes = [(d, d)] if options.dry_run else [(d, d), (d, 3 * d)] * 2
    pairs = [(torch.randn(16, m, device=options.device), torch.randn(k, 16, device=options.device)) for m, k in shapes]

    def step() -> list[Tensor]:
        own = [(nn.Parameter(a.clone()), nn.Parameter(b.clone()), 2.0) for a, b in pairs]
        for (a, b, _), grads in zip(own, pairs, strict=True):
            a.grad, b.grad = grads
        lf.optim.LoRAAdamW(own, methods=lf.methods.PiLoRA()).step()
        return [p.detach() for pair in own for p in pair[:2]]

    with lf.set_backend("triton"):
        yield "optimizer step, PiLoRA", _differing(step, count)


def _differing(run: Callable[[], list[Tensor]], count: int) -> dict:
    first = [t.clone() for t in run()]
    differing = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(count):
        same = [(a == b).all() for a, b in zip(first, run(), strict=True)]
        differing += ~torch.stack(same).all()
    return {"ok": differing.item() == 0, "runs": count, "differing": differing.item()}


# ---- CUDA graphs


@contextlib.contextmanager
def _captured(device: torch.device, replays: list[Callable]):
    """What runs inside is captured; ``replays`` gets the function that runs it again. A dry run captures nothing."""
    if device.type != "cuda":
        yield
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):  # a kernel may be compiled at its first capture
        yield
    replays.append(graph.replay)


def graphs(options: Options) -> Figures:
    """A captured call replays to the bits of an eager one: the layer, and a step of every method."""
    d, n = (16, 16) if options.dry_run else (1024, 512)
    x, dy = rows(n, d, options.device).requires_grad_(), rows(n, d, options.device)
    for strategy in STRATEGIES:
        with lf.set_backend("triton"), tiles.assume(strategy=strategy):
            yield f"layer, {strategy}", _attempt(lambda: _layer_graph(d, x, dy, options.device))
    names = [name for name in lf.methods.__all__ if name != "compose"]
    for name in ["AdamW", *names]:
        yield f"step, {name}", _attempt(lambda name=name: _step_graph(name, d, options.device))


def _attempt(run: Callable[[], dict]) -> dict:
    try:
        return run()
    except Exception as error:  # a failure of one is a result, and the others go on
        return {"ok": False, "error": f"{type(error).__name__}: {str(error)[:400]}"}


def _layer_graph(d: int, x: Tensor, dy: Tensor, device: torch.device) -> dict:
    module, dropped = layer(d, d, 16, 0.0, device), layer(d, d, 16, 0.5, device)
    eager = [t.detach().clone() for t in forward_backward(module, x, dy)]
    dropped(x)
    replays: list[Callable] = []
    with _captured(device, replays):
        made = forward_backward(module, x, dy)
    with _captured(device, replays):
        y = dropped(x)
    if not replays:
        return {"ok": all(torch.equal(a, b) for a, b in zip(eager, made, strict=True)), "captured": False}
    replays[0]()
    same = all(torch.equal(a, b) for a, b in zip(eager, made, strict=True))
    replays[1]()
    first = y.clone()
    replays[1]()
    fresh = not torch.equal(first, y)
    return {"ok": same and fresh, "captured": True, "replay equals eager": same, "replays draw new masks": fresh}


def _step_graph(name: str, d: int, device: torch.device) -> dict:
    """Some steps eagerly, then as many eagerly or replayed: the same parameters."""
    results, captured, steps = [], False, 3 if device.type == "cuda" else 1
    for capture in (False, True):
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *shape, generator=generator: torch.randn(*shape, generator=generator, device=device)
        own = []
        r = min(16, d // 4)
        for m, k in ((d, d), (d, d // 2))[: 1 if device.type == "cpu" else 2]:
            a, b = nn.Parameter(draw(r, m) / m**0.5), nn.Parameter(draw(k, r) / 10)
            a.grad, b.grad = draw(r, m) / 100, draw(k, r) / 100
            own.append((a, b, 2.0, draw(k, m)))
        with lf.set_backend("triton"):
            options = {"interval": 1} if name == "ScaLoRA" else {}  # its interval is counted by the host
            methods = () if name == "AdamW" else getattr(lf.methods, name)(**options)
            optimizer = lf.optim.LoRAAdamW(own, lr=1e-3, methods=methods)
            for _ in range(steps):
                optimizer.step()
            replays: list[Callable] = []
            if capture:
                with _captured(device, replays):
                    optimizer.step()
            captured = bool(replays)
            for _ in range(steps - (capture and not captured)):
                (replays[0] if captured else optimizer.step)()
        results.append([t.detach().clone() for pair in own for t in (*pair[:2], pair[3])])
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return {"ok": same, "captured": captured, "replay equals eager": same}


# ---- Large tensors, and all kernels once


def large(options: Options) -> Figures:
    """One tensor beyond 2³¹ elements per kernel family: its last rows, the only ones that are not zero, are right."""
    elements, d = (1 << 10, 32) if options.dry_run else ((1 << 31) + 1, 4096)
    with lf.set_backend("triton"):
        for name, family in FAMILIES.items():
            figures = _attempt(lambda family=family: _judged(*family(elements, d, options.device)))
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
            yield name, figures


ULPS = {torch.bfloat16: 4, torch.float32: 1024}  # a wrong address is wrong by far more


def _judged(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict:
    """Relative L2 errors in units in the last place, the largest of them."""
    ok, largest = True, 0.0
    for name, right in want.items():
        error = relative_error(got[name], right.double())
        ok &= error <= ULPS[got[name].dtype] * torch.finfo(got[name].dtype).eps
        largest = max(largest, error)
    return {"ok": ok, "largest error": largest}


TAIL = 64


def _tall(elements: int, d: int, device: torch.device) -> Tensor:
    """(n, d), more than ``elements`` in all, zero but for the last rows."""
    x = torch.zeros(elements // d + TAIL + 1, d, dtype=torch.bfloat16, device=device)
    x[-TAIL:] = rows(TAIL, d, device)
    return x


def _thin(n: int, device: torch.device) -> Tensor:
    """(n, 16), zero but for the last rows."""
    return _tall((n - TAIL - 1) * 16, 16, device)


def project(elements: int, d: int, device: torch.device):
    from lora_fast.kernels import layer as ops

    x, a = _tall(elements, d, device), rows(16, d, device)
    return {"s": ops.project(x, a)[-TAIL:]}, {"s": x[-TAIL:].double() @ a.double().T}


def linear(strategy: str, elements: int, d: int, device: torch.device):
    from lora_fast.kernels import layer as ops

    x, weight, b = _tall(elements, d, device), rows(d, d, device), rows(d, 16, device)
    s = _thin(len(x), device)
    with tiles.assume(strategy=strategy):
        y = ops.linear(x, weight, None, s, b, 2.0)[-TAIL:]
    return {"y": y}, {"y": x[-TAIL:].double() @ weight.double().T + 2 * (s[-TAIL:].double() @ b.double().T)}


def grads(elements: int, d: int, device: torch.device):
    from lora_fast.kernels import layer as ops

    dy, b = _tall(elements, d, device), rows(d, 16, device)
    s = _thin(len(dy), device)
    ds, db = ops.grad_s_b(dy, s, b, 2.0)
    da = ops.grad_a(dy, s, b.T.contiguous())
    tail_dy, tail_s = dy[-TAIL:].double(), s[-TAIL:].double()
    want = {"ds": 2 * (tail_dy @ b.double()), "db": 2 * (tail_dy.T @ tail_s), "da": tail_s.T @ tail_dy}
    return {"ds": ds[-TAIL:], "db": db, "da": da}, want


def gram(elements: int, d: int, device: torch.device):
    from lora_fast.kernels import gram as ops

    b = _tall(elements, 16, device)
    small = rows(16, d, device)
    return {"kb": ops.gram([small], [b]).kb[0]}, {"kb": b[-TAIL:].double().T @ b[-TAIL:].double()}


def step(elements: int, d: int, device: torch.device):
    from lora_fast.kernels import step as ops

    p, g = (_tall(elements, 16, device) for _ in range(2))
    m, v = (torch.zeros_like(p) for _ in range(2))
    own = nn.Parameter(p[-TAIL:].float())
    own.grad = g[-TAIL:].float()
    torch.optim.AdamW([own], lr=1e-1, weight_decay=0.0).step()
    hyper = torch.tensor([[1e-1, 0.9, 0.999, 1e-8, 0.0]], dtype=torch.float64, device=device)
    ops.step_([(p, g, m, v)], [False], hyper, torch.zeros(1, device=device))
    return {"p": p[-TAIL:]}, {"p": own.detach()}


def transform(elements: int, d: int, device: torch.device):
    from lora_fast.kernels import step as ops

    b, matrix = _tall(elements, 16, device), torch.randn(1, 16, 16, device=device)
    want = b[-TAIL:].double() @ matrix[0].double()
    ops.transform_([b], [False], matrix)
    return {"b": b[-TAIL:]}, {"b": want}


def merge(elements: int, d: int, device: torch.device):
    from lora_fast.kernels import merge as ops

    weight, a = _tall(elements, d, device), rows(16, d, device)
    b = _thin(len(weight), device)
    want = weight[-TAIL:].double() + b[-TAIL:].double() @ a.double()
    ops.merge_([weight], [a], [b], torch.ones(1, 16, device=device))
    return {"w": weight[-TAIL:]}, {"w": want}


def _matrices(elements: int, device: torch.device) -> Tensor:
    """(n, 16, 16), I but for the last."""
    r = 16
    matrices = torch.eye(r, device=device).repeat(max(2, elements // r**2 + 2), 1, 1)
    factor = torch.randn(r, r, device=device) / 4
    matrices[-1] += factor @ factor.T
    return matrices


def spd_solve(elements: int, d: int, device: torch.device):
    from lora_fast.kernels import solve as ops

    matrices, damping = _matrices(elements, device), 0.5
    want = torch.linalg.inv(matrices[-1].double() + damping * torch.eye(16, device=device))
    return {"x": ops.spd_inverse(matrices, damping)[-1]}, {"x": want}


def small_inverse(elements: int, d: int, device: torch.device):
    from lora_fast.kernels import inverse as ops

    matrices = _matrices(elements, device)
    return {"x": ops.small_inverse(matrices)[-1]}, {"x": torch.linalg.inv(matrices[-1].double())}


def hadamard(elements: int, d: int, device: torch.device):
    from lora_fast import reference_scalora, reference_step
    from lora_fast.kernels import hadamard as ops

    a, b, da, db = (torch.randn(1, *shape, device=device) for shape in ((16, d), (d, 16)) * 2)
    last = reference_step.grams(a, b, da, db)
    stacks = [_matrices(elements, device) for _ in last]
    for stack, gram in zip(stacks, last, strict=True):
        stack[-1] = gram[0]
    want = reference_scalora.scalora_solve(*(stack[-1:].double() for stack in stacks), "nnls")[0]
    return {"x": ops.scalora_solve(*stacks, "nnls")[0][-1:]}, {"x": want}


def cayley(elements: int, d: int, device: torch.device):
    """Orthonormal, and the last columns as the formula has them."""
    free_b = torch.zeros(elements // 16 + TAIL + 1, 16, device=device)
    free_b[-TAIL:] = torch.randn(TAIL, 16, device=device) / 16
    free_a = torch.randn(16, d, device=device) / d**0.5
    _, b = lf.functional.cayley(free_a, free_b)
    a1, a2, tail = free_a[:, :16].double(), free_a[:, 16:].double(), free_b[-TAIL:].double()
    eye = torch.eye(16, device=device, dtype=torch.float64)
    inverse = torch.linalg.inv(eye + a1.T - a1 + a2 @ a2.T + tail.T @ tail)
    return {"b": b[-TAIL:]}, {"b": -2 * tail @ inverse}


FAMILIES: dict[str, Callable] = {
    "project": project,
    "linear, fused": lambda *args: linear("fused", *args),
    "linear, cublas": lambda *args: linear("cublas", *args),
    "grads": grads,
    "gram": gram,
    "step": step,
    "transform": transform,
    "merge": merge,
    "spd_solve": spd_solve,
    "small_inverse": small_inverse,
    "hadamard": hadamard,
    "cayley": cayley,
}


def families(options: Options) -> Figures:
    """Every kernel family once at small, odd sizes: what runs under the memory checker."""
    with lf.set_backend("triton"):
        for name in ("project",) if options.dry_run else FAMILIES:
            d = 32 if options.dry_run else 264
            yield name, _attempt(lambda name=name, d=d: _judged(*FAMILIES[name](1000, d, options.device)))


def memcheck(options: Options) -> Figures:
    """compute-sanitizer's memcheck over every kernel family; without it, they run alone."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    program = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--section", "families"]
    command = program + (["--dry-run"] if options.dry_run else [])
    if tool and not options.dry_run:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    # each tensor an allocation of its own, so that a byte beyond its end is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds - 5, env=environment)
    output = done.stdout + done.stderr
    checked = "compute-sanitizer" if tool and not options.dry_run else "not installed: no memory was checked"
    ok = done.returncode == 0 if tool or done.returncode else None
    yield "compute-sanitizer", {"ok": ok, "checked by": checked, "tail": output[-1500:]}


# ---- The test suite


def suite(options: Options) -> Figures:
    """The whole test suite natively, a process for each file, several at a time."""
    found = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    if options.dry_run:
        found = [ROOT / "tests" / "test_traffic.py"]
    try:
        import pytest  # noqa: F401
    except ImportError:
        yield "pytest", {"ok": False, "error": "pytest is not installed here: the suite has not run"}
        return
    end = time.monotonic() + options.seconds
    with ThreadPoolExecutor(max_workers=max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        for path, figures in zip(found, pool.map(lambda path: _tests_of(path, end, options), found), strict=True):
            yield path.name, figures


def _tests_of(path: Path, end: float, options: Options) -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(path)]
    if options.dry_run:
        command += ["-k", "masked"]
    try:
        left = max(1.0, end - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, cwd=path.parent)
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode(errors="replace")
        return {"ok": None if "F" not in output else False, "error": "out of time", "tail": output[-300:]}
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", done.stdout)}
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    tail = "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]
    # 5: nothing collected, a file that says it has nothing to do on a GPU
    return {"ok": done.returncode in (0, 5), **counts, "failures": failures[:20], "tail": tail}
