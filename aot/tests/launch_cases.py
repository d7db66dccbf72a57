"""The cases of the checks, one for each op that the library embeds: tensors, the Python launcher, the C function, and
the memory that the C function passes where the Python launcher allocates."""

from ctypes import byref, c_int64, c_size_t, c_void_p
from functools import lru_cache

import torch
from library import DTYPES, NO_KERNEL, CayleyPair, Factor, Group, Layer, Library, StepWork

from lora_fast.kernels import cayley, limits, tiles
from lora_fast.kernels import linear as layer
from lora_fast.kernels.inspection.catalogue import variants
from lora_fast.kernels.launch import NO_MASK
from lora_fast.kernels.linalg import inverse, spd
from lora_fast.kernels.pairs import adamw, add_low_rank, gram, scalora_scales, scalora_system
from lora_fast.kernels.pairs.transform import transform_


class Case:
    """A case.

    Attributes:
        tensors: by name, the inputs and the tensors changed in place.
        python, c: functions that take the tensors and return the results.
        memory: for each launch, by parameter, the C side's memory for what the Python launcher allocates; None for a
            null pointer.
        tables: for each launch, or one for all, the address and contents of every part of its table by parameter. None
            stands for contents that kernels change.
        table: the table in device memory.
    """

    def __init__(self, library: Library, device: torch.device, dtype: torch.dtype, r: int):
        self.library, self.device, self.dtype, self.r = library, device, dtype, r
        self.tensors: dict[str, torch.Tensor] = {}
        self.memory: list[dict[str, torch.Tensor]] = []
        self.table: torch.Tensor | None = None
        self.tables: list[dict[str, tuple[int, list | None]]] = []

    def add(self, name: str, *shape: int, dtype: torch.dtype | None = None, fill=None) -> None:
        value = normal(len(self.tensors), shape) if fill is None else torch.full(shape, fill)
        self.tensors[name] = value.to(self.device, dtype or self.dtype, copy=True)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def scratch(self, size: int) -> torch.Tensor:
        return torch.empty(max(16, size), dtype=torch.uint8, device=self.device)


