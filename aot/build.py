"""Compile the kernels ahead of time: cubins, and the C table by which liblora_fast.so finds them.

    python aot/build.py --archs '80;90;100' --out build/kernels

CMake runs it. Every kernel is one launch of the catalogue (lora_fast.kernels.inspection.catalogue), specialised for any
call that meets the header's alignment rules. Its key names the case: kernel, op, dtype, rank and options. A kernel that
spills is compiled again with all the registers that a thread can have. One that still spills, or has a stack, ends the
build.
"""

import argparse
import hashlib
import math
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: it would leave nothing to compile
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a third of a cubin

from lora_fast.kernels import device, factor_tiles, tiles
from lora_fast.kernels.inspection import compiler
from lora_fast.kernels.inspection.catalogue import Case, variants
from lora_fast.kernels.linalg import spd
from lora_fast.kernels.linear import grads

# Arguments that the header's rules make multiples of 16. A stride is a length, or the rank that a kernel is built for.
LENGTHS = {"d_in", "d_out", "d_in_per_split"}
LENGTHS |= {f"stride_{name}" for name in ("x", "a", "b", "dy", "left", "weight", "factor")}
CONSTANTS = ("BLOCK", "BLOCK_T", "BLOCK_OUT", "BLOCK_IN", "BLOCK_R", "BLOCK_D", "BLOCK_K", "CHUNK")  # of struct tile
IMPLIED = {"strategy", "padding"}  # options with one value each, which keys leave out
PROGRESS_INTERVAL = 5  # seconds between lines of progress
SMALL = (16, 32, 64, 128, 256)  # rank classes of spd_solve and small_inverse
SCALORA = (8, 16, 32, 64, 128)  # of ScaLoRA's system
STEPS = ((), ("add",), ("matrix",), ("scale",), ("gram",), ("matrix", "gram"))


def cases(ops: list[str] | None, dtypes: list[str], ranks: list[int]) -> list[Case]:
    """Returns the cases that the library embeds for each arch."""
    masks, gemm = {"dropout": (0.0, 0.1)}, {"strategy": ("fused",), "padding": (0,)}
    layer = {
        "project": masks | {"tokens": ("many", "short")},
        "linear": gemm | {"bias": (False, True)},
        "grad_s_b": {},
        "grad_a": masks,
        "grad_x": gemm | masks,
    }
    chosen = []
    for op, choices in layer.items():
        for dtype in dtypes:
            chosen += _cases(op, dtype, ranks, variants(adapter=tuple({dtype: 0, "float32": 0}), **choices))
    names = ("add", "matrix", "scale", "gram")
    steps = [{name: name in on for name in names} for on in STEPS]
    for dtype in {**dict.fromkeys(dtypes), "float32": None}:
        chosen += _cases("gram", dtype, ranks, [{}])
        stepping = _cases("adamw_step", dtype, ranks, steps)
        chosen += [case for case in stepping if case.r <= factor_tiles.GRAM_RANK or not case.variant["gram"]]
        chosen += _cases("transform", dtype, ranks, variants(add=(False, True)))
        chosen += _cases("cayley", dtype, ranks, variants(backward=(False, True)))
    for dtype in dtypes:
        roundings = ("nearest",) if dtype == "float32" else ("nearest", "stochastic", "compensated")
        chosen += _cases("merge", dtype, ranks, variants(rounding=roundings))
    chosen += _cases("spd_solve", "float32", SMALL, [{}])
    chosen += _cases("small_inverse", "float32", SMALL, [{}])
    chosen += _cases("scalora", "float32", SCALORA, variants(solver=("nnls", "paper", "column", "scalar")))
    return [case for case in chosen if ops is None or case.op in ops]


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
    with tiles.assume(arch=arch, strategy="fused", tma=False), mock.patch.object(grads, "Split", AlwaysSplit):
        yield


def compile_case(case: Case, arch: int) -> list[dict]:
    """Returns a row of the table for each launch of the case."""
    with as_embedded(arch), compiler.recorded() as launches:
        case.run()
    return [_row(case, arch, launch) for launch in launches]


def _row(case: Case, arch: int, launch: compiler.Launch) -> dict:
    name = launch.kernel.__name__
    words = [f"{k}={v if isinstance(v, str) else int(bool(v))}" for k, v in case.variant.items() if k not in IMPLIED]
    row = {"key": " ".join([name, case.op, case.dtype, f"r{case.r}", *words]), "name": name, "arch": arch}
    kernel, used = compiler.compile_as_launched(launch, arch, LENGTHS)
    if used.spills or used.stack or used.shared > device.CARDS[arch].shared_memory:
        raise SystemExit(f"{row['key']}, sm_{arch}: {used.spills} spills, stack {used.stack}, shared {used.shared}")
    if kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size:
        raise SystemExit(f"{row['key']}, sm_{arch}: needs scratch memory, which the library does not pass")
    constants = {k: v for k, v in launch.arguments.items() if k in CONSTANTS}
    return row | {
        "params": _params(kernel),
        "threads": int(re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])[1]),
        "shared": kernel.metadata.shared,
        "tile": constants,
        "name_of_cubin": name_of_cubin(kernel),
        "cubin": kernel.asm["cubin"],
    }


