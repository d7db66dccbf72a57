"""One case of each op that the library embeds: tensors, the Python launcher, the C function, and where C's own buffers
are to go."""

from ctypes import byref, c_int64, c_size_t, c_void_p

import torch
from library import DTYPES, NO_KERNEL, Factor, Group, Layer, Library, Work

from lora_fast.kernels import gram, hadamard, inverse, layer, merge, rescale, solve, step, tiles


class Case:
    """``tensors``: by name, inputs and what is changed in place. ``python`` and ``c`` take them and return the results;
    ``own``: for each launch, what the C side passes for what the Python launcher allocates."""

    def __init__(self, library: Library, device: torch.device, dtype: torch.dtype, r: int):
        self.library, self.device, self.dtype, self.r = library, device, dtype, r
        self.tensors: dict[str, torch.Tensor] = {}
        self.own: list[dict[str, torch.Tensor]] = []
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
        second = parts[4 * chunks * N_TOKENS * r :]
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
        parts = case.scratch(library.gram_workspace(group))
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
        parts = case.scratch(library.gram_workspace(group))
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
        parts = case.scratch(library.small_workspace(3, r))
        library("spd_solve", 3, r, r, t["matrices"], t["rhs"], 0.5, x, info, parts)
        case.own = [{"solutions": x, "info": info, "uppers": parts}]
        return [x, info]

    case.c = c
    return case


def small_inverse(library, device, dtype, r):
    case = square_case(library, device, r)
    case.python = lambda t: [inverse.small_inverse(t["matrices"])]

    def c(t):
        inverses, parts = torch.empty_like(t["matrices"]), case.scratch(library.small_workspace(3, r))
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
        return [x, alive, info, *rescale.scales(x, alive, t["kappa"], t["scaling"], 0.25, 4.0)]

    def c(t):
        x, alive = case.empty(3, 2 * r), case.empty(3, 2 * r, dtype=torch.bool)
        info, parts = case.empty(3, dtype=torch.int32), case.scratch(library.scalora_workspace(3, r))
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
