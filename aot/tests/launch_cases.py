# SPDX-License-Identifier: Apache-2.0
"""The cases of the checks, one for each op that the library embeds: tensors, the Python launcher, the C function, and
the memory that the C function passes where the Python launcher allocates."""

import algebra_cases
import step_cases
import torch
from case import Case
from library import DTYPES, NO_KERNEL, Adapter, Batch, Layer, Library, Refused

from lora_fast.kernels import batched, tiles
from lora_fast.kernels import linear as layer
from lora_fast.kernels.inspection.catalogue import variants
from lora_fast.kernels.launch import NO_MASK
from lora_fast.kernels.linear.gemm import Update
from lora_fast.kernels.linear.project import Project
from lora_fast.kernels.records import AdapterTable

N_TOKENS, D_IN, D_OUT, SEED, DROP, GAP = 4099, 1152, 1280, (1 << 40) + 3, 0.1, 64
# Numbers of tokens for kernels that serve some of them, and (None) for those that serve all: the gradients of a and b
# are one partial sum at 67, a few at 515, and the largest number of them at 4,099.
TOKENS = {"few": (1, tiles.FEW), "short": (67, tiles.SHORT), "many": (tiles.SHORT + 1, N_TOKENS), None: (67, 515, 4099)}
N_ADAPTERS = 600  # of a batch, whose kernels are compiled for up to 1,024


def layer_calls(variant: dict) -> list[dict]:
    """Returns the calls of a layer's kernel: numbers of tokens, rows of x, dy and the weight with gaps or without, and
    a seed on the host or on the device."""
    calls = variants(n_tokens=TOKENS[variant.get("tokens")], in_memory=(False, True)[: 1 + variant.get("dropout", 0)])
    return [{**call, "gap": GAP * (i % 2)} for i, call in enumerate(calls)]


def layer_case(
    library, device, dtype, r, adapter, n_tokens=N_TOKENS, dropout=0, in_memory=False, gap=0
) -> tuple[Case, Layer]:
    case, adapter = Case(library, device, dtype, r), getattr(torch, adapter)
    for name, rows, width in (("x", n_tokens, D_IN), ("dy", n_tokens, D_OUT), ("weight", D_OUT, D_IN)):
        case.add(name, rows, width + gap)
        case.tensors[name] = case.tensors[name][:, :width]
    case.add("y", n_tokens, D_OUT), case.add("dx", n_tokens, D_IN)
    case.add("s", n_tokens, r, dtype=adapter), case.add("bias", D_OUT)
    case.add("a", r, D_IN, dtype=adapter), case.add("b", D_OUT, r, dtype=adapter)
    case.add("seed", dtype=torch.int64, fill=SEED)
    seed = case.tensors["seed"] if in_memory else SEED
    case.keep = layer.draw_mask(case.tensors["x"], DROP, seed) if dropout else None
    seed, _, level = case.keep or NO_MASK
    config = Layer(n_tokens, D_IN, D_OUT, r, DTYPES.index(dtype), DTYPES.index(adapter), 2.0, level)
    config.seed, config.device_seed = (0, seed) if in_memory else (seed, None)
    if gap:
        config.ld_x, config.ld_dy, config.ld_weight = D_IN + gap, D_OUT + gap, D_IN + gap
    return case, config


def project(library, device, dtype, r, adapter, tokens, **call):
    case, config = layer_case(library, device, dtype, r, adapter, **call)
    case.python = lambda t: [layer.project(t["x"], t["a"], case.keep)]

    def c(t):
        s = torch.empty_like(t["s"])
        library("project", config, t["x"], t["a"], s)
        case.memory = [{"s": s}]
        return [s]

    case.c = c
    return case


def linear(library, device, dtype, r, adapter, bias, **call):
    case, config = layer_case(library, device, dtype, r, adapter, **call)
    if not bias:
        case.tensors["bias"] = None
    case.python = lambda t: [layer.linear(t["x"], t["weight"], t["bias"], t["s"], t["b"], 2.0)]

    def c(t):
        y = torch.empty_like(t["y"])
        library("linear", config, t["x"], t["weight"], t["bias"], t["s"], t["b"], y)
        case.memory = [{"result": y}]
        return [y]

    case.c = c
    return case


