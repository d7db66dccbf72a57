# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels ahead of time: machine code, and the C table by which liblora_fast.so finds it.

    python aot/build.py --archs '80;90;100' --out build/kernels

CMake runs it. Every kernel is a launch of the package's own launchers, specialised for any call that meets the header's
alignment rules. A kernel that spills is compiled again with all the registers that a thread can have. One that still
spills, or has a stack, ends the build.

A row of the table tells how its code was compiled. ``params`` are the arguments in order, each with Triton's type
("x:*bf16 n_tokens:i32 left:tensordesc<bf16[128,64]>"); a matrix that is taken as a tensor map stands for five
arguments, the map, two sizes (i32) and two strides (i64). ``constants`` are the constexprs and compiler options ("R=16
DROPOUT=0 P=fp32 num_warps=4"), flags as 0 and 1.

An arch serves its family. sm_86 and 89 run sm_80's code where Python would launch the same and a block's shared memory
suffices, so only the rest is compiled for them. sm_100's code is assembled for the family sm_100f (sm_100, 103), that
of sm_120 for sm_120 without features of one arch, so that it runs on sm_121, too, and its PTX on later archs.
"""

import argparse
import hashlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: it would leave nothing to compile
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a third of a cubin

import torch
from triton import knobs
from triton.backends.nvidia import compiler as nvidia

import lora_fast
from lora_fast.kernels import batched, device, factor_tiles, launch, tiles
from lora_fast.kernels import linear as layer
from lora_fast.kernels.inspection import compiler
from lora_fast.kernels.inspection.catalogue import OPS, variants
from lora_fast.kernels.limits import LARGEST_RANK
from lora_fast.kernels.linalg import spd
from lora_fast.kernels.linear import grads, strategies
from lora_fast.kernels.pairs import regularizers
from lora_fast.kernels.records import AdapterTable

SOURCE = Path(__file__).resolve().parents[1]
# Arguments that the header's rules make multiples of 16. A stride is a length, or the rank that a kernel is built for.
LENGTHS = {"d_in", "d_out", "d_in_per_split"}
LENGTHS |= {f"stride_{name}" for name in ("x", "y", "a", "b", "dy", "left", "weight", "factor", "result")}
BLOCKS = ("BLOCK", "BLOCK_T", "BLOCK_OUT", "BLOCK_IN", "BLOCK_R", "BLOCK_D", "BLOCK_K", "CHUNK")  # of struct tile
TARGETS = {100: "sm_100f", 120: "sm_120"}  # what ptxas assembles for; other archs: Triton's choice
SAME_CODE = ((80, 86, 89),)  # generations within which a later arch runs an earlier one's code
PTX_ARCHS = (80, 86, 89, 120)  # whose kernels use no instruction of one arch alone
IMPLIED = {"strategy", "padding", "forward"}  # options with one value each, which keys leave out
PROGRESS_INTERVAL = 5  # seconds between lines of progress
SMALL = (16, 32, 64, 128, 256)  # rank classes of spd_solve, spd_inverse and small_inverse
SCALORA = (8, 16, 32, 64, 128)  # of ScaLoRA's system
# What the methods add to AdamW: ScaleReg additive, with the matrices of ScaledAdamW and RefLoRA or alone; ScaLoRA
# scales; iLoRA, BaLoRA, πLoRA and decoupled ScaleReg Grams.
STEPS = ((), ("add",), ("matrix",), ("add", "matrix"), ("scale",), ("gram",), ("matrix", "gram"))
MOST_ADAPTERS = 1024  # in a batch
D = 4096  # d_in and d_out of the launches that are compiled
FLAGS = {"gram": "GRAMS"}  # options whose name in kernels.h is not their own in capitals
# kernel → enum kind of kernels.h. Where it depends on the op, the entry is (op, kernel).
KINDS = {
    "lora_project_kernel": "PROJECT", ("linear", "lora_linear_kernel"): "LINEAR",
    ("grad_x", "lora_linear_kernel"): "GRAD_X", ("add_to_y", "lora_update_kernel"): "ADD_TO_Y",
    ("add_to_dx", "lora_update_kernel"): "ADD_TO_DX", "lora_grad_s_b_kernel": "GRAD_S_B",
    "lora_grad_a_kernel": "GRAD_A", "lora_batched_project_kernel": "BATCH_PROJECT",
    "lora_batched_update_kernel": "BATCH_ADD", ("sum", "lora_sum_partials_kernel"): "SUM", "lora_gram_kernel": "GRAM",
    "lora_step_kernel": "STEP", "lora_transform_kernel": "TRANSFORM", "lora_merge_kernel": "MERGE",
    "lora_cayley_sums_kernel": "CAYLEY_SUMS", "lora_cayley_inverse_kernel": "CAYLEY_INVERSE",
    "lora_cayley_backward_kernel": "CAYLEY_BACKWARD", "lora_cayley_products_kernel": "CAYLEY_PRODUCTS",
    ("spd_solve", "lora_spd_solve_kernel"): "SPD_SOLVE", ("spd_solve", "lora_spd_solve_blocked_kernel"): "SPD_SOLVE",
    ("spd_inverse", "lora_spd_solve_kernel"): "SPD_INVERSE",
    ("spd_inverse", "lora_spd_solve_blocked_kernel"): "SPD_INVERSE",
    "lora_small_inverse_kernel": "SMALL_INVERSE", "lora_small_inverse_blocked_kernel": "SMALL_INVERSE",
    "lora_scalora_solve_kernel": "SCALORA_SOLVE", "lora_scales_kernel": "SCALORA_SCALES",
    "lora_imbalance_kernel": "IMBALANCE", "lora_scale_reg_kernel": "SCALE_REG",
}  # fmt: skip
OF_ALL_RANKS = {"SUM", "SCALORA_SCALES"}  # kinds whose key has rank 0


# ---- What the library embeds


def add_to_y(r: int, dtype: torch.dtype, adapter: str) -> None:
    """Runs the update of y behind another library's product."""
    y, b = torch.empty(1, D, dtype=dtype), torch.empty(D, r, dtype=getattr(torch, adapter))
    layer.add_to_y(y, torch.empty(1, r, dtype=b.dtype), b, 2.0)


def add_to_dx(r: int, dtype: torch.dtype, adapter: str, dropout: float) -> None:
    """Runs the update of dx behind another library's product."""
    dx, a = torch.empty(1, D, dtype=dtype), torch.empty(r, D, dtype=getattr(torch, adapter))
    keep = launch.draw_mask(dx, dropout, 1 << 40) if dropout else None
    layer.add_to_dx(dx, [(torch.empty(1, r, dtype=a.dtype), a, keep)])


def sum_partials(r: int, dtype: torch.dtype, accumulate: str) -> None:
    """Runs the sum of two results' partial sums, where the first, the second or none is added to what is there."""
    parts, total = torch.empty(2, D), torch.empty(D, dtype=dtype)
    add = grads.sum_launch((D, 2), (D, 2), (accumulate == "first", accumulate == "second"))
    assert add is not None
    add.go(None, (parts, total, parts, total), ())


def batch(r: int, dtype: torch.dtype, adapter: str, tokens: str, forward: bool) -> None:
    """Runs S of several adapters (``forward``), or the update of y. ``tokens`` chooses the tile."""
    n_rows = {"many": tiles.SHORT + 1, "short": tiles.SHORT, "few": tiles.FEW}[tokens]
    x, y = (torch.empty(1, D, dtype=dtype).expand(n_rows, D) for _ in range(2))
    a, b = (torch.empty(*shape, dtype=getattr(torch, adapter)) for shape in ((r, D), (D, r)))
    entries = torch.empty(MOST_ADAPTERS, 4, dtype=torch.int64)
    table = AdapterTable([a] * MOST_ADAPTERS, [b] * MOST_ADAPTERS, [2.0] * MOST_ADAPTERS, entries)
    rows, ends = (torch.empty(n, dtype=torch.int32) for n in (n_rows, MOST_ADAPTERS))
    if forward:
        batched.project(x, table, rows, ends)
    else:
        batched.add_product(y, torch.empty(n_rows, r, dtype=a.dtype), table, rows, ends)


def imbalance(r: int, dtype: torch.dtype) -> None:
    """Runs iLoRA's algebra with learning rates in device memory."""
    square, lr = torch.empty(3, r, r, dtype=dtype), torch.ones((), dtype=torch.float64)
    regularizers.imbalance(square, square, torch.empty(3), lr, lr, 0.1)


OWN_OPS: dict[str, Callable] = {
    "add_to_y": add_to_y,
    "add_to_dx": add_to_dx,
    "batch": batch,
    "sum": sum_partials,
    "imbalance": imbalance,
}


class Case(NamedTuple):
    """A call whose launches the library embeds: of an op of the catalogue or of ``OWN_OPS``."""

    op: str
    dtype: str
    r: int
    variant: dict

    def run(self) -> None:
        run = OWN_OPS.get(self.op) or OPS[self.op].run
        run(self.r, getattr(torch, self.dtype), **self.variant)


def cases(ops: list[str] | None, dtypes: list[str], ranks: list[int]) -> list[Case]:
    """Returns the calls whose launches the library embeds for each arch."""
    chosen = layer_cases(dtypes, ranks) + step_cases(dtypes, ranks) + algebra_cases(ranks)
    return [case for case in chosen if ops is None or case.op in ops]


def layer_cases(dtypes: list[str], ranks: list[int]) -> list[Case]:
    masks, gemm = {"dropout": (0.0, 0.1)}, {"strategy": ("fused",), "padding": (0,)}
    ops = {
        "project": masks | {"tokens": ("many", "short")},
        "linear": gemm | {"bias": (False, True)},
        "add_to_y": {},
        "grad_s_b": {},
        "grad_a": masks,
        "grad_x": gemm | masks,
        "add_to_dx": masks,
        "batch": {"tokens": ("many", "short", "few"), "forward": (True, False)},
    }
    return [
        case
        for op, choices in ops.items()
        for dtype in dtypes
        for case in _cases(op, dtype, ranks, variants(adapter=tuple({dtype: 0, "float32": 0}), **choices))
        if (case.variant.get("tokens"), case.variant.get("forward")) not in (("few", True), ("short", False))
    ]


def step_cases(dtypes: list[str], ranks: list[int]) -> list[Case]:
    """Returns the sums of the layer's gradients, the step, and Cayley's transform, for factors of these dtypes and of
    float32. Only factors of 16 bits are rounded stochastically."""
    chosen = []
    for dtype in {**dict.fromkeys(dtypes), "float32": None}:
        chosen += [Case("sum", dtype, 1, {"accumulate": which}) for which in ("none", "first", "second")]
        chosen += _cases("gram", dtype, ranks, [{}])
        noise = (False,) if dtype == "float32" else (False, True)
        names = ("add", "matrix", "scale", "gram")
        steps = [{name: name in on for name in names} | {"stochastic": yes} for on in STEPS for yes in noise]
        stepping = _cases("adamw_step", dtype, ranks, steps)
        chosen += [case for case in stepping if case.r <= factor_tiles.GRAM_RANK or not case.variant["gram"]]
        chosen += _cases("transform", dtype, ranks, [{"add": False}, *variants(add=(True,), stochastic=noise)])
        chosen += _cases("cayley", dtype, ranks, variants(backward=(False, True)))
    for dtype in dtypes:
        merges = [{"rounding": "nearest"}]
        if dtype != "float32":
            merges += [*variants(rounding=("stochastic",), seed_in_memory=(False, True)), {"rounding": "compensated"}]
        chosen += _cases("merge", dtype, ranks, merges)
    return chosen


def algebra_cases(ranks: list[int]) -> list[Case]:
    """Returns the methods' algebra, whose kernels are those of a rank class."""
    classes = sorted({1 << (r - 1).bit_length() for r in ranks})
    chosen = _cases("imbalance", "float32", classes, [{}]) + _cases("scale_reg", "float32", classes, [{}])
    for op in ("spd_solve", "spd_inverse", "small_inverse"):
        chosen += _cases(op, "float32", SMALL, [{}])
    return chosen + _cases("scalora", "float32", SCALORA, variants(solver=("nnls", "paper", "column", "scalar")))


def _cases(op: str, dtype: str, ranks: Iterable[int], options: list[dict]) -> list[Case]:
    return [Case(op, dtype, r, variant) for r in ranks for variant in options]


class AlwaysSplit(grads.Split):
    """A result that is stored as float32 partial sums even where there is one, so that one kernel serves every size."""

    def __init__(self, shape: tuple[int, ...], dtype, count: int, *more):
        super().__init__(shape, dtype, count, *more)
        self.in_parts, self.sizes = True, (math.prod(shape), count)


@contextmanager
def as_embedded(arch: int):
    """A context in which Python's launchers choose the kernels that the library has."""
    with tiles.assume(arch=arch, strategy="fused"), mock.patch.object(grads, "Split", AlwaysSplit):
        yield


def launches_of(case: Case, arch: int) -> list[compiler.Launch]:
    """Returns the launches of the case that the library embeds. The sums of partial results are a case of their own."""
    with as_embedded(arch), compiler.recorded() as launches:
        case.run()
    return [each for each in launches if _kind(case.op, each.kernel.__name__)]


def _kind(op: str, kernel: str) -> str | None:
    return KINDS.get((op, kernel)) or KINDS.get(kernel)


# ---- Compiling


def compile_case(case: Case, archs: list[int], ptx: int | None) -> list[dict]:
    """Returns the rows of the table of a case, for archs in ascending order. An arch that would run the same code as an
    earlier one of its generation gets no row."""
    rows: list[dict] = []
    compiled: list[tuple[int, list[compiler.Launch], list[dict]]] = []
    for arch in archs:
        launches = launches_of(case, arch)
        if any(_serves(earlier, arch, launches) for earlier in compiled):
            continue
        of_arch = [_row(case, arch, each) for each in launches]
        compiled.append((arch, launches, of_arch))
        rows += of_arch
        if arch == ptx:
            rows += [row | {"is_ptx": True} for row in of_arch]
    return rows


def _serves(earlier: tuple[int, list[compiler.Launch], list[dict]], arch: int, launches: list[compiler.Launch]) -> bool:
    """Returns whether the code for an earlier arch is what Python would launch on this one, and fits there."""
    older, theirs, rows = earlier
    same_generation = any(older in generation and arch in generation for generation in SAME_CODE)
    fits = all(row["shared"] <= device.CARDS[arch].shared_memory for row in rows)
    return same_generation and fits and [*map(_constants, launches)] == [*map(_constants, theirs)]


def _constants(each: compiler.Launch) -> dict:
    """Returns what a launch is compiled with: constexprs, arguments that are None, and the compiler's options."""
    values = [(p.name, each.arguments[p.name], p.is_constexpr) for p in each.kernel.params]
    return {name: value for name, value, is_constexpr in values if is_constexpr or value is None} | each.options


def _row(case: Case, arch: int, each: compiler.Launch) -> dict:
    name, kind = each.kernel.__name__, _kind(case.op, each.kernel.__name__)
    variant = {key: value for key, value in case.variant.items() if key not in IMPLIED}
    words = [f"{key}={value if isinstance(value, str) else int(bool(value))}" for key, value in variant.items()]
    row = {"text": " ".join([name, case.op, case.dtype, f"r{case.r}", *words]), "name": name, "arch": arch}
    with assembled_for(TARGETS.get(arch)):
        kernel, used = compiler.compile_as_launched(each, arch, LENGTHS)
    if used.spills or used.stack or used.shared > device.CARDS[arch].shared_memory:
        raise SystemExit(f"{row['text']}, sm_{arch}: {used.spills} spills, stack {used.stack}, shared {used.shared}")
    if kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size:
        raise SystemExit(f"{row['text']}, sm_{arch}: needs scratch memory, which the library does not pass")
    adapter = variant.pop("adapter", case.dtype)
    options = {name: value for name, value in kernel.metadata._asdict().items() if name in ("maxnreg", "num_warps")}
    constants = _constants(each) | options
    return row | {
        "key": key(kind, case.dtype, adapter, 0 if kind in OF_ALL_RANKS else case.r, variant),
        "is_ptx": False,
        "params": _params(kernel),
        "constants": " ".join(f"{name}={_text(value)}" for name, value in constants.items()),
        "threads": int(re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])[1]),
        "shared": kernel.metadata.shared,
        "tile": {name: value for name, value in constants.items() if name in BLOCKS},
        "maps": [dict(meta) for meta in getattr(kernel.metadata, "tensordesc_meta", None) or ()],
        "name_of_code": name_of_code(kernel, arch),
        "cubin": kernel.asm["cubin"],
        "ptx": retargeted(kernel.asm["ptx"], TARGETS.get(arch)),
    }


