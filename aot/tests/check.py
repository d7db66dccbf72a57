"""Run by ctest on the built library.

contents    every function of the header is exported, the table holds the archs it was built for, and without a GPU a
            launch returns an error with a name
launches    with a stub of libcuda that notes launches: kernel, grid, block and every argument are those of the Python
            launchers, and tables are those of kernels/table.py and merge.py, number for number
reference   on a GPU: each op has the bits of the Python launcher (77: no GPU, skipped)
"""

import argparse
import ctypes
import os
import re
import sys
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_uint,
    c_ulonglong,
    c_void_p,
)
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # launches are recorded, not interpreted

import torch

from lora_fast.kernels import compiled, gram, hadamard, inverse, layer, merge, solve, step, tiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NO_DRIVER, BAD_ARGUMENT, MISALIGNED, NO_ARCH, NO_KERNEL = -1, -2, -3, -4, -5
SKIPPED = 77


class Kernel(Structure):
    _fields_ = [("key", c_char_p), ("params", c_char_p), ("arch", c_int), ("cubin", c_void_p)]


class Layer(Structure):
    _fields_ = [(name, c_int) for name in ("n_tokens", "d_in", "d_out", "r", "dtype", "adapter")]
    _fields_ += [("scaling", c_float), ("drop_level", c_int), ("seed", c_int64)]


class Factor(Structure):
    _fields_ = [("tensors", c_void_p * 4), ("d", c_int64), ("d_in", c_int64), ("is_a", c_int), ("index", c_int)]


class Group(Structure):
    _fields_ = [(name, c_int) for name in ("op", "dtype", "r", "n_factors", "flat", "n_programs", "chunk")]
    _fields_ += [("bytes", c_size_t), ("device", c_void_p)]


class Work(Structure):
    _fields_ = [(name, c_void_p) for name in ("additive", "matrices", "scale_p", "scale_g", "grams")]


class Note(Structure):
    _fields_ = [("cubin", c_void_p), ("name", c_char_p), ("grid", c_uint * 3), ("block", c_uint * 3)]
    _fields_ += [("shared", c_uint), ("count", c_uint), ("values", c_ulonglong * 40)]


class Library:
    """liblora_fast.so: a method for each function, tensors as their addresses; what is not 0 is an error."""

    def __init__(self, path: str, stream: int | None = None):
        self.library, self.stream = ctypes.CDLL(path), stream
        self.library.lora_fast_error_name.restype = c_char_p
        self.library.lora_fast_kernels.restype = POINTER(Kernel)
        for name in ("gram_workspace", "scalora_workspace"):
            getattr(self.library, f"lora_fast_{name}").restype = c_size_t
        count = c_int()
        self.kernels = self.library.lora_fast_kernels(byref(count))[: count.value]
        self.keys = {kernel.key.decode() for kernel in self.kernels}

    def status(self, name: str, *arguments) -> int:
        return getattr(self.library, f"lora_fast_{name}")(*map(_argument, arguments), c_void_p(self.stream))

    def error_name(self, status: int) -> str:
        return self.library.lora_fast_error_name(status).decode()

    def __call__(self, name: str, *arguments) -> None:
        status = self.status(name, *arguments)
        assert status == 0, f"{name}: {self.error_name(status)}"

    def has(self, key: str) -> bool:
        return any(key in known for known in self.keys)

    def group(self, op: int, dtype: torch.dtype, r: int, factors: list[Factor], flat: bool = False) -> tuple:
        """The group, and its table as bytes in host memory."""
        group = Group(op, DTYPES.index(dtype), r, len(factors), int(flat))
        array = (Factor * len(factors))(*factors)
        assert self.library.lora_fast_plan(byref(group), array) == 0
        host = torch.zeros(group.bytes, dtype=torch.uint8)
        assert self.library.lora_fast_fill(byref(group), array, c_void_p(host.data_ptr())) == 0
        return group, host


def _argument(value):
    if isinstance(value, torch.Tensor):
        return c_void_p(value.data_ptr())
    if isinstance(value, Structure):
        return byref(value)
    if isinstance(value, float):
        return c_float(value)
    return c_void_p(None) if value is None else value


# ---- One case of each op: tensors, the Python launcher, the C function, and where C's own buffers are to go