def grad_x(library, device, dtype, r, adapter, **call):
    case, config = layer_case(library, device, dtype, r, adapter, **call)
    case.python = lambda t: [layer.grad_x(t["dy"], t["weight"], t["s"], t["a"], case.keep)]

    def c(t):
        dx = torch.empty_like(t["dx"])
        library("grad_x", config, t["dy"], t["weight"], t["s"], t["a"], dx)
        case.memory = [{"result": dx}]
        return [dx]

    case.c = c
    return case


def add_to_y(library, device, dtype, r, adapter, **call):
    case, config = layer_case(library, device, dtype, r, adapter, **call)

    def python(t):
        layer.add_to_y(t["y"], t["s"], t["b"], 2.0)
        return [t["y"]]

    def c(t):
        library("add_to_y", config, t["s"], t["b"], t["y"])
        return [t["y"]]

    case.python, case.c = python, c
    return case


def add_to_dx(library, device, dtype, r, adapter, **call):
    case, config = layer_case(library, device, dtype, r, adapter, **call)

    def python(t):
        layer.add_to_dx(t["dx"], [(t["s"], t["a"], case.keep)])
        return [t["dx"]]

    def c(t):
        library("add_to_dx", config, t["s"], t["a"], t["dx"])
        return [t["dx"]]

    case.python, case.c = python, c
    return case


def add_adapter(library, device, dtype, r, adapter, tokens, **call):
    """S in parts where the library splits it (estimates.py compares the choice with Python's), and the update."""
    case, config = layer_case(library, device, dtype, r, adapter, **call)
    size = library.workspace("adapter_", config)

    def python(t):
        project = Project(t["x"], t["a"], False, False, short=True, split=size > 0)
        update = Update(t["y"], t["b"], r, False, True, D_OUT, n_parts=project.splits if size else 0)
        update(t["y"], t["y"], project(t["x"], t["a"]), t["b"], 2.0, None, None, t["s"] if size else None)
        return [t["y"], *([t["s"]] if size else [])]

    def c(t):
        parts = case.scratch(size) if size else t["s"]
        library("add_adapter", config, t["x"], t["a"], t["b"], t["s"], t["y"], parts if size else None)
        case.memory = [{"s": parts}, {"thin": parts}]
        return [t["y"], *([t["s"]] if size else [])]

    case.python, case.c = python, c
    return case


def workspace(case: Case, config: Layer) -> torch.Tensor:
    try:
        return case.scratch(case.library.workspace("", config))
    except Refused as refusal:
        if refusal.status != NO_KERNEL:
            raise
        return case.scratch(1 << 26)  # the library has only some of the ops


