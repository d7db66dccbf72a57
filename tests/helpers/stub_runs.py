"""The runs of tests and benchmarks on the stub driver (stub_driver.py), each in a process of its own:

    python tests/helpers/stub_runs.py COMMAND --arch 90

prints one line of JSON. ``make launches`` runs the whole ``launch_matrix``, the test suite a sample of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))
import stub_driver

ARCHS = (90, 80, 89, 120)  # H100, A100, RTX 4090, RTX 5090
DIMENSIONS = {
    "r": (1, 8, 16, 17, 24, 32, 33, 64, 128, 256),
    "adapter": ("bfloat16", "float32", "autocast"),  # "autocast" is float32 in an autocast region
    "dropout": (0.0, 0.1),
    "bias": (False, True),
    "tokens": (1, 17, 512, 8192),
    "strategy": (None, "fused", "cublas"),
}


GROUP_DIMENSIONS = {
    "ranks": ((16, 16, 16), (1, 16, 33), (64, 64), (8, 8, 8, 8), (32, 32, 32, 32), (64, 64, 64, 64), (128, 256)),
    **{name: DIMENSIONS[name] for name in ("adapter", "dropout", "tokens", "strategy")},
}


def matrix(dimensions: dict = DIMENSIONS) -> list[dict]:
    """Returns every combination of the dimensions' values."""
    return [dict(zip(dimensions, values, strict=True)) for values in itertools.product(*dimensions.values())]


