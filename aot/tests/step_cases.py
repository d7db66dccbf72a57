# SPDX-License-Identifier: Apache-2.0
"""The cases of the step and of Cayley's transform."""

from ctypes import c_int64, c_void_p

import torch
from case import PAIRS, Case
from library import CayleyPair, Factor, Group, StepWork

from lora_fast.kernels import cayley, limits
from lora_fast.kernels.pairs import adamw, add_low_rank, gram
from lora_fast.kernels.pairs.transform import Noise, transform_tables_
from lora_fast.kernels.pointer_table import find_tables

SEED = (1 << 40) + 3


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
    group, host = case.library.group(op, case.dtype, case.r, len(PAIRS) if by_pair else len(rows), rows, flat)
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
        parts = case.scratch(library.workspace("gram_", group))
        grams = case.empty(5, 2, r, r, dtype=torch.float32)
        library("gram", group, grams, parts)
        case.memory = [{"partials": parts, "totals": grams}]
        return [grams]

    case.python, case.c = python, c
    return case


def noise(case: Case, stochastic: bool) -> None:
    """Adds the keys of stochastic rounding, and steps that have been taken."""
    case.add("steps", 4, dtype=torch.float32, fill=3.0)
    keys = torch.arange(4, device=case.device) << 40
    case.tensors["keys"] = keys if stochastic else None


def adamw_step(library, device, dtype, r, add, matrix, scale, gram, stochastic):
    case, factors = pairs_case(library, device, dtype, r, "pgmv")
    noise(case, stochastic)
    rows = 4 if matrix else 1  # hyperparameters of each factor, or of all
    case.add("hyper", rows, 5, dtype=torch.float64, fill=0.5)
    extras = {"additive": (add, (4,)), "matrices": (matrix, (4, r, r))}
    extras |= {"scale_p": (scale, (4, r)), "scale_g": (scale, (4, r))}
    for name, (on, shape) in extras.items():
        case.add(name, *shape, dtype=torch.float32) if on else case.tensors.update({name: None})
    flat = not (matrix or scale or gram or (add and stochastic))
    sides = [bool(is_a) for _, _, is_a, _ in factors]

    def python(t):
        lists = [tuple(t[name] for name in names) for names, *_ in factors]
        work = adamw.StepWork(*(t[name] for name in extras), bool(gram), t["keys"])
        grams = adamw.step_(lists, sides, t["hyper"], t["steps"], work)
        return [*(x for row in lists for x in (row[0], *row[2:])), t["steps"], *([grams] if gram else [])]

    def c(t):
        group = plan(case, t, 1, factors, flat)
        grams = case.empty(4, r, r, dtype=torch.float32) if gram else None
        parts = case.scratch(library.workspace("gram_", group)) if gram else None
        address = lambda x: None if x is None else x.data_ptr()
        work = StepWork(*(address(t[name]) for name in extras), address(grams), address(t["keys"]))
        library("adamw_step", group, t["hyper"], rows, t["steps"], work, parts)
        unused = {"p_lr_b": None, "p_lr_a": None}
        case.memory = [{name: t[name] for name in (*extras, "keys")} | {"partials": parts, "totals": grams} | unused]
        changed = [t[name] for names, *_ in factors for name in (names[0], *names[2:])]
        return [*changed, t["steps"], *([grams] if gram else [])]

    case.python, case.c = python, c
    return case


def transform(library, device, dtype, r, add, stochastic=0):
    case, factors = pairs_case(library, device, dtype, r, "p")
    case.add("matrices", 4, r, r, dtype=torch.float32)
    noise(case, stochastic)
    sides = [bool(is_a) for _, _, is_a, _ in factors]

    def python(t):
        changed = [t[names[0]] for names, *_ in factors]
        tables = [table.factors for table in find_tables([changed], sides)]
        transform_tables_(tables, t["matrices"], 0, bool(add), Noise(t["steps"], t["keys"]) if stochastic else None)
        return changed

    def c(t):
        steps = t["steps"] if stochastic else None
        library("transform", plan(case, t, 2, factors), t["matrices"], add, t["keys"], steps)
        case.memory = [{"keys": t["keys"], "steps": steps}]
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


def merge_case(library, device, dtype, r, rounding, seed_in_memory=0):
    case = Case(library, device, dtype, r)
    for i, (d_in, d_out) in enumerate(PAIRS):
        case.add(f"w{i}", d_out, d_in), case.add(f"lost{i}", d_out, d_in, fill=0.0)
        case.add(f"a{i}", r, d_in, dtype=torch.float32), case.add(f"b{i}", d_out, r, dtype=torch.float32)
    case.add("scale", 2, r, dtype=torch.float32), case.add("seed", dtype=torch.int64, fill=SEED)
    compensated = rounding == "compensated"

    def python(t):
        residuals, seed = by_pair(t, "lost") if compensated else None, t["seed"] if seed_in_memory else SEED
        add_low_rank.add_low_rank_(
            by_pair(t, "w"), by_pair(t, "a"), by_pair(t, "b"), t["scale"], rounding, seed, residuals
        )
        return by_pair(t, "w") + by_pair(t, "lost")

    def c(t):
        factors = []
        for i, (d_in, d_out) in enumerate(PAIRS):
            addresses = [t[f"{name}{i}"].data_ptr() for name in ("w", "lost" if compensated else "w", "a", "b")]
            factors.append(Factor((c_void_p * 4)(*addresses), d_out, d_in, 0, i))
        group, host = library.group(3, dtype, r, len(PAIRS), factors)
        on_device(case, group, host, columns=12)
        seeds = (c_int64(0), t["seed"]) if seed_in_memory else (c_int64(SEED), None)
        library("merge", group, t["scale"], limits.ROUNDINGS.index(rounding), *seeds)
        return by_pair(t, "w") + by_pair(t, "lost")

    case.python, case.c = python, c
    return case


CASES = {
    "gram": gram_case,
    "adamw_step": adamw_step,
    "transform": transform,
    "cayley": cayley_case,
    "merge": merge_case,
}
