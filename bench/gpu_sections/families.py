"""Every kernel family, called once on a tensor of a given size: what ``large`` runs beyond 2³¹ elements, ``errors`` at
several ranks, and what the memory checker watches at small, odd sizes. A family takes (elements, d, r, device) and
returns what came out and what should have. The tensor is zero (or a stack of I) but for its end, where a wrong address
shows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lora_fast as lf
from gpu_sections.layer_inputs import rows
from gpu_sections.section import Jobs, Options
from lora_fast.kernels import tiles
from suite.comparison import relative_error


def large(options: Options) -> Jobs:
    """One tensor beyond 2³¹ elements per kernel family: its last rows, the only ones that are not zero, are right."""
    elements, d = ((1 << 31) + 1, 4096) if options.mode == "device" else (1 << 10, 32 if options.tiny else 4096)
    return of_families(options, elements, d)


def families(options: Options) -> Jobs:
    """Every kernel family once at small, odd sizes: what runs under the memory checker."""
    jobs = of_families(options, 1000, 32 if options.tiny else 264)
    return [job for job in jobs if job[0] == "project"] if options.tiny else jobs


def of_families(options: Options, elements: int, d: int) -> Jobs:
    """Each of them once, the GEMM by each strategy that runs on the device."""
    strategies = tiles.strategies(options.device, torch.bfloat16, d)
    known = {f"linear, {name}": functools.partial(linear, name) for name in strategies} | FAMILIES
    return [(name, functools.partial(judged, of, elements, d, RANK, options.device)) for name, of in known.items()]


RANK = 16
ULPS = {torch.bfloat16: 0.5, torch.float32: 1024}  # a wrong address is wrong by far more
TAIL = 64


def judged(family: Callable, elements: int, d: int, r: int, device: torch.device) -> dict:
    """Returns the largest relative L2 error of a family's results, and those that are not allowed."""
    with lf.set_backend("triton"):
        got, want = family(elements, d, r, device)
    largest, wrong = 0.0, []
    for name, right in want.items():
        error, allowed = (
            relative_error(got[name], right.double()),
            ULPS[got[name].dtype] * torch.finfo(got[name].dtype).eps,
        )
        largest = max(largest, error)
        wrong += [] if error <= allowed else [f"{name}: {error:.2e}, allowed {allowed:.2e}"]
    return {"ok": not wrong, "largest error": largest, **({"error": "; ".join(wrong)} if wrong else {})}