@contextmanager
def assembled_for(target: str | None):
    """A context in which Triton's PTX is assembled for this target in place of the arch alone. Triton's cache keeps
    both apart."""
    if target is None:
        yield
        return

    def hook(*arguments):
        if not arguments:
            return target, target  # of the cache's key
        stages = arguments[1]
        original = stages["cubin"]

        def assemble(ptx: str, metadata) -> bytes:
            with mock.patch.object(nvidia, "sm_arch_from_capability", lambda _: target):
                return original(retargeted(ptx, target), metadata)

        stages["cubin"] = assemble

    with mock.patch.object(knobs.runtime, "add_stages_inspection_hook", hook):
        yield


def retargeted(ptx: str, target: str | None) -> str:
    return ptx if target is None else re.sub(r"\.target sm_\w+", f".target {target}", ptx)


def name_of_code(kernel, arch: int) -> str:
    """Returns a hash of the kernel's PTX, which is the same in every process. The cubin is not, since ptxas may choose
    other registers from one run to the next, and Triton's own hash depends on the kernels compiled before."""
    return hashlib.sha256(retargeted(kernel.asm["ptx"], TARGETS.get(arch)).encode()).hexdigest()[:32]


def _text(value) -> str:
    """Returns a constant as the table has it."""
    return str(int(value)) if isinstance(value, bool) else "".join(str(value).split())


