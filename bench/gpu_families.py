"""Every kernel family, called once on a tensor of a given size: what ``large`` runs beyond 2³¹ elements, and what the
memory checker watches at small, odd sizes. A family takes (elements, d, device) and returns what came out and what
should have. The tensor is zero (or a stack of I) but for its end, where a wrong address shows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from gpu_operands import rows
from gpu_section import Jobs, Options
from measure import relative_error
from torch import Tensor, nn

import lora_fast as lf
from lora_fast.kernels import tiles


def large(options: Options) -> Jobs:
    """One tensor beyond 2³¹ elements per kernel family: its last rows, the only ones that are not zero, are right."""
    elements, d = (1 << 10, 32) if options.dry_run else ((1 << 31) + 1, 4096)
    for name, family in known(options.device, d).items():
        yield name, functools.partial(judged, family, elements, d, options.device)


def families(options: Options) -> Jobs:
    """Every kernel family once at small, odd sizes: what runs under the memory checker."""
    d = 32 if options.dry_run else 264
    for name, family in known(options.device, d).items():
        if name == "project" or not options.dry_run:
            yield name, functools.partial(judged, family, 1000, d, options.device)


ULPS = {torch.bfloat16: 4, torch.float32: 1024}  # a wrong address is wrong by far more
TAIL = 64


def judged(family: Callable, elements: int, d: int, device: torch.device) -> dict:
    """Relative L2 errors in units in the last place, the largest of them."""
    with lf.set_backend("triton"):
        got, want = family(elements, d, device)
    ok, largest = True, 0.0
    for name, right in want.items():
        error = relative_error(got[name], right.double())
        ok &= error <= ULPS[got[name].dtype] * torch.finfo(got[name].dtype).eps
        largest = max(largest, error)
    return {"ok": ok, "largest error": largest}


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


def known(device: torch.device, d: int) -> dict[str, Callable]:
    """Those that run on the device."""
    strategies = tiles.strategies(device, torch.bfloat16, d)
    return {f"linear, {name}": functools.partial(linear, name) for name in strategies} | FAMILIES


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