def _tall(elements: int, d: int, device: torch.device) -> Tensor:
    """(n, d), more than ``elements`` in all, zero but for the last rows."""
    x = torch.zeros(elements // d + TAIL + 1, d, dtype=torch.bfloat16, device=device)
    x[-TAIL:] = rows(TAIL, d, device)
    return x


def _thin(n: int, r: int, device: torch.device) -> Tensor:
    """(n, r), zero but for the last rows."""
    return _tall((n - TAIL - 1) * r, r, device)


def project(elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels import linear as ops

    x, a = _tall(elements, d, device), rows(r, d, device)
    return {"s": ops.project(x, a)[-TAIL:]}, {"s": x[-TAIL:].double() @ a.double().T}


def linear(strategy: str, elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels import linear as ops

    x, weight, b = _tall(elements, d, device), rows(d, d, device), rows(d, r, device)
    s = _thin(len(x), r, device)
    with tiles.assume(strategy=strategy):
        y = ops.linear(x, weight, None, s, b, 2.0)[-TAIL:]
    return {"y": y}, {"y": x[-TAIL:].double() @ weight.double().T + 2 * (s[-TAIL:].double() @ b.double().T)}


def grads(elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels import linear as ops

    dy, b = _tall(elements, d, device), rows(d, r, device)
    s = _thin(len(dy), r, device)
    ds, db = ops.grad_s_b(dy, s, b, 2.0)
    da = ops.grad_a(dy, s, b.T.contiguous())
    tail_dy, tail_s = dy[-TAIL:].double(), s[-TAIL:].double()
    want = {"ds": 2 * (tail_dy @ b.double()), "db": 2 * (tail_dy.T @ tail_s), "da": tail_s.T @ tail_dy}
    return {"ds": ds[-TAIL:], "db": db, "da": da}, want


def gram(elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels.pairs import gram as ops

    b = _tall(elements, r, device)
    small = rows(r, d, device)
    return {"kb": ops.gram([small], [b]).kb[0]}, {"kb": b[-TAIL:].double().T @ b[-TAIL:].double()}


def step(elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels.pairs import adamw as ops

    p, g = (_tall(elements, r, device) for _ in range(2))
    m, v = (torch.zeros_like(p) for _ in range(2))
    own = nn.Parameter(p[-TAIL:].float())
    own.grad = g[-TAIL:].float()
    torch.optim.AdamW([own], lr=1e-1, weight_decay=0.0).step()
    hyper = torch.tensor([[1e-1, 0.9, 0.999, 1e-8, 0.0]], dtype=torch.float64, device=device)
    ops.step_([(p, g, m, v)], [False], hyper, torch.zeros(1, device=device))
    return {"p": p[-TAIL:]}, {"p": own.detach()}


def transform(elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels.pairs import transform as ops

    b, matrix = _tall(elements, r, device), torch.randn(1, r, r, device=device)
    want = b[-TAIL:].double() @ matrix[0].double()
    ops.transform_([b], [False], matrix)
    return {"b": b[-TAIL:]}, {"b": want}


def merge(elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels.pairs import add_low_rank as ops

    weight, a = _tall(elements, d, device), rows(r, d, device)
    b = _thin(len(weight), r, device)
    want = weight[-TAIL:].double() + b[-TAIL:].double() @ a.double()
    ops.add_low_rank_([weight], [a], [b], torch.ones(1, r, device=device))
    return {"w": weight[-TAIL:]}, {"w": want}


def _matrices(elements: int, r: int, device: torch.device) -> Tensor:
    """(n, r, r), I but for the last."""
    matrices = torch.eye(r, device=device).repeat(max(2, elements // r**2 + 2), 1, 1)
    factor = torch.randn(r, r, device=device) / r**0.5
    matrices[-1] += factor @ factor.T
    return matrices


def spd_solve(elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels.linalg import spd as ops

    matrices, damping = _matrices(elements, r, device), 0.5
    want = torch.linalg.inv(matrices[-1].double() + damping * torch.eye(r, device=device))
    return {"x": ops.spd_inverse(matrices, damping)[-1]}, {"x": want}


def small_inverse(elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels.linalg import inverse as ops

    matrices = _matrices(elements, r, device)
    return {"x": ops.small_inverse(matrices)[-1]}, {"x": torch.linalg.inv(matrices[-1].double())}


def hadamard(elements: int, d: int, r: int, device: torch.device):
    from lora_fast.kernels.pairs import scalora_system as ops
    from lora_fast.ops.reference import pairs as reference
    from lora_fast.ops.reference import scalora_solution

    a, b, da, db = (torch.randn(1, *shape, device=device) for shape in ((r, d), (d, r)) * 2)
    last = reference.grams(a, b, da, db)
    stacks = [_matrices(elements, r, device) for _ in last]
    for stack, gram in zip(stacks, last, strict=True):
        stack[-1] = gram[0]
    want = scalora_solution.scalora_solve(*(stack[-1:].double() for stack in stacks), "nnls")[0]
    return {"x": ops.scalora_solve(*stacks, "nnls")[0][-1:]}, {"x": want}


def cayley(elements: int, d: int, r: int, device: torch.device):
    """Orthonormal, and the last columns as the formula has them."""
    free_b = torch.zeros(elements // r + TAIL + 1, r, device=device)
    free_b[-TAIL:] = torch.randn(TAIL, r, device=device) / r
    free_a = torch.randn(r, d, device=device) / d**0.5
    _, b = lf.functional.cayley(free_a, free_b)
    a1, a2, tail = free_a[:, :r].double(), free_a[:, r:].double(), free_b[-TAIL:].double()
    eye = torch.eye(r, device=device, dtype=torch.float64)
    inverse = torch.linalg.inv(eye + a1.T - a1 + a2 @ a2.T + tail.T @ tail)
    return {"b": b[-TAIL:]}, {"b": -2 * tail @ inverse}


FAMILIES: dict[str, Callable] = {
    "project": project,
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