def grad_s_b(library, device, dtype, r, adapter, **call):
    case, config = layer_case(library, device, dtype, r, adapter, **call)
    case.python = lambda t: list(layer.grad_s_b(t["dy"], t["s"], t["b"], 2.0))

    def c(t):
        ds, db, parts = torch.empty_like(t["s"]), torch.empty_like(t["b"]), workspace(case, config)
        library("grad_s_b", config, t["dy"], t["s"], t["b"], ds, db, parts)
        chunks = -(-D_OUT // tiles.grad_s_b(t["dy"], r, wide=t["s"].dtype is not dtype).outer)
        second = parts[-(-chunks * t["s"].numel() // 4) * 16 :]
        case.memory = [{"ds": parts, "db": second}]
        case.memory += [{"partial0": parts, "total0": ds, "partial1": second, "total1": db}]
        return [ds, db]

    case.c = c
    return case


def grad_a(library, device, dtype, r, adapter, **call):
    case, config = layer_case(library, device, dtype, r, adapter, **call)
    case.python = lambda t: [layer.grad_a(t["x"], t["s"], t["a"], case.keep)]

    def c(t):
        da, parts = torch.empty_like(t["a"]), workspace(case, config)
        library("grad_a", config, t["x"], t["s"], da, parts)
        case.memory = [{"da": parts}, {"partial0": parts, "total0": da, "partial1": parts, "total1": da}]
        return [da]

    case.c = c
    return case


def batch_case(library, device, dtype, r, adapter, n_tokens, gap=0, **_) -> tuple[Case, Batch, AdapterTable]:
    """Returns a case of as many adapters as the kernels are compiled for. Row t belongs to adapter t, beyond the last
    one to none."""
    case, _ = layer_case(library, device, dtype, r, adapter, n_tokens, gap=gap)
    a, b = case.tensors["a"], case.tensors["b"]
    adapters = (Adapter * N_ADAPTERS)(*[Adapter(a.data_ptr(), b.data_ptr(), r, 2.0)] * N_ADAPTERS)
    table = torch.frombuffer(bytearray(adapters), dtype=torch.int64).view(N_ADAPTERS, 4)
    case.tensors["table"] = table.to(device)
    case.tensors["rows"] = torch.arange(n_tokens, dtype=torch.int32, device=device)
    ends = torch.arange(1, N_ADAPTERS + 1, dtype=torch.int32, device=device)
    case.tensors["ends"] = ends.clamp(max=n_tokens)
    kinds = DTYPES.index(dtype), DTYPES.index(getattr(torch, adapter))
    distances = (D_IN + gap, 0) if gap else (0, 0)
    places = (case.tensors[name].data_ptr() for name in ("table", "rows", "ends"))
    batch = Batch(n_tokens, D_IN, D_OUT, N_ADAPTERS, r, *kinds, *distances, *places)
    lists = [a] * N_ADAPTERS, [b] * N_ADAPTERS, [2.0] * N_ADAPTERS
    return case, batch, AdapterTable(*lists, r, case.tensors["table"], aligned=True)


def batch_project(library, device, dtype, r, adapter, tokens, **call):
    case, batch, table = batch_case(library, device, dtype, r, adapter, **call)
    case.python = lambda t: [batched.project(t["x"], table, t["rows"], t["ends"])[:N_ADAPTERS]]

    def c(t):
        s = torch.empty_like(t["s"])
        library("batch_project", batch, t["x"], s)
        case.memory = [{"s": s}]
        return [s[:N_ADAPTERS]]

    case.c = c
    return case


def batch_add(library, device, dtype, r, adapter, tokens, **call):
    case, batch, table = batch_case(library, device, dtype, r, adapter, **call)
    case.python = lambda t: [batched.add_product(t["y"], t["s"], table, t["rows"], t["ends"])]

    def c(t):
        library("batch_add_to_y", batch, t["s"], t["y"])
        return [t["y"]]

    case.c = c
    return case


CASES = {
    "project": project,
    "linear": linear,
    "grad_s_b": grad_s_b,
    "grad_a": grad_a,
    "grad_x": grad_x,
    "add_to_y": add_to_y,
    "add_to_dx": add_to_dx,
    "project_parts": add_adapter,
    "add_parts_to_y": add_adapter,
    "batch_project": batch_project,
    "batch_add": batch_add,
    **step_cases.CASES,
    **algebra_cases.CASES,
}


def options_of(name: str) -> tuple[str, torch.dtype, int, dict]:
    """Returns op, dtype, rank and options of a kernel, "project bfloat16 r16 adapter=float32 dropout=0"."""
    op, dtype, r, *words = name.split(" ")
    options = {key: int(value) if value.isdigit() else value for key, value in (word.split("=") for word in words)}
    return op, getattr(torch, dtype), int(r[1:]), options


def embedded(library: Library, device: torch.device, arch: int):
    """Yields the name and the case of every kernel that the library has for a card of an arch."""
    keys = [kernel.key.decode() for kernel in library.kernels if kernel.runs_on(arch)]
    for name in sorted({key.split(" ", 1)[1] for key in keys}):
        op, dtype, r, variant = options_of(name)
        if op not in CASES:
            continue  # the sums, which are launched with other kernels
        for call in layer_calls(variant) if "adapter" in variant else [{}]:
            case = CASES[op](library, device, dtype, r, **variant, **call)
            yield " ".join([name, *(f"{key}={value}" for key, value in call.items())]), case