@lru_cache(maxsize=64)
def normal(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


PAIRS = ((1152, 1280), (5008, 2064))  # (d_in, d_out)


def pairs_case(library, device, dtype, r, names: str) -> tuple[Case, list[tuple]]:
    """Returns a case with tensors a0, b0, a1, … for each of ``names``, and the factors (names of the tensors, d, is_a,
    pair), those of b first."""
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


def on_device(case: Case, group: Group, host: torch.Tensor, columns: int = 8, gradients: bool = False) -> None:
    """Copies a table to the device. ``columns``: the length of its rows. ``gradients``: whether a list of as many
    addresses follows the rows."""
    case.table = host.to(case.device)
    group.device = case.table.data_ptr()
    n = group.n_factors
    sizes = {"entries": 8 * columns * n, "gradients": 8 * n if gradients else 0, "counters": 64 * n}
    sizes["tiles"] = 8 * group.n_programs
    table, offset = {}, 0
    for name, size in sizes.items():
        kind = torch.int64 if name in ("entries", "gradients") else torch.int32
        contents = None if name == "counters" else host[offset : offset + size].view(kind).tolist()
        if size:
            table[name] = group.device + offset, contents
        offset += -(-size // 16) * 16
    case.tables = [table]


def plan(case: Case, t, op: int, factors, flat: bool = False, by_pair: bool = False) -> Group:
    rows = []
    for index, (names, d, is_a, i) in enumerate(factors):
        addresses = [t[name].data_ptr() for name in names]
        rows.append(Factor((c_void_p * 4)(*addresses), d, 0, is_a, i if by_pair else index))
    group, host = case.library.group(op, case.dtype, case.r, rows, flat)
    on_device(case, group, host, gradients=op < 2)
    return group


def gram_case(library, device, dtype, r):
    case, factors = pairs_case(library, device, dtype, r, "pg")
    factors = factors[2:] + factors[:2]  # the launcher's order: a's first

    def python(t):
        lists = [[t[f"{side}{i}{name}"] for i in range(2)] for side, name in ("ap", "bp", "ag", "bg")]
        return [torch.stack(gram.gram(*lists, gram.Grams._fields))]

    def c(t):
        group = plan(case, t, 0, factors, by_pair=True)
        parts = case.scratch(library.gram_workspace(group))
        grams = case.empty(5, 2, r, r, dtype=torch.float32)
        library("gram", group, 2, grams, parts)
        case.memory = [{"partials": parts, "totals": grams}]
        return [grams]

    case.python, case.c = python, c
    return case


def adamw_step(library, device, dtype, r, add, matrix, scale, gram):
    case, factors = pairs_case(library, device, dtype, r, "pgmv")
    case.add("hyper", 1, 5, dtype=torch.float64, fill=0.5), case.add("steps", 4, dtype=torch.float32, fill=3.0)
    extras = {"additive": (add, (4,)), "matrices": (matrix, (4, r, r)), "scale_p": (scale, (4, r))}
    for name, (on, shape) in (extras | {"scale_g": (scale, (4, r))}).items():
        case.add(name, *shape, dtype=torch.float32) if on else case.tensors.update({name: None})
    optional = ("additive", "matrices", "scale_p", "scale_g")
    flat = not (matrix or scale or gram)
    sides = [bool(is_a) for _, _, is_a, _ in factors]

    def python(t):
        rows = [tuple(t[name] for name in names) for names, *_ in factors]
        work = adamw.StepWork(*(t[name] for name in optional), bool(gram))
        grams = adamw.step_(rows, sides, t["hyper"], t["steps"], work)
        return [*(x for row in rows for x in (row[0], *row[2:])), t["steps"], *([grams] if gram else [])]

    def c(t):
        group = plan(case, t, 1, factors, flat)
        grams = case.empty(4, r, r, dtype=torch.float32) if gram else None
        parts = case.scratch(library.gram_workspace(group))
        address = lambda x: None if x is None else x.data_ptr()
        work = StepWork(*(address(t[name]) for name in optional), address(grams))
        library("adamw_step", group, t["hyper"], 1, t["steps"], work, parts)
        case.memory = [{name: t[name] for name in optional} | {"partials": parts, "totals": grams}]
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
        transform_(changed, sides, t["matrices"], bool(add))
        return changed

    def c(t):
        library("transform", plan(case, t, 2, factors), t["matrices"], add)
        return [t[names[0]] for names, *_ in factors]

    case.python, case.c = python, c
    return case


def by_pair(t: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """Returns the tensors name0, name1, … of the pairs."""
    return [t[f"{name}{i}"] for i in range(len(PAIRS))]


def in_parts(memory: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Splits memory into slices of these sizes in bytes, each at a multiple of 16; together they are all of it."""
    padded = [-(-size // 16) * 16 for size in sizes]
    assert sum(padded) == memory.nbytes, (sizes, memory.nbytes)
    return list(memory.split(padded))


def cayley_case(library, device, dtype, r, backward):
    case, n = Case(library, device, dtype, r), len(PAIRS)
    for i, (d_in, d_out) in enumerate(PAIRS):
        case.add(f"free_a{i}", r, d_in), case.add(f"free_b{i}", d_out, r)
        case.add(f"scale{i}", r, dtype=torch.float32)
        if backward:
            case.add(f"grad_a{i}", r, d_in, dtype=torch.float32), case.add(f"grad_b{i}", d_out, r, dtype=torch.float32)
            case.add(f"inverse{i}", r, r, dtype=torch.float64)
    for tensor in case.tensors.values():
        tensor /= 64  # so small that no result overflows
    names = ("free_a", "free_b", "scale") + ("inverse", "grad_a", "grad_b") * backward

    def python(t):
        run = cayley.cayley_backward if backward else cayley.cayley
        return [x for part in run(*(by_pair(t, name) for name in names)) for x in part]

    def c(t):
        kind = dtype if backward else torch.float32
        result_a, result_b = (
            [case.empty(*x.shape, dtype=kind) for x in by_pair(t, name)] for name in ("free_a", "free_b")
        )
        shape, wide = ((r,), torch.float32) if backward else ((r, r), torch.float64)
        third = [case.empty(*shape, dtype=wide) for _ in range(n)]
        pairs = []
        for i, (d_in, d_out) in enumerate(PAIRS):
            tensors = {name: t[f"{name}{i}"] for name in names} | {"result_a": result_a[i], "result_b": result_b[i]}
            tensors["result_scale" if backward else "inverse"] = third[i]
            pairs.append(CayleyPair(**{name: x.data_ptr() for name, x in tensors.items()}, d_in=d_in, d_out=d_out))
        group, host = library.cayley_group(dtype, r, backward, pairs)
        case.table = host.to(device)
        group.device = case.table.data_ptr()
        memory = case.scratch(group.workspace)
        library("cayley", group, memory)
        case.tables, case.memory = cayley_tables(case, group, host), cayley_scratch(group, memory)
        return result_a + result_b + third

    case.python, case.c = python, c
    return case


def cayley_tables(case: Case, group, host: torch.Tensor) -> list[dict]:
    """Returns the tables of the three launches."""
    n, rows = group.n_pairs, 7 if group.backward else 4
    names = ("entries", "addresses", "counters", "tiles", "tiles")
    sizes = [128 * n, 8 * rows * n, 128 * n, *(8 * count for count in group.n_programs)]
    parts, offset = [], 0
    for name, size, part in zip(names, sizes, in_parts(host, sizes), strict=True):
        kind = torch.int64 if name in ("entries", "addresses") else torch.int32
        contents = None if name == "counters" else part[:size].view(kind).tolist()
        parts.append((name, (group.device + offset, contents)))
        offset += part.nbytes
    sums, products = (dict(parts[i] for i in which) for which in ((0, 1, 2, 3), (0, 1, 2, 4)))
    return [sums, sums, products]


def cayley_scratch(group, memory: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Returns the parts of the workspace by parameter, for the three launches."""
    n, square = group.n_pairs, 8 * group.r**2
    side = max(16, 1 << (group.r - 1).bit_length())
    sizes = [2 * n * square, group.n_programs[0] * square, (3 if group.backward else 2) * n * square]
    sizes.append((3 if group.backward else 1) * n * 8 * side**2)
    names = ("totals", "partials", "multipliers", "scratch")
    return [dict(zip(names, in_parts(memory, sizes), strict=True))] * 3


def merge_case(library, device, dtype, r, rounding):
    case = Case(library, device, dtype, r)
    for i, (d_in, d_out) in enumerate(PAIRS):
        case.add(f"w{i}", d_out, d_in), case.add(f"lost{i}", d_out, d_in, fill=0.0)
        case.add(f"a{i}", r, d_in, dtype=torch.float32), case.add(f"b{i}", d_out, r, dtype=torch.float32)
    case.add("scale", 2, r, dtype=torch.float32)
    compensated = rounding == "compensated"

    def python(t):
        residuals = by_pair(t, "lost") if compensated else None
        add_low_rank.add_low_rank_(
            by_pair(t, "w"), by_pair(t, "a"), by_pair(t, "b"), t["scale"], rounding, SEED, residuals
        )
        return by_pair(t, "w") + by_pair(t, "lost")

    def c(t):
        factors = []
        for i, (d_in, d_out) in enumerate(PAIRS):
            addresses = [t[f"{name}{i}"].data_ptr() for name in ("w", "lost" if compensated else "w", "a", "b")]
            factors.append(Factor((c_void_p * 4)(*addresses), d_out, d_in, 0, i))
        group, host = library.group(3, dtype, r, factors)
        on_device(case, group, host, columns=12)
        library("merge", group, t["scale"], limits.ROUNDINGS.index(rounding), c_int64(SEED))
        return by_pair(t, "w") + by_pair(t, "lost")

    case.python, case.c = python, c
    return case


def square_case(library, device, r, n: int = 3) -> Case:
    """Returns a case with symmetric positive definite matrices, at least I."""
    case = Case(library, device, torch.float32, r)
    case.add("matrices", n, r, r)
    x = case.tensors["matrices"]
    x.copy_(x @ x.mT / r + torch.eye(r, device=device))
    return case


def spd_solve(library, device, dtype, r):
    case = square_case(library, device, r)
    case.add("rhs", 3, r, r)
    case.python = lambda t: list(spd.spd_solve(t["matrices"], t["rhs"], 0.5))

    def c(t):
        x, info = torch.empty_like(t["rhs"]), case.empty(3, dtype=torch.int32)
        parts = case.scratch(library.small_workspace(3, r))
        library("spd_solve", 3, r, r, t["matrices"], t["rhs"], 0.5, x, info, parts)
        case.memory = [{"solutions": x, "info": info, "uppers": parts}]
        return [x, info]

    case.c = c
    return case


def small_inverse(library, device, dtype, r):
    case = square_case(library, device, r)
    case.python = lambda t: [inverse.small_inverse(t["matrices"])]

    def c(t):
        inverses, parts = torch.empty_like(t["matrices"]), case.scratch(library.small_workspace(3, r))
        library("small_inverse", 3, r, t["matrices"], inverses, parts)
        case.memory = [{"inverses": inverses, "scratch": parts}]
        return [inverses]

    case.c = c
    return case


def scalora(library, device, dtype, r, solver):
    case = square_case(library, device, r, 15)
    case.tensors["matrices"] = case.tensors["matrices"].view(5, 3, r, r)
    case.add("kappa", dtype=torch.float64, fill=2.0), case.add("scaling", 3, fill=2.0)

    def python(t):
        x, active, info = scalora_system.scalora_solve(*t["matrices"], solver)
        return [x, active, info, *scalora_scales.scales(x, active, t["kappa"], t["scaling"], 0.25, 4.0)]

    def c(t):
        x, active = case.empty(3, 2 * r), case.empty(3, 2 * r, dtype=torch.bool)
        info, parts = case.empty(3, dtype=torch.int32), case.scratch(library.scalora_workspace(3, r))
        library("scalora_solve", 3, r, t["matrices"], limits.SOLVERS.index(solver), x, active, info, parts)
        scale_p, scale_g, residual_scale = case.empty(6, r), case.empty(6, r), case.empty(3, r)
        library(
            "scalora_scales", 3, r, x, active, t["kappa"], t["scaling"], 0.25, 4.0, scale_p, scale_g, residual_scale
        )
        case.memory = [{"x": x, "active": active, "info": info, "scratch": parts}]
        case.memory += [
            {"x": x, "active": active, "scale_p": scale_p, "scale_g": scale_g, "residual_scale": residual_scale}
        ]
        return [x, active, info, scale_p, scale_g, residual_scale]

    case.python, case.c = python, c
    return case


CASES = {
    "project": project,
    "linear": linear,
    "grad_s_b": grad_s_b,
    "grad_a": grad_a,
    "grad_x": grad_x,
    "gram": gram_case,
    "adamw_step": adamw_step,
    "transform": transform,
    "cayley": cayley_case,
    "merge": merge_case,
    "spd_solve": spd_solve,
    "small_inverse": small_inverse,
    "scalora": scalora,
}


def embedded(library: Library, device: torch.device, arch: int):
    """Yields the name and the case of every kernel that the library has for an arch."""
    names = {kernel.key.decode().split(" ", 1)[1] for kernel in library.kernels if kernel.arch == arch}
    for name in sorted(names):
        op, dtype, r, *words = name.split(" ")
        variant = {key: int(value) if value.isdigit() else value for key, value in (word.split("=") for word in words)}
        for call in layer_calls(variant) if "adapter" in variant else [{}]:
            case = CASES[op](library, device, getattr(torch, dtype), int(r[1:]), **variant, **call)
            yield " ".join([name, *(f"{key}={value}" for key, value in call.items())]), case