class Case:
    """``tensors``: by name, inputs and what is changed in place. ``python`` and ``c`` take them and return the results;
    ``own``: for each launch, the addresses that the C side passes for what the Python launcher allocates."""

    def __init__(self, library: Library, device: torch.device, dtype: torch.dtype, r: int):
        self.library, self.device, self.dtype, self.r = library, device, dtype, r
        self.tensors: dict[str, torch.Tensor] = {}
        self.own: list[dict[str, int]] = []
        self.table = None

    def add(self, name: str, *shape: int, dtype: torch.dtype | None = None, fill=None) -> None:
        generator = torch.Generator().manual_seed(len(self.tensors))
        value = torch.randn(*shape, generator=generator) if fill is None else torch.full(shape, fill)
        self.tensors[name] = value.to(self.device, dtype or self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def scratch(self, size: int) -> torch.Tensor:
        return torch.empty(max(16, size), dtype=torch.uint8, device=self.device)


N_TOKENS, SHORT, D_IN, D_OUT, SEED, DROP = 4099, 67, 1152, 1280, (1 << 40) + 3, 0.1


def layer_case(library, device, dtype, r, adapter, dropout=0, short=0) -> tuple[Case, Layer]:
    case, adapter = Case(library, device, dtype, r), getattr(torch, adapter)
    n_tokens = SHORT if short else N_TOKENS
    case.add("x", n_tokens, D_IN), case.add("dy", n_tokens, D_OUT), case.add("weight", D_OUT, D_IN)
    case.add("s", n_tokens, r), case.add("bias", D_OUT)
    case.add("a", r, D_IN, dtype=adapter), case.add("b", D_OUT, r, dtype=adapter)
    case.keep = layer.draw_mask(SEED, n_tokens, D_IN, DROP, device) if dropout else None
    level = case.keep.drop_level if dropout else 0
    indices = DTYPES.index(dtype), DTYPES.index(adapter)
    return case, Layer(n_tokens, D_IN, D_OUT, r, *indices, 2.0, level, SEED if dropout else 0)


def project(library, device, dtype, r, adapter, dropout, short):
    case, config = layer_case(library, device, dtype, r, adapter, dropout, short)
    case.python = lambda t: [layer.project(t["x"], t["a"], case.keep)]

    def c(t):
        s = case.empty(config.n_tokens, r)
        library("project", config, t["x"], t["a"], s)
        case.own = [{"s": s}]
        return [s]

    case.c = c
    return case


def linear(library, device, dtype, r, adapter, bias):
    case, config = layer_case(library, device, dtype, r, adapter)
    if not bias:
        case.tensors["bias"] = None
    case.python = lambda t: [layer.linear(t["x"], t["weight"], t["bias"], t["s"], t["b"], 2.0)]

    def c(t):
        y = case.empty(N_TOKENS, D_OUT)
        library("linear", config, t["x"], t["weight"], t["bias"], t["s"], t["b"], y)
        case.own = [{"result": y}]
        return [y]

    case.c = c
    return case


def grad_x(library, device, dtype, r, adapter, dropout):
    case, config = layer_case(library, device, dtype, r, adapter, dropout)
    case.python = lambda t: [layer.grad_x(t["dy"], t["weight"], t["s"], t["a"], case.keep)]

    def c(t):
        dx = case.empty(N_TOKENS, D_IN)
        library("grad_x", config, t["dy"], t["weight"], t["s"], t["a"], dx)
        case.own = [{"result": dx}]
        return [dx]

    case.c = c
    return case


def workspace(case: Case, config: Layer) -> torch.Tensor:
    size = c_size_t()
    status = case.library.library.lora_fast_workspace(byref(config), byref(size))
    if status == NO_KERNEL:  # a library of some ops only
        size.value = 1 << 26
    return case.scratch(size.value)


def grad_s_b(library, device, dtype, r, adapter):
    case, config = layer_case(library, device, dtype, r, adapter)
    case.python = lambda t: list(layer.grad_s_b(t["dy"], t["s"], t["b"], 2.0))

    def c(t):
        ds, db, parts = case.empty(N_TOKENS, r), torch.empty_like(t["b"]), workspace(case, config)
        library("grad_s_b", config, t["dy"], t["s"], t["b"], ds, db, parts)
        chunks = -(-D_OUT // tiles.grad_s_b(t["dy"], r).outer)
        second = parts.data_ptr() + 4 * chunks * N_TOKENS * r
        case.own = [{"ds": parts, "db": second}]
        case.own += [{"partial0": parts, "total0": ds, "partial1": second, "total1": db}]
        return [ds, db]

    case.c = c
    return case


def grad_a(library, device, dtype, r, adapter, dropout):
    case, config = layer_case(library, device, dtype, r, adapter, dropout)
    case.python = lambda t: [layer.grad_a(t["x"], t["s"], t["a"], case.keep)]

    def c(t):
        da, parts = torch.empty_like(t["a"]), workspace(case, config)
        library("grad_a", config, t["x"], t["s"], da, parts)
        case.own = [{"da": parts}, {"partial0": parts, "total0": da, "partial1": parts, "total1": da}]
        return [da]

    case.c = c
    return case


PAIRS = ((1152, 1280), (5008, 2064))  # (d_in, d_out)


def pairs_case(library, device, dtype, r, names: str) -> tuple[Case, list[tuple]]:
    """Tensors a0, b0, a1, … for each of ``names``; the factors (names of its tensors, d, is_a), b's first."""
    case, factors = Case(library, device, dtype, r), []
    for is_a in (0, 1):
        for i, sizes in enumerate(PAIRS):
            d, side = sizes[1 - is_a], "ba"[is_a]
            for name in names:
                shape, kind = (r, d) if is_a else (d, r), torch.float32 if name in "mv" else None
                case.add(f"{side}{i}{name}", *shape, dtype=kind)
                if name == "v":
                    case.tensors[f"{side}{i}v"].abs_()
            factors.append(([f"{side}{i}{name}" for name in names], d, is_a, i))
    return case, factors


def on_device(case: Case, group: Group, host: torch.Tensor) -> None:
    case.table = host.to(case.device)
    group.device = case.table.data_ptr()
    n = group.n_factors
    offset = {"entries": 0, "counters": 80 * n, "tiles": 144 * n}
    case.tables = {name: group.device + at for name, at in offset.items()}
    parts = host[: 80 * n].view(torch.int64), host[144 * n :].view(torch.int32)
    case.contents = dict(zip(("entries", "tiles"), (part.tolist() for part in parts), strict=True))


def plan(case: Case, t, op: int, factors, flat: bool = False, by_pair: bool = False) -> Group:
    rows = []
    for index, (names, d, is_a, i) in enumerate(factors):
        addresses = [t[name].data_ptr() for name in names]
        rows.append(Factor((c_void_p * 4)(*addresses), d, 0, is_a, i if by_pair else index))
    group, host = case.library.group(op, case.dtype, case.r, rows, flat)
    on_device(case, group, host)
    return group


def gram_case(library, device, dtype, r):
    case, factors = pairs_case(library, device, dtype, r, "pg")
    factors = factors[2:] + factors[:2]  # the launcher's order: a's first
    of = lambda t, side, name: [t[f"{side}{i}{name}"] for i in range(2)]
    lists = (("a", "p"), ("b", "p"), ("a", "g"), ("b", "g"))
    case.python = lambda t: [torch.stack(gram.gram(*(of(t, *which) for which in lists), gram.Grams._fields))]

    def c(t):
        group = plan(case, t, 0, factors, by_pair=True)
        library.library.lora_fast_gram_workspace.argtypes = [POINTER(Group)]
        parts = case.scratch(library.library.lora_fast_gram_workspace(byref(group)))
        grams = case.empty(5, 2, r, r, dtype=torch.float32)
        library("gram", group, 2, grams, parts)
        case.own = [{"partials": parts, "totals": grams}]
        return [grams]

    case.c = c
    return case


def adamw_step(library, device, dtype, r, add, matrix, scale, gram):
    case, factors = pairs_case(library, device, dtype, r, "pgmv")
    case.add("hyper", 1, 5, dtype=torch.float64, fill=0.5), case.add("steps", 4, dtype=torch.float32, fill=3.0)
    extras = {"additive": (add, (4,)), "matrices": (matrix, (4, r, r)), "scale_p": (scale, (4, r))}
    for name, (on, shape) in (extras | {"scale_g": (scale, (4, r))}).items():
        case.add(name, *shape, dtype=torch.float32) if on else case.tensors.update({name: None})
    flat = not (matrix or scale or gram)
    sides = [bool(is_a) for _, _, is_a, _ in factors]

    def python(t):
        rows = [tuple(t[name] for name in names) for names, *_ in factors]
        work = step.Work(*(t[name] for name in ("additive", "matrices", "scale_p", "scale_g")), bool(gram))
        grams = step.step_(rows, sides, t["hyper"], t["steps"], work)
        return [*(x for row in rows for x in (row[0], *row[2:])), t["steps"], *([grams] if gram else [])]

    def c(t):
        group = plan(case, t, 1, factors, flat)
        grams = case.empty(4, r, r, dtype=torch.float32) if gram else None
        parts = case.scratch(4 * group.n_programs * r * r)
        address = lambda x: None if x is None else x.data_ptr()
        work = Work(*(address(t[name]) for name in ("additive", "matrices", "scale_p", "scale_g")), address(grams))
        library("adamw_step", group, t["hyper"], 1, t["steps"], work, parts)
        case.own = [{"partials": parts, "totals": grams}]
        changed = [t[name] for names, *_ in factors for name in (names[0], *names[2:])]
        return [*changed, t["steps"], *([grams] if gram else [])]

    case.python, case.c = python, c
    return case


def transform(library, device, dtype, r, add):
    case, factors = pairs_case(library, device, dtype, r, "p")
    case.add("matrices", 4, r, r, dtype=torch.float32)
    sides = [bool(is_a) for _, _, is_a, _ in factors]

    def python(t):
        changed = [t[names[0]] for names, *_ in factors]
        step.transform_(changed, sides, t["matrices"], bool(add))
        return changed

    def c(t):
        library("transform", plan(case, t, 2, factors), t["matrices"], add)
        return [t[names[0]] for names, *_ in factors]

    case.python, case.c = python, c
    return case


def merge_case(library, device, dtype, r, rounding):
    case = Case(library, device, dtype, r)
    for i, (d_in, d_out) in enumerate(PAIRS):
        case.add(f"w{i}", d_out, d_in), case.add(f"lost{i}", d_out, d_in, fill=0.0)
        case.add(f"a{i}", r, d_in, dtype=torch.float32), case.add(f"b{i}", d_out, r, dtype=torch.float32)
    case.add("scale", 2, r, dtype=torch.float32)
    compensated = rounding == "compensated"
    of = lambda t, name: [t[f"{name}{i}"] for i in range(2)]

    def python(t):
        residuals = of(t, "lost") if compensated else None
        merge.merge_(of(t, "w"), of(t, "a"), of(t, "b"), t["scale"], rounding, SEED, residuals)
        return of(t, "w") + of(t, "lost")

    def c(t):
        factors = []
        for i, (d_in, d_out) in enumerate(PAIRS):
            addresses = [t[f"{name}{i}"].data_ptr() for name in ("w", "lost" if compensated else "w", "a", "b")]
            factors.append(Factor((c_void_p * 4)(*addresses), d_out, d_in, 0, i))
        group, host = library.group(3, dtype, r, factors)
        on_device(case, group, host)
        library("merge", group, t["scale"], merge.ROUNDINGS.index(rounding), c_int64(SEED))
        return of(t, "w") + of(t, "lost")

    case.python, case.c = python, c
    return case


def square_case(library, device, r, n: int = 3) -> Case:
    """Symmetric positive definite, at least I."""
    case = Case(library, device, torch.float32, r)
    case.add("matrices", n, r, r)
    x = case.tensors["matrices"]
    x.copy_(x @ x.mT / r + torch.eye(r, device=device))
    return case


def spd_solve(library, device, dtype, r):
    case = square_case(library, device, r)
    case.add("rhs", 3, r, r)
    case.python = lambda t: list(solve.spd_solve(t["matrices"], t["rhs"], 0.5))

    def c(t):
        x, info = torch.empty_like(t["rhs"]), case.empty(3, dtype=torch.int32)
        parts = case.scratch(library.library.lora_fast_small_workspace(3, r))
        library("spd_solve", 3, r, r, t["matrices"], t["rhs"], 0.5, x, info, parts)
        case.own = [{"solutions": x, "info": info, "uppers": parts}]
        return [x, info]

    case.c = c
    return case


def small_inverse(library, device, dtype, r):
    case = square_case(library, device, r)
    case.python = lambda t: [inverse.small_inverse(t["matrices"])]

    def c(t):
        inverses, parts = torch.empty_like(t["matrices"]), case.scratch(8 * 3 * r * r)
        library("small_inverse", 3, r, t["matrices"], inverses, parts)
        case.own = [{"inverses": inverses, "scratch": parts}]
        return [inverses]

    case.c = c
    return case


def scalora(library, device, dtype, r, solver):
    case = square_case(library, device, r, 15)
    case.tensors["matrices"] = case.tensors["matrices"].view(5, 3, r, r)
    case.add("kappa", dtype=torch.float64, fill=2.0), case.add("scaling", 3, fill=2.0)

    def python(t):
        x, alive, info = hadamard.scalora_solve(*t["matrices"], solver)
        return [x, alive, info, *hadamard.scales(x, alive, t["kappa"], t["scaling"], 0.25, 4.0)]

    def c(t):
        x, alive = case.empty(3, 2 * r), case.empty(3, 2 * r, dtype=torch.bool)
        info, parts = case.empty(3, dtype=torch.int32), case.scratch(3 * 2 * (2 * r) ** 2 * 4)
        library("scalora_solve", 3, r, t["matrices"], hadamard.SOLVERS.index(solver), x, alive, info, parts)
        scale_p, scale_g, rest = case.empty(6, r), case.empty(6, r), case.empty(3, r)
        library("scalora_scales", 3, r, x, alive, t["kappa"], t["scaling"], 0.25, 4.0, scale_p, scale_g, rest)
        case.own = [{"x": x, "alive": alive, "info": info, "scratch": parts}]
        case.own += [{"x": x, "alive": alive, "scale_p": scale_p, "scale_g": scale_g, "rest": rest}]
        return [x, alive, info, scale_p, scale_g, rest]

    case.python, case.c = python, c
    return case


CASES = {
    "project": project, "linear": linear, "grad_s_b": grad_s_b, "grad_a": grad_a, "grad_x": grad_x, "gram": gram_case,
    "adamw_step": adamw_step, "transform": transform, "merge": merge_case, "spd_solve": spd_solve,
    "small_inverse": small_inverse, "scalora": scalora,
}  # fmt: skip


def embedded(library: Library, device: torch.device, arch: int):
    """A case for everything that the library holds for an arch, with its name."""
    names = {kernel.key.decode().split(" ", 1)[1] for kernel in library.kernels if kernel.arch == arch}
    for name in sorted(names):
        op, dtype, r, *words = name.split(" ")
        variant = {key: int(value) if value.isdigit() else value for key, value in (word.split("=") for word in words)}
        yield name, CASES[op](library, device, getattr(torch, dtype), int(r[1:]), **variant)


# ---- What ctest runs


def contents(library: Library, archs: list[str]) -> None:
    header = Path(__file__).resolve().parents[1].joinpath("lora_fast.h").read_text(encoding="utf-8")
    functions = set(re.findall(r"(lora_fast_\w+)\(", header))
    assert len(functions) >= 20, functions
    for name in functions:
        getattr(library.library, name)
    held = {kernel.arch for kernel in library.kernels}
    assert held == {int(arch) for arch in archs}, f"built for {archs}, holds {held}"
    for kernel in library.kernels:
        assert ctypes.string_at(kernel.cubin, 4) == b"\x7fELF", kernel.key
    case, config = layer_case(library, torch.device("cpu"), torch.bfloat16, 16, "bfloat16")
    t, s = case.tensors, torch.empty(N_TOKENS, 16, dtype=torch.bfloat16)
    status = library.status("project", config, t["x"], t["a"], s)
    assert status < 0 or library.error_name(status).startswith("CUDA_ERROR"), status
    print(f"{len(library.kernels)} kernels; a launch here: {library.error_name(status)}")
    assert library.status("project", config, t["x"][:, 1:], t["a"], s) == MISALIGNED
    assert library.status("project", config, None, t["a"], s) == BAD_ARGUMENT
    config.r = 0
    assert library.status("project", config, t["x"], t["a"], s) == BAD_ARGUMENT
    assert [library.error_name(code) for code in (0, NO_DRIVER, 1 << 20)][:2] == ["LORA_FAST_OK", "LORA_FAST_NO_DRIVER"]


def launches(path: str, arch: int, stub_path: str) -> None:
    stub = ctypes.CDLL(stub_path, mode=ctypes.RTLD_GLOBAL)  # is libcuda.so.1 from now on
    ctypes.c_int.in_dll(stub, "stub_arch").value = arch
    count, notes = ctypes.c_int.in_dll(stub, "stub_count"), (Note * 64).in_dll(stub, "stub_notes")
    library, checked = Library(path), 0
    rows = {kernel.cubin: kernel for kernel in library.kernels}
    for name, case in embedded(library, torch.device("cpu"), arch):
        count.value = 0
        with tiles.assume(arch=arch, strategy="fused", tma=False):
            with compiled.recorded() as expected:
                case.python(case.tensors)
            case.c(case.tensors)
        made = notes[: count.value]
        assert [note.name.decode() for note in made] == [e.kernel.__name__ for e in expected], name
        for i, (note, launch) in enumerate(zip(made, expected, strict=True)):
            compare(f"{name}: {note.name.decode()}", case, i, note, rows[note.cubin], launch)
            checked += 1
    assert checked, f"nothing embedded for sm_{arch}"
    case, config = layer_case(library, torch.device("cpu"), torch.bfloat16, 3, "bfloat16")
    s = torch.empty(N_TOKENS, 3, dtype=torch.bfloat16)
    assert library.status("project", config, case.tensors["x"], case.tensors["weight"], s) == NO_KERNEL
    ctypes.c_int.in_dll(stub, "stub_arch").value = 70
    assert library.status("project", config, case.tensors["x"], case.tensors["weight"], s) == NO_ARCH
    print(f"sm_{arch}: {checked} launches as from Python")


def compare(name: str, case: Case, i: int, note: Note, kernel: Kernel, launch: compiled.Launch) -> None:
    """Grid, warps and every argument."""
    grid = (*launch.grid, 1, 1)[:3]
    assert tuple(note.grid) == grid, f"{name}: grid {tuple(note.grid)}, from Python {grid}"
    assert tuple(note.block) == (32 * launch.options.get("num_warps", 4), 1, 1), name
    params = [param.split(":") for param in kernel.params.decode().split()]
    assert note.count == len(params) + 2, name
    for (param, kind), slot in zip(params, note.values, strict=False):
        value, where = launch.arguments[param], f"{name}: {param}"
        if param in ("entries", "tiles") and case.table is not None:
            assert slot == case.tables[param], where
            assert value.flatten().tolist() == case.contents[param], f"{where}: the tables differ"
        elif param == "counters":
            assert slot == case.tables[param], where
        elif kind == "p":
            own = case.own[i].get(param) if case.own else None
            expected = value if own is None else own
            assert slot == (expected if isinstance(expected, int) else expected.data_ptr()), where
        elif kind == "f":
            assert ctypes.c_float.from_buffer_copy(ctypes.c_uint(slot)).value == c_float(value).value, where
        else:
            assert slot == value, f"{where}: {slot}, from Python {value}"


def reference(path: str) -> None:
    """The bits of the Python launchers, which the test suite holds to the plain-torch twins."""
    if not torch.cuda.is_available():
        print("no GPU")
        sys.exit(SKIPPED)
    device = torch.device("cuda")
    library = Library(path, torch.cuda.current_stream().cuda_stream)
    major, minor = torch.cuda.get_device_capability()
    arch = max((k.arch for k in library.kernels if k.arch // 10 == major and k.arch <= 10 * major + minor), default=0)
    checked = 0
    for name, case in embedded(library, device, arch):
        copy = {key: None if t is None else t.clone() for key, t in case.tensors.items()}
        with tiles.assume(strategy="fused", tma=False):
            expected = case.python(copy)
        got = case.c(case.tensors)
        torch.cuda.synchronize()
        for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(mine, theirs), f"{name}: result {i} is not what Python's launch gives"
        checked += 1
    assert checked, f"nothing embedded for sm_{major}{minor}"
    print(f"{checked} ops with the bits of the Python launchers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="liblora_fast.so")
    parser.add_argument("what", choices=("contents", "launches", "reference"))
    parser.add_argument("more", nargs="*", help="contents: the archs; launches: the arch and the stub")
    options = parser.parse_args()
    if options.what == "contents":
        contents(Library(options.library), options.more)
    elif options.what == "launches":
        launches(options.library, int(options.more[0]), options.more[1])
    else:
        reference(options.library)


if __name__ == "__main__":
    main()