def _params(kernel) -> list[str]:
    """Returns name:type of every parameter."""
    params = [f"{name}:{_text(kind)}" for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    entry = re.search(r"\.entry[^{]*", kernel.asm["ptx"])[0]
    count = sum(5 if "tensordesc" in param else 1 for param in params)
    if entry.count(".param ") != count + 2:
        raise SystemExit(f"{kernel.metadata.name}: expected {count} parameters and two for scratch, got {entry}")
    return params


# ---- Writing the table


def key(kind: str, dtype: str, adapter: str, r: int, variant: dict) -> int:
    """Returns the key of a kernel, as the macro KEY of kernels.h."""
    dtypes = ("float32", "float16", "bfloat16")
    options = sum(ENUMS["option"][name] for name in _flags(variant))
    return ENUMS["kind"][kind] << 32 | dtypes.index(dtype) << 28 | dtypes.index(adapter) << 24 | r << 8 | options


def _flags(variant: dict) -> list[str]:
    """Returns the names in enum option of the options that are on."""
    flags = []
    for name, value in variant.items():
        if isinstance(value, str):
            flags.append(f"{name}_{value}".upper())
        elif value:
            flags.append(FLAGS.get(name, name.upper()))
    return flags


def _enums() -> dict[str, dict[str, int]]:
    """Returns the numbers of enum kind and enum option of kernels.h."""
    header = (SOURCE / "aot" / "kernels.h").read_text(encoding="utf-8")
    enums: dict[str, dict[str, int]] = {}
    for name in ("kind", "option"):
        words = re.findall(r"(\w+)(?: = (\d+))?", re.search(rf"enum {name} \{{(.*?)\}};", header, re.S)[1])
        enums[name] = {word: int(number) if number else i for i, (word, number) in enumerate(words)}
    return enums


ENUMS = _enums()


def write(rows: list[dict], dtypes: list[str], ranks: list[int], archs: list[int], ptx: int | None, out: Path) -> None:
    """Writes kernels.c, kernels.S and the code that kernels.S includes."""
    out.mkdir(parents=True, exist_ok=True)
    rows = _unique(rows)
    symbols = {_symbol(row): row for row in rows}
    assembly = ['.section .rodata, "a"']
    for symbol, row in sorted(symbols.items()):
        path = out / f"{row['name_of_code']}.{'ptx' if row['is_ptx'] else 'cubin'}"
        path.write_bytes(row["ptx"].encode() + b"\0" if row["is_ptx"] else row["cubin"])
        assembly += [f".globl {symbol}", f".hidden {symbol}", ".balign 16", f'{symbol}: .incbin "{path}"']
    assembly.append('.section .note.GNU-stack, "", %progbits')
    (out / "kernels.S").write_text("\n".join(assembly) + "\n")
    c = ["/* Generated by aot/build.py. */", '#include "kernels.h"', ""]
    c += [f"extern const unsigned char {symbol}[];" for symbol in sorted(symbols)]
    c += ["", "const lora_fast_kernel lora_fast_public_table[] = {"]
    for row in rows:
        texts = f'"{row["text"]}", "{" ".join(row["params"])}", "{row["constants"]}"'
        c.append(f"    {{{texts}, {row['arch']}, {int(row['is_ptx'])}, {_symbol(row)}}},")
    c += ["};", "", "const struct kernel lora_fast_table[] = {", *map(_private, rows), "};", ""]
    c += _constants_of_library(rows, dtypes, ranks, archs, ptx)
    (out / "kernels.c").write_text("\n".join(c) + "\n")


def _unique(rows: list[dict]) -> list[dict]:
    """Returns the rows in the table's order, one for each key, arch and form."""
    unique = {(row["key"], row["arch"], row["is_ptx"]): row for row in rows}
    return [unique[place] for place in sorted(unique)]


def _private(row: dict) -> str:
    """Returns the row of struct kernel."""
    tile = ", ".join(f".{name} = {value}" for name, value in row["tile"].items())
    ids = []
    for param in row["params"]:
        name = param.split(":")[0]
        of_map = [f"P_map_{name}{part}" for part in ("", "_rows", "_columns", "_stride", "_unit")]
        ids += of_map if "tensordesc" in param else [f"P_{name}"]
    params = f"(const unsigned char[]){{{', '.join(ids)}}}, {len(ids)}"
    maps = "NULL"
    if row["maps"]:
        texts = [
            f"{{{m['swizzle']}, {TYPES[m['elem_size']][m['elem_type']]}, {m['elem_size']}, "
            f"{m['block_size'][0]}, {m['block_size'][1]}}}"
            for m in row["maps"]
        ]
        maps = f"(const struct encoding[]){{{', '.join(texts)}}}"
    return f'    {{{row["key"]:#x}, "{row["name"]}", {row["threads"]}, {row["shared"]}, {{{tile}}}, {params}, {maps}}},'


# Triton's number of an element type, by its size → CUtensorMapDataType, as in Triton's launcher.
TYPES = {2: {8: 10, 9: 8, 10: 9, 6: 6}}


def _constants_of_library(rows: list[dict], dtypes: list[str], ranks: list[int], archs: list[int], ptx) -> list[str]:
    names = ", ".join(f"LORA_FAST_{dtype.upper()}" for dtype in sorted(dtypes))
    return [
        f"const int lora_fast_table_length = {len(rows)};",
        f"const int lora_fast_built_archs[] = {{{', '.join(map(str, sorted(archs)))}}};",
        f"const int lora_fast_built_ranks[] = {{{', '.join(map(str, sorted(ranks)))}}};",
        f"const lora_fast_dtype lora_fast_built_dtypes[] = {{{names}}};",
        f"const int lora_fast_n_archs = {len(archs)}, lora_fast_n_ranks = {len(ranks)};",
        f"const int lora_fast_n_dtypes = {len(dtypes)}, lora_fast_built_ptx = {ptx or 0};",
        f"const int lora_fast_short_tokens = {tiles.SHORT}, lora_fast_few_tokens = {tiles.FEW};",
        f"const int lora_fast_most_adapters = {MOST_ADAPTERS}, lora_fast_programs = {tiles.PROGRAMS};",
        f"const int lora_fast_split_steps = {tiles.SPLIT_STEPS};",
        f"const int lora_fast_partial_numbers = {tiles.PARTIAL_NUMBERS};",
        f"const int lora_fast_slots = {spd.SLOTS}, lora_fast_in_registers = {spd.IN_REGISTERS};",
        *_estimate(),
    ]


def _estimate() -> list[str]:
    """Returns the numbers by which ``lora_fast_faster`` estimates times."""
    rates = [f"    {{{arch}, {', '.join(map(repr, rates))}}}," for arch, rates in sorted(strategies.RATES.items())]
    cublas_tiles = ", ".join(f"{{{t}, {n}, {share}}}" for t, n, share in strategies.CUBLAS_TILES)
    names = "LAUNCH_SECONDS", "L2_SPEEDUP", "MASK_RATE", "STREAM_SHARE", "SINGLE_SHARE", "SPLIT_K_SHARE"
    numbers = ", ".join(repr(getattr(strategies, name)) for name in names)
    counts = f"{len(rates)}, {len(strategies.CUBLAS_TILES)}"
    return [
        "const struct rates lora_fast_rates[] = {", *rates, "};",
        f"const struct estimate lora_fast_estimate = {{{counts}, {{{cublas_tiles}}}, {numbers}}};",
    ]  # fmt: skip


def _symbol(row: dict) -> str:
    return f"lora_fast_{'ptx' if row['is_ptx'] else 'cubin'}_{row['name_of_code']}"


def _words(text: str) -> list[str]:
    return text.replace(",", ";").split(";")


def _numbers(text: str) -> list[int]:
    return sorted({int(word) for word in _words(text)})


def check_source() -> None:
    """Ends the build unless the kernels to compile are those of this source."""
    found = Path(lora_fast.__file__).resolve().parent
    if found != SOURCE / "lora_fast":
        sys.exit(
            f"build.py: lora_fast: expected the package beside it, {SOURCE / 'lora_fast'}, got {found}: install this "
            "source for the Python of the build (pip install -e .), or set PYTHONPATH to it"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=_numbers, default=[80, 86, 90, 100, 120], help=";".join(map(str, device.CARDS)))
    parser.add_argument(
        "--dtypes", type=_words, default=["bfloat16"], help="of activations; adapters have the same dtype or float32"
    )
    parser.add_argument("--ranks", type=_numbers, default=[8, 16, 32, 64, 128], help="of 1 to 256")
    parser.add_argument("--ops", type=_words, help="of the catalogue and of this file; default: all")
    parser.add_argument("--ptx", type=int, default=0, help="arch whose PTX is embedded, too; 0: none")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.c, kernels.S and the code")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of compilations in parallel")
    options = parser.parse_args()
    check_source()
    _check(parser, options)
    chosen, ptx = cases(options.ops, options.dtypes, options.ranks), options.ptx or None
    started = time.monotonic()
    rows = compile_all(chosen, options.archs, ptx, options.processes)
    write(rows, options.dtypes, options.ranks, options.archs, ptx, options.out)
    print(f"compiled {len(rows)} kernels in {time.monotonic() - started:.0f} s", flush=True)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if set(options.archs) - set(device.CARDS):
        parser.error(f"--archs: expected some of {sorted(device.CARDS)}, got {options.archs}")
    if set(options.dtypes) - {"bfloat16", "float16", "float32"}:
        parser.error(f"--dtypes: expected some of bfloat16, float16, float32, got {options.dtypes}")
    if not all(1 <= r <= LARGEST_RANK for r in options.ranks):
        parser.error(f"--ranks: expected 1 to {LARGEST_RANK}, got {options.ranks}")
    if options.ptx and options.ptx not in {*PTX_ARCHS} & {*options.archs}:
        parser.error(f"--ptx: expected one of --archs that is one of {PTX_ARCHS}, got {options.ptx}")
    known = {case.op for case in cases(None, options.dtypes, options.ranks)}
    if unknown := set(options.ops or ()) - known:
        parser.error(f"--ops: expected some of {sorted(known)}, got {sorted(unknown)}")


def compile_all(chosen: list[Case], archs: list[int], ptx: int | None, processes: int) -> list[dict]:
    """Returns the rows of all cases, compiled in parallel."""
    jobs = [(case, generation) for generation in _generations(archs) for case in chosen]
    with ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn")) as pool:
        futures = [pool.submit(compile_case, case, generation, ptx) for case, generation in jobs]
        last_report = time.monotonic()
        for done, future in enumerate(as_completed(futures), 1):
            if future.exception():
                pool.shutdown(cancel_futures=True)
                sys.exit(f"build.py: {future.exception()}")
            if time.monotonic() - last_report > PROGRESS_INTERVAL or done == len(jobs):
                print(f"compiled {done} of {len(jobs)} calls", flush=True)
                last_report = time.monotonic()
    return [row for future in futures for row in future.result()]


def _generations(archs: list[int]) -> list[list[int]]:
    """Returns the archs, those together that may run each other's code."""
    together = [[arch for arch in archs if arch in generation] for generation in SAME_CODE]
    alone = [[arch] for arch in archs if not any(arch in generation for generation in SAME_CODE)]
    return [group for group in together if group] + alone


if __name__ == "__main__":
    main()