def pairwise(dimensions: dict = DIMENSIONS) -> list[dict]:
    """Returns a sample in which every pair of values of two dimensions occurs in one case. It is chosen greedily and is
    always the same."""
    pairs_of = lambda case: set(itertools.combinations(case.items(), 2))
    cases, draw = matrix(dimensions), random.Random(0)
    draw.shuffle(cases)
    missing = set().union(*map(pairs_of, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs_of(case) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def operands(case: dict, d_in: int = 512, d_out: int = 768, dtype=None) -> dict:
    """Returns a layer's tensors. They are zero: the stub's kernels compute nothing, but torch's own products do."""
    import torch

    dtype = dtype or torch.bfloat16
    adapter = torch.float32 if case["adapter"] == "autocast" else getattr(torch, case["adapter"])
    return {
        "x": torch.zeros(case["tokens"], d_in, dtype=dtype, requires_grad=True),
        "weight": torch.zeros(d_out, d_in, dtype=dtype),
        "bias": torch.zeros(d_out, dtype=dtype, requires_grad=True) if case["bias"] else None,
        "lora_A": torch.zeros(case["r"], d_in, dtype=adapter, requires_grad=True),
        "lora_B": torch.zeros(d_out, case["r"], dtype=adapter, requires_grad=True),
    }


def run_layer(tensors: dict, dropout: float, seed: int | None = None, autocast: bool = False) -> None:
    """Runs forward and backward through the public function."""
    import torch

    import lora_fast as lf

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = lf.functional.lora_linear(*tensors.values(), 2.0, dropout, seed)
    trained = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
    torch.autograd.grad(y, trained, torch.zeros_like(y))


def layer_of(case: dict):
    """Returns a function that runs the layer of a case."""
    tensors = operands(case)
    return lambda: run_layer(tensors, case["dropout"], autocast=case["adapter"] == "autocast")


def group_of(case: dict, d_in: int = 512, d_outs: tuple[int, ...] = (768, 256, 256, 16)):
    """Returns a function that runs forward and backward of a group on the kernels' own interface, and its tensors. If
    the members are ``joined``, they have nodes of their own in backward."""
    import torch

    from lora_fast.kernels import linear

    dtype = getattr(torch, case.get("dtype", "bfloat16"))
    adapter = getattr(torch, "float32" if case["adapter"] == "autocast" else case["adapter"])
    offset = lambda name: 4 * (case.get("moved") == name)
    lead = (lambda t: t.unsqueeze(0)) if case.get("lead") else lambda t: t
    x, members, dys = lead(laid_out(case["tokens"], d_in, dtype, case.get("padding", 0), offset("x"))), [], []
    for i, (r, d_out) in enumerate(zip(case["ranks"], d_outs, strict=False)):
        seed = case.get("seed", i)
        weight = laid_out(d_out, d_in, dtype, case.get("weight padding", 0), offset("weight"))
        a, b = laid_out(r, d_in, adapter, 0, offset("a")), laid_out(d_out, r, adapter, 0, offset("b"))
        bias = torch.zeros(d_out, dtype=dtype) if case.get("bias") else None
        keep = linear.draw_mask(x, case["dropout"], seed) if case["dropout"] else None
        members.append((weight, bias, a, b, 2.0, keep))
        dys.append(lead(laid_out(case["tokens"], d_out, dtype, 0, offset("dy"))))
    dys = [None if i in case.get("unused", ()) else dy for i, dy in enumerate(dys)]
    n = len(members)
    needs, rounded = case.get("needs", (True, [True] * n, [True] * n)), case["adapter"] == "autocast"

    def call():
        _, ss = linear.group_forward(x, members, rounded)
        if not case.get("joined"):
            linear.group_backward(dys, x, ss, members, rounded, needs)
            return
        parts = []
        for dy, s, (weight, _, a, b, scaling, keep) in zip(dys, ss, members, strict=True):
            ds, *_ = linear.thin_gradients(dy, x, s, a, b, scaling, keep, rounded, (True, True, True))
            parts.append((dy, weight, ds, a, keep))
        linear.group_grad_x(x, parts)

    return call, [t for t in (x, *dys, *(t for member in members for t in member)) if isinstance(t, torch.Tensor)]


def launch_matrix(stub: stub_driver.Stub, cases: list[dict], of_case=layer_of) -> dict:
    """Runs each case forward and backward, by plans unless a strategy is assumed. Returns the failures with their
    errors, and the launches by plan whose kernels use a stack, that is, spill."""
    from contextlib import nullcontext

    from lora_fast.kernels import tiles

    failures, launches, kernels, spilling = [], 0, set(), {}
    for case in cases:
        assumed = tiles.assume(arch=stub.card.arch, strategy=case["strategy"]) if case["strategy"] else nullcontext()
        try:
            run = of_case(case)
            with assumed, stub.recorded() as launched:
                for _ in range(2):
                    run()
            launches += len(launched)
            kernels |= {(launch.kernel, launch.cubin) for launch in launched}
            if not case["strategy"]:
                again = launched[len(launched) // 2 :]
                spilling |= {f"{launch.kernel} {case}": launch.stack for launch in again if launch.stack}
        except Exception as error:  # whatever it is, it is this case's failure
            failures.append(case | {"error": f"{type(error).__name__}: {error}"[:500]})
    counts = {"cases": len(cases), "launches": launches, "kernels": len(kernels)}
    return {"card": stub.card.name, **counts, "failures": failures, "spilling": spilling}


GROUP_CHANGES = [
    {}, {"tokens": 1}, {"tokens": 40}, {"tokens": 1023}, {"lead": True}, {"ranks": (64, 64)}, {"ranks": (16,) * 4},
    {"ranks": (1, 16, 40)}, {"dtype": "float16", "adapter": "float16"}, {"dtype": "float32", "adapter": "float32"},
    {"adapter": "bfloat16"}, {"adapter": "autocast"}, {"padding": 8}, {"padding": 3}, {"weight padding": 16},
    {"bias": True}, {"dropout": 0.1}, {"dropout": 0.5, "seed": 1 << 39}, {"unused": (0,)}, {"unused": (1, 2)},
    {"needs": (False, [True] * 3, [True] * 3)}, {"needs": (True, [False] * 3, [True] * 3)},
    {"needs": (True, [True, False, True], [False] * 3)},
    *({"moved": name} for name in ("x", "weight", "a", "b", "dy")),
    *({"joined": True} | more for more in ({}, {"lead": True}, {"dropout": 0.1}, {"moved": "dy"}, {"padding": 3})),
    {"joined": True, "ranks": (1, 16, 40)}, {"joined": True, "adapter": "bfloat16"},
]  # fmt: skip


def group_proof(stub: stub_driver.Stub) -> dict:
    """Compares the launches of groups by plans and by Triton's JIT, byte by byte, where one thing at a time differs
    from the first call, which is repeated after each. Returns the differences and the names of the launched kernels."""
    from lora_fast.kernels import launch, linear

    launch.takes_more_registers = lambda *arguments: False  # as in ``plan_proof``
    usual = {"tokens": 8192, "ranks": (16, 16, 16), "adapter": "float32", "dropout": 0.0}
    arena, differences, kernels = Arena(1 << 28), [], []
    for change in GROUP_CHANGES:
        for case in (usual | change, usual):
            call, tensors = group_of(case)
            inputs = {tensor.data_ptr() for tensor in tensors}
            known = lambda address, inputs=inputs: address in inputs or arena.holds(address)
            plan, jit = both_ways(stub, arena, call)
            kernels += [launched.kernel for launched in plan]
            for mine, theirs in itertools.zip_longest(plan, jit):
                if not same(mine, theirs, known):
                    differences.append(f"{case}: {mine} and {theirs}"[:2000])
    usual_launches = [launched.kernel for launched in plan]
    plans = len(linear.signature.plans)
    return {"differences": differences, "kernels": sorted(set(kernels)), "usual": usual_launches, "plans": plans}


FOUR_BIT_CHANGES = [
    {}, {"lead": True}, {"nested": True, "dropout": 0.1}, {"moved": "packed"}, {"tokens": 1}, {"blocksize": 128},
    {"r": 5}, {"r": 64}, {"r": 256}, {"dtype": "float16"}, {"dtype": "float32"}, {"adapter": "bfloat16"},
    {"bias": True}, {"padding": 3}, {"storage": "float32"},
    *({"moved": name} for name in ("left", "absmax", "thin", "factor")),
]  # fmt: skip


def four_bit_of(case: dict, d_in: int = 512, d_out: int = 768):
    """Returns a function that runs both GEMMs over a 4-bit weight, and their tensors."""
    import torch

    from lora_fast.kernels import records
    from lora_fast.kernels.linear import four_bit

    dtype, adapter = (
        getattr(torch, case.get(name, usual)) for name, usual in (("dtype", "bfloat16"), ("adapter", "float32"))
    )
    n, r, nested, blocksize = d_in * d_out, case.get("r", 16), case.get("nested", False), case.get("blocksize", 64)
    tensor = lambda rows, columns, dtype, name=None, padding=0: laid_out(
        rows, columns, dtype, padding, 4 * (case.get("moved") == name)
    )
    flat = lambda count, dtype, name=None: tensor(1, count, dtype, name)[0]
    packed = flat(n // 2, torch.uint8, "packed").view(getattr(torch, case.get("storage", "uint8")))
    sizes = 256, n // blocksize // 256, 1
    second = records.NestedScales(*(flat(count, torch.float32) for count in sizes)) if nested else None
    absmax = flat(n // blocksize, torch.uint8 if nested else torch.float32, "absmax")
    weight = records.FourBit(packed, flat(16, torch.float32), absmax, blocksize, (d_out, d_in), second)
    tokens, padding = case.get("tokens", 8192), case.get("padding", 0)
    x, dy = (tensor(tokens, width, dtype, "left", padding) for width in (d_in, d_out))
    s = tensor(tokens, r, torch.promote_types(dtype, adapter), "thin")
    a, b = tensor(r, d_in, adapter, "factor"), tensor(d_out, r, adapter, "factor")
    bias = flat(d_out, dtype) if case.get("bias") else None
    keep = (1 << 40, 0, 6554) if case.get("dropout") else None
    x, dy = (t.unsqueeze(0) if case.get("lead") else t for t in (x, dy))

    def call():
        four_bit.four_bit_linear(x, weight, bias, s, b, 2.0)
        four_bit.four_bit_grad_x(dy, weight, s, a, keep)

    return call, [t for t in (x, dy, s, a, b, bias, *weight[:3], *(second or ())) if isinstance(t, torch.Tensor)]


def four_bit_proof(stub: stub_driver.Stub, changes: list[dict] = FOUR_BIT_CHANGES) -> dict:
    """Compares the launches over 4-bit weights as ``group_proof`` does. Returns the differences, the launches that
    spill, and the names of the launched kernels."""
    from lora_fast.kernels import linear
    from lora_fast.kernels.linear import four_bit

    result = compared(stub, (four_bit,), four_bit_of, changes)
    plans = sum(key[0] == "four_bit" for key in linear.signature.plans)
    return {**result, "calls": 2 * len(changes), "plans": plans}


def compared(stub: stub_driver.Stub, modules, of_case, changes: list[dict]) -> dict:
    """Compares the launches of each case and of the usual one, {}, by plans and by the JIT. ``of_case`` returns a
    function and its tensors, and ``modules`` hold ``by_jit``."""
    arena, differences, kernels, spilling, by_plan = Arena(1 << 28), [], [], [], modules[0].by_jit

    def choose(by_jit) -> None:
        for module in modules:
            module.by_jit = by_jit

    for change in changes:
        for case in (change, {}):
            (call, tensors), runs = of_case(case), []
            inputs = {tensor.data_ptr() for tensor in tensors}
            for by_jit in (by_plan, by_plan, lambda: True):  # the first run makes the plan
                choose(by_jit)
                arena.rewind()
                with stub.recorded() as launched:
                    call()
                runs.append(launched)
            choose(by_plan)
            known = lambda address, inputs=inputs: address in inputs or arena.holds(address)
            kernels += [launched.kernel for launched in runs[1]]
            spilling += [f"{case}: {launched.kernel}" for launched in runs[1] if launched.stack]
            for mine, theirs in itertools.zip_longest(runs[1], runs[2]):
                if not same(mine, theirs, known):
                    differences.append(f"{case}: {mine} and {theirs}"[:2000])
    return {"differences": differences, "spilling": spilling, "kernels": kernels}


DORA_CHANGES = [
    {}, {"tokens": 1, "lead": True}, {"moved": "weight"}, {"d_out": 768}, {"moved": "u"}, {"rounded": True},
    {"transposed": True, "bias": True}, {"padding": 3}, {"r": 256}, {"dtype": "float32"}, {"adapter": "bfloat16"},
    {"needs": (False, True)}, {"needs": (True, False)}, {"needs": (False, False)},
]  # fmt: skip


def dora_of(case: dict, d_in: int = 64):
    """Returns a function that runs the norms, the column scale both ways, and a layer of at most 512 tokens, whose
    products torch computes, both ways, and their tensors."""
    import torch

    from lora_fast.kernels import dora

    dtype, adapter = getattr(torch, case.get("dtype", "bfloat16")), getattr(torch, case.get("adapter", "float32"))
    tokens, d_out, r, padding = (
        case.get(name, usual) for name, usual in (("tokens", 8192), ("d_out", 4096), ("r", 16), ("padding", 0))
    )
    tensor = lambda rows, columns, dtype, name="": laid_out(
        rows, columns, dtype, padding, 4 * (case.get("moved") == name)
    )
    shape = (d_in, d_out) if case.get("transposed") else (d_out, d_in)
    stored, a, b = tensor(*shape, dtype, "weight"), tensor(r, d_in, adapter, "a"), tensor(d_out, r, adapter)
    weight = stored.t() if case.get("transposed") else stored
    u, dy, x = (tensor(tokens, columns, dtype, "u") for columns in (d_out, d_out, d_in))
    few_x, few_dy = x[:512], dy[:512]
    u, dy, few_x, few_dy = (t.unsqueeze(0) if case.get("lead") else t for t in (u, dy, few_x, few_dy))
    magnitude, bias = torch.zeros(d_out), torch.zeros(d_out, dtype=dtype) if case.get("bias") else None
    need_u, need_magnitude = case.get("needs", (True, True))
    needs, rounded = (need_u, True, need_u, need_magnitude), case.get("rounded", False)

    def call():
        norms = dora.weight_norms(weight, a, b, 2.0)
        dora.column_scale(u, magnitude, norms, bias)
        dora.column_scale_backward(dy, u, magnitude, norms, need_u, need_magnitude)
        _, s, kept = dora.forward(few_x, weight, bias, a, b, magnitude, norms, 2.0, rounded)
        dora.backward(few_dy, few_x, s, kept, weight, a, b, magnitude, norms, 2.0, rounded, needs)

    return call, [t for t in (weight, a, b, u, dy, x, magnitude, bias) if t is not None]


def dora_proof(stub: stub_driver.Stub, changes: list[dict] = DORA_CHANGES) -> dict:
    """Compares DoRA's launches as ``four_bit_proof`` does."""
    from lora_fast.kernels import linear
    from lora_fast.kernels.dora import columns, layer

    return {**compared(stub, (columns, layer), dora_of, changes), "plans": len(linear.signature.plans)}


class Arena:
    """Memory that is allocated from its start again after each ``rewind``, so that two runs of a call get the same
    addresses."""

    def __init__(self, size: int):
        import torch

        self.memory, self.used, self.allocate = torch.zeros(size, dtype=torch.uint8), 0, torch.empty_strided
        self.memory = self.memory[-self.memory.data_ptr() % 256 :]
        torch.empty_strided = self.empty_strided

    def rewind(self) -> None:
        self.used = 0

    def holds(self, address: int) -> bool:
        return 0 <= address - self.memory.data_ptr() < self.memory.nbytes

    def empty_strided(self, shape, strides, dtype, device):
        if device.type != "cpu":
            return self.allocate(shape, strides, dtype=dtype, device=device)
        count = max(1, 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)))
        start = self.used
        self.used += -(-count * dtype.itemsize // 256) * 256
        return self.memory[start : start + count * dtype.itemsize].view(dtype).as_strided(shape, strides)


# The parts of a call's signature: name → values. The first value is the usual one.
PARTS = {
    "tokens": (8192, 1, 40, 4096),
    "lead": (False, True),  # another leading dimension
    "d_in": (512, 510, 512),
    "d_out": (1536, 1530, 1536),
    "r": (8, 16, 40),
    "dtype": ("bfloat16", "float16", "float32"),
    "adapter": ("same", "float32"),
    "padding": (0, 8, 3),  # elements between the rows of x
    "dy padding": (0, 0, 16),
    "weight padding": (0, 0, 16),
    "a padding": (0, 0, 16),
    "b padding": (0, 0, 16),
    "moved": (None, "x", "weight", "a", "b", "dy"),  # the tensor that does not start at a multiple of 16 bytes
    "rounded": (False, True),
    "bias": (1, 2, None),  # its stride
    "dropout": (0.0, 0.1, 0.5),
    "seed": ("number", "tensor"),
    "stream": (0, 7, 1 << 40),
    "device": (0, 1),
    "tf32": (False, True),
    "needs": ((True, True, True), (False, True, True), (True, False, False), (False, False, True)),
    "scaling": (2.0, 1, 0.5),
}


def laid_out(rows: int, columns: int, dtype, padding: int = 0, offset: int = 0):
    import torch

    whole = torch.zeros(rows * (columns + padding) + offset, dtype=dtype)
    return whole[offset:].as_strided((rows, columns), (columns + padding, 1))


def call_of(parts: dict, draw: random.Random):
    """Returns a function that runs forward and backward on the kernels' own interface, and the tensors that it always
    uses."""
    import torch

    from lora_fast.kernels import linear

    dtype = getattr(torch, parts["dtype"])
    adapter = dtype if parts["adapter"] == "same" else torch.float32
    n, d_in, d_out, r = (parts[name] for name in ("tokens", "d_in", "d_out", "r"))
    offset = lambda name: 4 * (parts["moved"] == name)
    x = laid_out(n, d_in, dtype, parts["padding"], offset("x"))
    dy = laid_out(n, d_out, dtype, parts["dy padding"], offset("dy"))
    weight = laid_out(d_out, d_in, dtype, parts["weight padding"], offset("weight"))
    a = laid_out(r, d_in, adapter, parts["a padding"], offset("a"))
    b = laid_out(d_out, r, adapter, parts["b padding"], offset("b"))
    if parts["lead"]:
        x, dy = x.unsqueeze(0), dy.unsqueeze(0)
    bias = None if parts["bias"] is None else torch.zeros(d_out * parts["bias"], dtype=dtype)[:: parts["bias"]]
    # A seed below 2⁴⁰ is never mistaken for an address (``same``).
    seed = torch.zeros((), dtype=torch.int64) if parts["seed"] == "tensor" else draw.randrange(1 << 40)
    keep = linear.draw_mask(x, parts["dropout"], seed) if parts["dropout"] else None
    scaling, needs, rounded = parts["scaling"], parts["needs"], parts["rounded"]

    def call():
        _, s = linear.forward(x, weight, bias, a, b, scaling, keep, rounded)
        linear.backward(dy, x, s, weight, a, b, scaling, keep, rounded, needs)

    return call, [tensor for tensor in (x, dy, weight, a, b, bias, seed) if isinstance(tensor, torch.Tensor)]


def same(mine: stub_driver.Launched | None, theirs: stub_driver.Launched | None, known) -> bool:
    """Returns whether two launches are the same, byte by byte. Arguments may differ if both are addresses that are not
    ``known``: torch allocates the results of its own products."""
    if mine is None or theirs is None or mine._replace(arguments=()) != theirs._replace(arguments=()):
        return False

    def unknown(argument: bytes | None) -> bool:
        address = int.from_bytes(argument or b"", "little")
        return argument is not None and len(argument) == 8 and address >= 1 << 40 and not known(address)

    both = itertools.zip_longest(mine.arguments, theirs.arguments)
    return all(a == b or (unknown(a) and unknown(b)) for a, b in both)


def both_ways(stub: stub_driver.Stub, arena: Arena, call) -> tuple[list, list]:
    """Returns the launches of a call by its plan and by Triton's JIT, at the same addresses."""
    from lora_fast.kernels import linear

    by_plan, runs = linear.by_jit, []
    for by_jit in (by_plan, by_plan, lambda: True):  # the first run makes the plan
        linear.by_jit = linear.groups.by_jit = by_jit
        arena.rewind()
        with stub.recorded() as launched:
            call()
        runs.append(launched)
    linear.by_jit = linear.groups.by_jit = by_plan
    return runs[1], runs[2]


def plan_proof(stub: stub_driver.Stub, n_calls: int = 210) -> dict:
    """Compares the launches of random calls by plans and by Triton's JIT, byte by byte, and returns the differences.

    Calls come in groups of three. In the second call one part of the first is changed, to each value in turn, and the
    third equals the first.
    """
    import torch

    from lora_fast.kernels import launch, linear

    # A plan compiles kernels that spill again, which the JIT does not; ``spilling`` tests that.
    launch.takes_more_registers = lambda *arguments: False
    arena, draw, differences, launches, kernels = Arena(1 << 29), random.Random(1), [], 0, []
    parts = {name: values[0] for name, values in PARTS.items()}
    usual, changes = parts, dict.fromkeys(PARTS, 0)
    turns = [(name, value) for name, values in PARTS.items() for value in dict.fromkeys(values) if value != values[0]]
    for i in range(n_calls):
        before = parts
        if i % 3 == 0:
            first = usual | dict(draw.sample(turns, draw.choice((0, 0, 1, 2))))
        name, value = turns[i // 3 % len(turns)]
        parts = first | {name: value if first[name] != value else usual[name]} if i % 3 == 1 else first
        for name in PARTS:
            changes[name] += before[name] != parts[name]
        call, tensors = call_of(parts, random.Random(i // 3))
        inputs = {tensor.data_ptr() for tensor in tensors}
        known = lambda address, inputs=inputs: address in inputs or arena.holds(address)
        stub.stream, stub.device = parts["stream"], parts["device"]
        torch.backends.cuda.matmul.fp32_precision = "tf32" if parts["tf32"] else "ieee"
        plan, jit = both_ways(stub, arena, call)
        launches += len(plan)
        kernels += [launched.kernel for launched in plan]
        for mine, theirs in itertools.zip_longest(plan, jit):
            if not same(mine, theirs, known):
                differences.append(f"{parts}: {mine} and {theirs}"[:2000])
    by_kernel = {name: kernels.count(name) for name in sorted(set(kernels))}
    counts = {"launches": launches, "kernels": by_kernel, "plans": len(linear.signature.plans)}
    return {**counts, "differences": differences, "changes": changes}


def spilling(stub: stub_driver.Stub) -> dict:
    """Pretends that every kernel spills. A plan must then launch other cubins, compiled with more registers, in
    launches that are otherwise the same as the JIT's."""
    from lora_fast.kernels import launch

    prepare = launch.Launch._prepare

    def prepare_spilling(self, compiled, *arguments):
        compiled.n_spills = 1
        return prepare(self, compiled, *arguments)

    launch.Launch._prepare = prepare_spilling
    arena = Arena(1 << 27)
    parts = {name: values[0] for name, values in PARTS.items()} | {"tokens": 8192, "dropout": 0.1}
    call, tensors = call_of(parts, random.Random(0))
    inputs = {tensor.data_ptr() for tensor in tensors}
    known = lambda address: address in inputs or arena.holds(address)
    plan, jit = both_ways(stub, arena, call)
    same_launches, other_cubins = [], []
    for by_plan, by_jit in zip(plan, jit, strict=True):
        other_cubins.append(by_plan.cubin != by_jit.cubin)
        by_plan = by_plan._replace(function=by_jit.function, cubin=by_jit.cubin, stack=by_jit.stack)
        same_launches.append(same(by_plan, by_jit, known))
    return {"same_launches": same_launches, "other_cubins": other_cubins}


def backward_in_autocast(stub: stub_driver.Stub) -> dict:
    """Runs forward in float32 and backward in an autocast region, by plans made outside and inside the region. Returns
    the dtypes of torch's products, which the kernels read as float32."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    import lora_fast as lf
    from lora_fast.kernels import linear

    class Products(TorchDispatchMode):
        looks_inside = True

        def __init__(self):
            super().__init__()
            self.dtypes = set()

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            if operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                self.dtypes.add(str(result.dtype))
            return result

    case, seen = {"r": 16, "adapter": "float32", "bias": False, "tokens": 1024}, []
    for first, second in ((False, True), (True, False)):
        linear.signature.plans.clear()
        for inside in (first, second):
            tensors = operands(case, dtype=torch.float32)
            y = lf.functional.lora_linear(*tensors.values(), 2.0)
            trained = [tensors[name] for name in ("x", "lora_A", "lora_B")]
            products = Products()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside), products:
                torch.autograd.grad(y, trained, torch.zeros_like(y))
            seen.append(sorted(products.dtypes))
    return {"dtypes": seen}


def gluon(stub: stub_driver.Stub) -> dict:
    """Compares the launches by plans and by Triton's JIT of a layer for which "gluon" was measured as the fastest, with
    rows that TMA can address and with rows that it cannot."""
    import torch

    from lora_fast.kernels import tuned

    arena, draw, names, differences = Arena(1 << 27), random.Random(2), [], []
    parts = {name: values[0] for name, values in PARTS.items()} | {"tokens": 1024}
    for r, adapter, dropout, dtype, padding in (
        (16, "float32", 0.1, "bfloat16", 0), (40, "same", 0.0, "bfloat16", 8), (8, "float32", 0.1, "float16", 0),
        (1, "same", 0.1, "float16", 0), (256, "float32", 0.0, "bfloat16", 0), (16, "same", 0.0, "bfloat16", 3),
    ):  # fmt: skip
        case = {"r": r, "adapter": adapter, "dropout": dropout, "dtype": dtype, "padding": padding, "bias": 1}
        call, tensors = call_of(parts | case, draw)
        inputs = {tensor.data_ptr() for tensor in tensors}
        d_in, d_out = parts["d_in"], parts["d_out"]
        key = tuned.key("linear", getattr(torch, dtype), 1024, d_in, d_out, r)
        backward = key._replace(op="grad_x" + "_dropout" * bool(dropout), d_in=d_out, d_out=d_in)
        with tuned.using({key: "gluon", backward: "gluon"}):
            plan, jit = both_ways(stub, arena, call)
        names.append([launch.kernel for launch in plan])
        known = lambda address, inputs=inputs: address in inputs or arena.holds(address)
        for mine, theirs in itertools.zip_longest(plan, jit):
            if not same(mine, theirs, known):
                differences.append(f"{case}: {mine} and {theirs}"[:2000])
    return {"launched": names, "differences": differences}


def leave_products_out() -> None:
    """Makes torch's own products only allocate their results, since the stub's kernels compute nothing either."""
    import torch

    from lora_fast.kernels.linear import cublas, gemm

    empty = lambda rows, columns, dtype: torch.empty(rows, columns, dtype=dtype)
    torch.mm = lambda a, b, out_dtype=None: empty(len(a), b.shape[1], out_dtype or a.dtype)
    torch.addmm = lambda c, a, b, beta=1, alpha=1: empty(len(a), b.shape[1], a.dtype)
    torch.matmul = lambda a, b: a.new_empty(*a.shape[:-1], b.shape[1])
    gemm.F = cublas.F = SimpleNamespace(linear=lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], len(weight)))


def variants(stub: stub_driver.Stub) -> dict:
    """Returns the number of compiled variants of each kernel that 20 batch sizes of a layer with dropout load, for some
    layers."""
    leave_products_out()
    loaded = {}
    for d_out, adapter in ((64, "float32"), (4096, "float32"), (4096, "bfloat16")):
        used = set()
        for n in (1, 3, *range(40, 4000, 230)):
            case = {"r": 16, "adapter": adapter, "bias": False, "tokens": n}
            with stub.recorded() as launched:
                run_layer(operands(case, 4096, d_out), 0.1)
            used |= {(launch.kernel, launch.function) for launch in launched}
        names = [kernel for kernel, _ in used]
        loaded[f"4096 → {d_out}, {adapter}"] = {name: names.count(name) for name in sorted(set(names))}
    return loaded


def capture(stub: stub_driver.Stub) -> dict:
    """Runs a warm-up with seeds on the host, then a capture with seeds on the device, in which loading a module
    fails."""
    from lora_fast import backend

    outcome = {}
    for strategy in ("by estimate", "cublas thin"):
        case = {"r": 64 if strategy == "cublas thin" else 16, "adapter": "float32", "bias": True, "tokens": 4096}
        tensors = operands(case, 1024, 1024)
        run_layer(tensors, 0.1)
        loads = stub.counter("loads")
        capturing, backend.is_capturing = backend.is_capturing, lambda device: True
        with stub.capturing(), stub.recorded() as launched:
            run_layer(tensors, 0.1)
        backend.is_capturing = capturing
        outcome[strategy] = {"loads": stub.counter("loads") - loads, "launches": len(launched)}
    with stub.capturing():  # checks that the stub detects a load
        try:
            run_layer(operands(case | {"r": 24}, 1024, 1024), 0.1)
        except RuntimeError as error:
            outcome["refused"] = str(error)
    return outcome


STEPS = {"AdamW": 1, "ILoRA": 3, "PiLoRA": 5, "LoRAMuon": 4}  # launches


def optimizer_steps(stub: stub_driver.Stub) -> dict:
    """Compares a step's launches by plans and by Triton's JIT, for each method, rank and place of the learning rate,
    with gradients at new addresses. (A kernel that spills has another cubin in a plan.) Returns the differences, the
    launches, and the modules that a captured step loads after one normal step."""
    import torch
    from torch import nn

    import lora_fast as lf
    from lora_fast.kernels import launch, pointer_table

    outcome = {"differences": [], "launches": {}, "loads": {}}
    arena, by_jit = Arena(1 << 22), launch.by_jit
    allocate = torch.empty

    def empty(*shape, dtype=None, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        strides = allocate(shape, device="meta").stride()
        return arena.empty_strided(shape, strides, dtype or torch.float32, torch.device(device or "cpu"))

    def recorded(step) -> list:
        arena.rewind()
        with stub.recorded() as launches:
            torch.empty = empty
            step()
            torch.empty = allocate
        return [launch._replace(function=0) for launch in launches]

    for name, r, on_device in itertools.product(STEPS, (8, 17, 100), (False, True)):
        shapes = [(64, 40), (40, 64), (33, 24)]
        pairs = [(nn.Parameter(torch.zeros(r, i)), nn.Parameter(torch.zeros(o, r))) for i, o in shapes]
        methods = [] if name == "AdamW" else [getattr(lf.methods, name)()]
        rate = torch.tensor(1e-3) if on_device else 1e-3
        optimizer = lf.optim.LoRAAdamW(pairs, lr=rate, methods=methods)
        held, words = [], f"{name}, r={r}, rate {'on the device' if on_device else 'a number'}"

        def move(pairs=pairs, held=held):
            for p in (p for pair in pairs for p in pair):
                held.append(p.grad)
                p.grad = torch.zeros_like(p)

        move()
        optimizer.step()
        move()
        by_plan = recorded(optimizer.step)
        launch.by_jit = lambda: True
        through_jit = recorded(optimizer.step)
        launch.by_jit = by_jit
        for planned, compiled in zip(by_plan, through_jit, strict=True):
            spilled = compiled.stack > planned.stack == 0
            if planned != (compiled._replace(cubin=planned.cubin, stack=0) if spilled else compiled):
                outcome["differences"].append(f"{words}: {planned.kernel}")
        outcome["launches"][words] = [planned.kernel for planned in by_plan]
        loads, capturing = stub.counter("loads"), pointer_table.capturing
        pointer_table.capturing, pointer_table.to_device, to_device = lambda: True, None, pointer_table.to_device
        with stub.capturing():
            optimizer.step()
        pointer_table.capturing, pointer_table.to_device = capturing, to_device
        outcome["loads"][words] = stub.counter("loads") - loads
    return outcome


def public_functions(stub: stub_driver.Stub) -> dict:
    """Runs the functions that take lists of tensors. Two of them run twice, with aligned matrices and with unaligned
    ones."""
    import torch

    import lora_fast.functional as F
    from lora_fast.kernels.pairs import transform

    a, b = [torch.ones(16, 64), torch.ones(16, 32)], [torch.ones(48, 16), torch.ones(24, 16)]
    zeros = lambda like: [torch.zeros_like(x) for x in like]
    factors = list(zip(a + b, zeros(a + b), zeros(a + b), zeros(a + b), strict=True))
    hyper, steps = torch.ones(4, 5, dtype=torch.float64), torch.zeros(4)
    storage = torch.zeros(4 * 16 * 16 + 1)
    cubins = []
    for offset in (0, 1):
        matrices = storage[offset : offset + 4 * 16 * 16].view(4, 16, 16)
        with stub.recorded() as launched:
            F.adapter_step_(factors, [True] * 2 + [False] * 2, hyper, steps, F.StepWork(matrices=matrices))
            transform.transform_(a + b, [True] * 2 + [False] * 2, matrices)
        cubins.append([launch.cubin for launch in launched])
    with stub.recorded() as launched:
        F.adapter_step_(factors, [True] * 2 + [False] * 2, hyper, steps)
        F.gram(a, dim=1)
        F.scalora_scaling(a, b, zeros(a), zeros(b), 1.0, 1.0)
        F.add_low_rank_(torch.zeros(48, 64), a[0], b[0], 1.0)
    return {"cubins": cubins, "launched": [launch.kernel for launch in launched]}


def too_large(stub: stub_driver.Stub) -> dict:
    """Returns the error of a tile that does not fit, and the launches of a next call with a tile that fits."""
    import torch

    from lora_fast.kernels import launch, tuned

    tensors = operands({"r": 16, "adapter": "bfloat16", "bias": False, "tokens": 512}, 1024, 1024)
    key = tuned.key("grad_a", torch.bfloat16, 512, 1024, 0, 16)
    with tuned.using({key: (128, 256, 0, 8, 3)}), stub.recorded() as launched:
        try:
            run_layer(tensors, 0.1)
            error = None
        except launch.LaunchError as raised:
            error = str(raised)
    with stub.recorded() as after:
        run_layer(tensors, 0.1)
    names = lambda launches: [each.kernel for each in launches]
    return {"error": error, "launched": names(launched), "after": names(after)}


def hooks(stub: stub_driver.Stub) -> dict:
    """Records which launches a hook sees in a layer whose plans were made without hooks."""
    from triton import knobs

    tensors, seen = operands({"r": 16, "adapter": "float32", "bias": False, "tokens": 4096}, 1024, 1024), []
    with stub.recorded() as launched:
        run_layer(tensors, 0.1), run_layer(tensors, 0.1)
    hook = lambda metadata: seen.append(metadata.get()["name"])
    knobs.runtime.launch_enter_hook.add(hook)
    run_layer(tensors, 0.1)
    knobs.runtime.launch_enter_hook.remove(hook)
    run_layer(tensors, 0.1)
    return {"seen": seen, "launched": [launch.kernel for launch in launched[len(launched) // 2 :]]}


def threads(stub: stub_driver.Stub) -> dict:
    """Runs two threads with their own tensors and the same plans, with so few plans kept that they drop each
    other's."""
    from lora_fast.kernels import launch, linear

    launch.MAX_PLANS = 3
    cases = [{"r": r, "adapter": "bfloat16", "bias": False, "tokens": 1024} for r in (8, 8)]
    errors = []

    def work(case):
        try:
            tensors = [operands(case | {"tokens": n}, 1024, 1024) for n in (1024, 2048, 4096)]
            for _ in range(20):
                for each in tensors:
                    run_layer(each, 0.1)
        except Exception as error:
            errors.append(repr(error))

    workers = [threading.Thread(target=work, args=(case,)) for case in cases]
    before = stub.counter("launches")
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"errors": errors, "kept": len(linear.signature.plans), "launches": stub.counter("launches") - before}


def carveout(stub: stub_driver.Stub) -> list[list[int]]:
    """Returns the programs of each launch of the GEMM by a layer whose plans are kept, while torch's carve-out
    changes."""
    import torch

    tensors, seen = operands({"r": 16, "adapter": "bfloat16", "bias": False, "tokens": 8192}, 4096, 4096), []
    for carved_out in (None, 20, None, 32, 4, 20):
        torch._C._set_sm_carveout_experimental(carved_out)
        for _ in range(2):
            with stub.recorded() as launched:
                run_layer(tensors, 0.0)
            seen.append([launch.grid[0] for launch in launched if launch.kernel == "lora_linear_kernel"])
    torch._C._set_sm_carveout_experimental(None)
    return seen


def loads(stub: stub_driver.Stub) -> list[str]:
    """Runs a layer in one thread while another one loads the same kernels. Returns the errors."""
    from triton.runtime import driver

    tensors = [operands({"r": 16, "adapter": "bfloat16", "bias": False, "tokens": 1024}) for _ in range(2)]
    loading, errors, load = threading.Event(), [], driver.active.utils.load_binary

    def load_slowly(*arguments):
        loading.set()
        time.sleep(0.2)  # as the driver does, without the GIL
        return load(*arguments)

    def work(each: dict) -> None:
        try:
            run_layer(each, 0.1)
        except Exception as error:
            errors.append(repr(error))

    driver.active.utils.load_binary = load_slowly
    workers = [threading.Thread(target=work, args=(each,)) for each in tensors]
    workers[0].start()
    loading.wait()
    workers[1].start()
    for worker in workers:
        worker.join()
    return errors


COMMANDS = {
    "carveout": carveout,
    "loads": loads,
    "sample": lambda stub: launch_matrix(stub, pairwise()),
    "groups": lambda stub: launch_matrix(stub, pairwise(GROUP_DIMENSIONS), lambda case: group_of(case)[0]),
    "group_proof": group_proof,
    "four_bit": lambda stub: four_bit_proof(stub, FOUR_BIT_CHANGES[:4]),
    "four_bit_proof": four_bit_proof,
    "dora": lambda stub: dora_proof(stub, DORA_CHANGES[:4]),
    "dora_proof": dora_proof,
    "dropout": lambda stub: launch_matrix(stub, [case for case in pairwise() if case["dropout"]]),
    "proof": plan_proof,
    "spilling": spilling,
    "backward_in_autocast": backward_in_autocast,
    "gluon": gluon,
    "variants": variants,
    "capture": capture,
    "optimizer_steps": optimizer_steps,
    "public_functions": public_functions,
    "too_large": too_large,
    "hooks": hooks,
    "threads": threads,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["matrix", *COMMANDS])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--rank", type=int, help="run the matrix for this rank only")
    options = parser.parse_args()
    stub = stub_driver.install(options.arch)
    if options.command == "matrix":
        cases = [case for case in matrix() if options.rank in (None, case["r"])]
        print(json.dumps(launch_matrix(stub, cases)))
    else:
        print(json.dumps(COMMANDS[options.command](stub), ensure_ascii=False))


if __name__ == "__main__":
    main()
