"""Compile the kernels ahead of time: cubins, and the C table by which liblora_fast.so finds them.

    python aot/build.py --archs '80;90;100' --out build/kernels

Run by CMake. Every kernel is one launch of the catalogue (lora_fast.kernels.catalogue), specialised for any call that
keeps the header's word on alignment; its key is the case: kernel, op, dtype, rank and what else was chosen. A kernel
that ptxas lets spill is compiled again with all the registers a thread can have; one that still spills, or has a stack,
ends the build.
"""

import argparse
import hashlib
import math
import os
import re
import sys
import time
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

LENGTHS = {"d_in", "d_out", "d_in_per_split"}  # what the header promises to be multiples of 16; strides are of these
LENGTHS |= {f"stride_{name}" for name in ("x", "a", "b", "dy", "left", "weight", "factor")}  # and of the rank, built in
CONSTANTS = ("BLOCK", "BLOCK_T", "BLOCK_OUT", "BLOCK_IN", "BLOCK_R", "BLOCK_D", "BLOCK_K", "CHUNK")  # of struct tile
IMPLIED = {"strategy", "padding"}  # one value each: not part of a key
EVERY = 5  # seconds, from one line of progress to the next
SMALL = (16, 32, 64, 128, 256)  # rank classes of spd_solve and small_inverse
HADAMARD = (8, 16, 32, 64, 128)  # of ScaLoRA's system
STEPS = ((), ("add",), ("matrix",), ("scale",), ("gram",), ("matrix", "gram"))


def cases(ops: list[str] | None, dtypes: list[str], ranks: list[int]) -> list[Case]:
    """What the library embeds, for each arch."""
    masks, gemm = {"dropout": (0.0, 0.1)}, {"strategy": ("fused",), "padding": (0,)}
    layer = {
        "project": masks | {"tokens": ("many", "short")},
        "linear": gemm | {"bias": (False, True)},
        "grad_s_b": {},
        "grad_a": masks,
        "grad_x": gemm | masks,
    }
    found = []
    for op, choices in layer.items():
        for dtype in dtypes:
            found += _cases(op, dtype, ranks, variants(adapter=tuple({dtype: 0, "float32": 0}), **choices))
    names = ("add", "matrix", "scale", "gram")
    steps = [{name: name in on for name in names} for on in STEPS]
    for dtype in {**dict.fromkeys(dtypes), "float32": None}:
        found += _cases("gram", dtype, ranks, [{}])
        stepping = _cases("adamw_step", dtype, ranks, steps)
        found += [case for case in stepping if case.r <= factor_tiles.GRAM_RANK or not case.variant["gram"]]
        found += _cases("transform", dtype, ranks, variants(add=(False, True)))
        found += _cases("cayley", dtype, ranks, variants(backward=(False, True)))
    for dtype in dtypes:
        roundings = ("nearest",) if dtype == "float32" else ("nearest", "stochastic", "compensated")
        found += _cases("merge", dtype, ranks, variants(rounding=roundings))
    found += _cases("spd_solve", "float32", SMALL, [{}])
    found += _cases("small_inverse", "float32", SMALL, [{}])
    found += _cases("scalora", "float32", HADAMARD, variants(solver=("nnls", "paper", "column", "scalar")))
    return [case for case in found if ops is None or case.op in ops]


def _cases(op: str, dtype: str, ranks, chosen: list[dict]) -> list[Case]:
    return [Case(op, dtype, r, variant) for r in ranks for variant in chosen]


class InParts(grads.Split):
    """A result that is float32 partial sums even where there is one, so that one kernel serves every size."""

    def __init__(self, shape: tuple[int, ...], dtype, count: int, *more):
        super().__init__(shape, dtype, count, *more)
        self.in_parts, self.sizes = True, (math.prod(shape), count)


@contextmanager
def as_embedded(arch: int):
    """Within: Python's launchers choose as the library does."""
    with tiles.assume(arch=arch, strategy="fused", tma=False), mock.patch.object(grads, "Split", InParts):
        yield


def compile_case(case: Case, arch: int) -> list[dict]:
    """What the table needs to know of each launch of the case."""
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
    """By its PTX, which is the same in every process. ptxas may choose other registers from one run to the next, and
    Triton's own hash of a kernel depends on the ones before it."""
    return hashlib.sha256(kernel.asm["ptx"].encode()).hexdigest()[:32]


def _params(kernel) -> list[str]:
    """name:kind of every parameter: p a pointer, i and l integers of 32 and 64 bits, f a float, d a double."""
    kinds = {"i32": "i", "i64": "l", "fp32": "f", "fp64": "d"}
    signature = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
    params = [f"{name}:{'p' if kind[0] == '*' else kinds[kind]}" for name, kind in signature.items()]
    entry = re.search(r"\.entry[^{]*", kernel.asm["ptx"])[0]
    if entry.count(".param ") != len(params) + 2:
        raise SystemExit(f"{kernel.metadata.name}: expected {len(params)} parameters and two for scratch, got {entry}")
    return params


def write(rows: list[dict], out: Path) -> None:
    """kernels.c, kernels.S and the cubins that it takes in."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.replace(",", ";").split(";")
    numbers = lambda text: [int(word) for word in words(text)]
    parser.add_argument("--archs", type=numbers, default=[80, 90, 100], help=";".join(map(str, device.CARDS)))
    parser.add_argument("--dtypes", type=words, default=["bfloat16"], help="of activations; adapters too, or float32")
    parser.add_argument("--ranks", type=numbers, default=[8, 16, 32, 64, 128], help="8;16;32;64;128")
    parser.add_argument("--ops", type=words, help="of the catalogue; all, if not given")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.c, kernels.S and the cubins")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="compilations at a time")
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
        told = time.monotonic()
        for done, future in enumerate(as_completed(futures), 1):
            if future.exception():
                pool.shutdown(cancel_futures=True)
                sys.exit(f"build.py: {future.exception()}")
            if time.monotonic() - told > EVERY or done == len(jobs):
                print(f"compiled {done} of {len(jobs)}", flush=True)
                told = time.monotonic()
    write([row for future in futures for row in future.result()], options.out)


if __name__ == "__main__":
    main()
