"""The cases of the checks, one for each op that the library embeds: tensors, the Python launcher, the C function, and
the memory that the C function passes where the Python launcher allocates."""

from ctypes import byref, c_size_t

import algebra_cases
import step_cases
import torch
from case import Case
from library import DTYPES, NO_KERNEL, Layer, Library

from lora_fast.kernels import linear as layer
from lora_fast.kernels import tiles
from lora_fast.kernels.inspection.catalogue import variants
from lora_fast.kernels.launch import NO_MASK

N_TOKENS, D_IN, D_OUT, SEED, DROP = 4099, 1152, 1280, (1 << 40) + 3, 0.1
# Numbers of tokens for both kernels of project, and (None) for kernels that serve every number: the gradients of a and
# b are one partial sum at 67, a few at 515, and the largest number of them at 4,099.
TOKENS = {"short": (67, tiles.SHORT), "many": (tiles.SHORT + 1, N_TOKENS), None: (67, 515, N_TOKENS)}


def layer_calls(variant: dict) -> list[dict]:
    """Returns the calls of a layer's kernel: numbers of tokens, and a seed on the host or on the device."""
    return variants(n_tokens=TOKENS[variant.get("tokens")], in_memory=(False, True)[: 1 + variant.get("dropout", 0)])


def layer_case(library, device, dtype, r, adapter, n_tokens=N_TOKENS, dropout=0, in_memory=False) -> tuple[Case, Layer]:
    case, adapter = Case(library, device, dtype, r), getattr(torch, adapter)
    case.add("x", n_tokens, D_IN), case.add("dy", n_tokens, D_OUT), case.add("weight", D_OUT, D_IN)
    case.add("s", n_tokens, r, dtype=adapter), case.add("bias", D_OUT)
    case.add("a", r, D_IN, dtype=adapter), case.add("b", D_OUT, r, dtype=adapter)
    case.add("seed", dtype=torch.int64, fill=SEED)
    seed = case.tensors["seed"] if in_memory else SEED
    case.keep = layer.draw_mask(case.tensors["x"], DROP, seed) if dropout else None
    seed, _, level = case.keep or NO_MASK
    seeds = (0, seed) if in_memory else (seed, None)
    return case, Layer(n_tokens, D_IN, D_OUT, r, DTYPES.index(dtype), DTYPES.index(adapter), 2.0, level, *seeds)


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
        y = torch.empty_like(t["dy"])
        library("linear", config, t["x"], t["weight"], t["bias"], t["s"], t["b"], y)
        case.memory = [{"result": y}]
        return [y]

    case.c = c
    return case


def grad_x(library, device, dtype, r, adapter, **call):
    case, config = layer_case(library, device, dtype, r, adapter, **call)
    case.python = lambda t: [layer.grad_x(t["dy"], t["weight"], t["s"], t["a"], case.keep)]

    def c(t):
        dx = torch.empty_like(t["x"])
        library("grad_x", config, t["dy"], t["weight"], t["s"], t["a"], dx)
        case.memory = [{"result": dx}]
        return [dx]

    case.c = c
    return case


def workspace(case: Case, config: Layer) -> torch.Tensor:
    size = c_size_t()
    status = case.library.library.lora_fast_workspace(byref(config), byref(size))
    if status == NO_KERNEL:  # the library has only some of the ops
        size.value = 1 << 26
    return case.scratch(size.value)


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


CASES = {
    "project": project,
    "linear": linear,
    "grad_s_b": grad_s_b,
    "grad_a": grad_a,
    "grad_x": grad_x,
    **step_cases.CASES,
    **algebra_cases.CASES,
}


def options_of(name: str) -> tuple[str, torch.dtype, int, dict]:
    """Returns op, dtype, rank and options of a kernel, "project bfloat16 r16 adapter=float32 dropout=0"."""
    op, dtype, r, *words = name.split(" ")
    options = {key: int(value) if value.isdigit() else value for key, value in (word.split("=") for word in words)}
    return op, getattr(torch, dtype), int(r[1:]), options


def embedded(library: Library, device: torch.device, arch: int):
    """Yields the name and the case of every kernel that the library has for an arch."""
    names = {kernel.key.decode().split(" ", 1)[1] for kernel in library.kernels if kernel.arch == arch}
    for name in sorted(names):
        op, dtype, r, variant = options_of(name)
        for call in layer_calls(variant) if "adapter" in variant else [{}]:
            case = CASES[op](library, device, dtype, r, **variant, **call)
            yield " ".join([name, *(f"{key}={value}" for key, value in call.items())]), case