def name_of_cubin(kernel) -> str:
    """Returns a hash of the kernel's PTX, which is the same in every process. The cubin is not, since ptxas may choose
    other registers from one run to the next, and Triton's own hash depends on the kernels compiled before."""
    return hashlib.sha256(kernel.asm["ptx"].encode()).hexdigest()[:32]


def _params(kernel) -> list[str]:
    """Returns name:kind of every parameter: p a pointer, i and l integers of 32 and 64 bits, f a float, d a double."""
    kinds = {"i32": "i", "i64": "l", "fp32": "f", "fp64": "d"}
    signature = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
    params = [f"{name}:{'p' if kind[0] == '*' else kinds[kind]}" for name, kind in signature.items()]
    entry = re.search(r"\.entry[^{]*", kernel.asm["ptx"])[0]
    if entry.count(".param ") != len(params) + 2:
        raise SystemExit(f"{kernel.metadata.name}: expected {len(params)} parameters and two for scratch, got {entry}")
    return params


def write(rows: list[dict], out: Path) -> None:
    """Writes kernels.c, kernels.S and the cubins that kernels.S includes."""
    out.mkdir(parents=True, exist_ok=True)
    cubins = {row["name_of_cubin"]: row["cubin"] for row in rows}
    assembly = ['.section .rodata, "a"']
    for name, cubin in sorted(cubins.items()):
        path = out / f"{name}.cubin"
        path.write_bytes(cubin)
        symbol = _symbol(name)
        assembly += [f".globl {symbol}", f".hidden {symbol}", ".balign 16", f'{symbol}: .incbin "{path}"']
    assembly.append('.section .note.GNU-stack, "", %progbits')
    (out / "kernels.S").write_text("\n".join(assembly) + "\n")
    c = ["/* Generated by aot/build.py. */", '#include "kernels.h"', ""]
    c += [f"extern const unsigned char {_symbol(name)}[];" for name in sorted(cubins)]
    c += ["", "const lora_fast_kernel lora_fast_public_table[] = {"]
    c += [f'    {{"{r["key"]}", "{" ".join(r["params"])}", {r["arch"]}, {_symbol(r["name_of_cubin"])}}},' for r in rows]
    c += ["};", "", "const struct kernel lora_fast_table[] = {"]
    for row in rows:
        constants = ", ".join(f".{name} = {value}" for name, value in row["tile"].items())
        c.append(f'    {{"{row["name"]}", {row["threads"]}, {row["shared"]}, {{{constants}}}}},')
    c += ["};", "", f"const int lora_fast_table_length = {len(rows)};"]
    c += [f"const int lora_fast_short_tokens = {tiles.SHORT}, lora_fast_programs = {tiles.PROGRAMS};"]
    c += [f"const int lora_fast_split_steps = {tiles.SPLIT_STEPS};"]
    c += [f"const int lora_fast_partial_numbers = {tiles.PARTIAL_NUMBERS};"]
    c += [f"const int lora_fast_slots = {spd.SLOTS}, lora_fast_in_registers = {spd.IN_REGISTERS};"]
    (out / "kernels.c").write_text("\n".join(c) + "\n")


def _symbol(name: str) -> str:
    return f"lora_fast_cubin_{name}"


def _words(text: str) -> list[str]:
    return text.replace(",", ";").split(";")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=_numbers, default=[80, 90, 100], help=";".join(map(str, device.CARDS)))
    parser.add_argument(
        "--dtypes", type=_words, default=["bfloat16"], help="of activations; adapters have the same dtype or float32"
    )
    parser.add_argument("--ranks", type=_numbers, default=[8, 16, 32, 64, 128], help="8;16;32;64;128")
    parser.add_argument("--ops", type=_words, help="of the catalogue; default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.c, kernels.S and the cubins")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of compilations in parallel")
    options = parser.parse_args()
    if set(options.archs) - set(device.CARDS):
        parser.error(f"--archs: expected some of {sorted(device.CARDS)}, got {options.archs}")
    known = cases(None, options.dtypes, options.ranks)
    unknown = set(options.ops or ()) - {case.op for case in known}
    if unknown:
        parser.error(f"--ops: expected some of {sorted({case.op for case in known})}, got {sorted(unknown)}")
    jobs = [(case, arch) for arch in options.archs for case in cases(options.ops, options.dtypes, options.ranks)]
    with ProcessPoolExecutor(min(options.processes, len(jobs)), get_context("spawn")) as pool:
        futures = [pool.submit(compile_case, *job) for job in jobs]
        last_report = time.monotonic()
        for done, future in enumerate(as_completed(futures), 1):
            if future.exception():
                pool.shutdown(cancel_futures=True)
                sys.exit(f"build.py: {future.exception()}")
            if time.monotonic() - last_report > PROGRESS_INTERVAL or done == len(jobs):
                print(f"compiled {done} of {len(jobs)}", flush=True)
                last_report = time.monotonic()
    write([row for future in futures for row in future.result()], options.out)


if __name__ == "__main__":
    main()
