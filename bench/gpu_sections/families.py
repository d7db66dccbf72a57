"""Calls every kernel family once on a tensor of a given size.

The section ``large`` runs the families beyond 2³¹ elements, ``errors`` at several ranks, and the memory checker watches
them at small, odd sizes. A family takes (elements, d, r, device) and returns the results and the expected values. Its
tensor is zero (or a stack of I) except at the end, where a wrong address shows.
"""

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
    """Checks every kernel family on a tensor of more than 2³¹ elements, of which only the last rows are not zero."""
    elements, d = ((1 << 31) + 1, 4096) if options.mode == "device" else (1 << 10, 32 if options.tiny else 4096)
    return of_families(options, elements, d)


def families(options: Options) -> Jobs:
    """Runs every kernel family once at small, odd sizes, for the memory checker."""
    jobs = of_families(options, 1000, 32 if options.tiny else 264)
    return [job for job in jobs if job[0] == "project"] if options.tiny else jobs


def of_families(options: Options, elements: int, d: int) -> Jobs:
    """Returns a job for each family, with the GEMM once by each strategy that runs on the device."""
    strategies = tiles.strategies(options.device, torch.bfloat16, d)
    gemms = {f"linear, {name}": functools.partial(linear, name) for name in strategies}
    return [
        (name, functools.partial(judged, family, elements, d, RANK, options.device))
        for name, family in (gemms | FAMILIES).items()
    ]


RANK = 16
ULPS = {torch.bfloat16: 0.5, torch.float32: 1024}  # a wrong address causes far larger errors
TAIL = 64  # last rows, the ones that are not zero


def judged(family: Callable, elements: int, d: int, r: int, device: torch.device) -> dict:
    """Returns the largest relative L2 error of a family's results, and the errors beyond the allowed ones."""
    with lf.set_backend("triton"):
        got, want = family(elements, d, r, device)
    largest, wrong = 0.0, []
    for name, right in want.items():
        error = relative_error(got[name], right.double())
        allowed = ULPS[got[name].dtype] * torch.finfo(got[name].dtype).eps
        largest = max(largest, error)
        wrong += [] if error <= allowed else [f"{name}: {error:.2e}, allowed {allowed:.2e}"]
    return {"ok": not wrong, "largest error": largest, **({"error": "; ".join(wrong)} if wrong else {})}


def _tall(elements: int, d: int, device: torch.device) -> Tensor:
    """Returns (n, d) with more than ``elements`` elements, zero except for the last rows."""
    x = torch.zeros(elements // d + TAIL + 1, d, dtype=torch.bfloat16, device=device)
    x[-TAIL:] = rows(TAIL, d, device)
    return x


def _thin(n: int, r: int, device: torch.device) -> Tensor:
    """Returns (n, r), zero except for the last rows."""
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
    expected = nn.Parameter(p[-TAIL:].float())
    expected.grad = g[-TAIL:].float()
    torch.optim.AdamW([expected], lr=1e-1, weight_decay=0.0).step()
    hyper = torch.tensor([[1e-1, 0.9, 0.999, 1e-8, 0.0]], dtype=torch.float64, device=device)
    ops.step_([(p, g, m, v)], [False], hyper, torch.zeros(1, device=device))
    return {"p": p[-TAIL:]}, {"p": expected.detach()}


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
    """Returns (n, r, r), the identity except for the last matrix."""
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
    """Computes the last rows of b, which depend on the whole Gram of the free b."""
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
