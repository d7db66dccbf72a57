# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels ahead of time: machine code, and the C table by which liblora_fast.so finds it.

    python aot/build.py --archs '80;90;100' --out build/kernels

CMake runs it. embedded.py lists the launches, compiling.py compiles them and table.py writes the table. Every kernel is
specialised for any call that meets the header's alignment rules. One that spills is compiled again with all the
registers that a thread can have. One that still spills, or has a stack, ends the build.

A row of the table tells how its code was compiled. ``params`` are the arguments in order, each with Triton's type
("x:*bf16 n_tokens:i32 left:tensordesc<bf16[128,64]>"); a matrix that is taken as a tensor map stands for five
arguments, the map, two sizes (i32) and two strides (i64). ``constants`` are the constexprs and compiler options ("R=16
DROPOUT=0 P=fp32 num_warps=4"), flags as 0 and 1.

An arch serves its family. sm_86 and 89 run sm_80's code where Python would launch the same and a block's shared memory
suffices, so only the rest is compiled for them. sm_100's code is assembled for the family sm_100f (sm_100, 103), that
of sm_120 for sm_120 without features of one arch, so that it runs on sm_121, too, and its PTX on later archs.
"""

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import lora_fast
from compiling import compile_case, generations
from embedded import Case, cases
from lora_fast.kernels import device
from lora_fast.kernels.limits import LARGEST_RANK
from table import DTYPES, unique, write

SOURCE = Path(__file__).resolve().parents[1]
PTX_ARCHS = (80, 86, 89, 120)  # whose kernels use no instruction of one arch alone
PROGRESS_INTERVAL = 5  # seconds between lines of progress


def _words(text: str) -> list[str]:
    return text.replace(",", ";").split(";")


def _numbers(text: str) -> list[int]:
    return sorted({int(word) for word in _words(text)})


def check_source() -> None:
    """Ends the build unless the kernels to compile are those of this source."""
    imported = Path(lora_fast.__file__).resolve().parent
    if imported != SOURCE / "lora_fast":
        sys.exit(
            f"build.py: lora_fast: expected the package beside it, {SOURCE / 'lora_fast'}, got {imported}: install "
            "this source for the Python of the build (pip install -e .), or set PYTHONPATH to it"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=_numbers, default=[80, 86, 90, 100, 120], help=";".join(map(str, device.CARDS)))
    parser.add_argument(
        "--dtypes", type=_words, default=["bfloat16"], help="of activations; adapters have the same dtype or float32"
    )
    parser.add_argument("--ranks", type=_numbers, default=[8, 16, 32, 64, 128], help="of 1 to 256")
    parser.add_argument("--ops", type=_words, help="of embedded.py; default: all")
    parser.add_argument("--ptx", type=int, default=0, help="arch whose PTX is embedded, too; 0: none")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.c, kernels.S and the code")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of compilations in parallel")
    options = parser.parse_args()
    check_source()
    _check(parser, options)
    chosen, ptx = cases(options.ops, options.dtypes, options.ranks), options.ptx or None
    started = time.monotonic()
    rows = unique(compile_all(chosen, options.archs, ptx, options.processes))
    write(rows, options.dtypes, options.ranks, options.archs, ptx, options.out)
    seconds, minutes_of_cpu = time.monotonic() - started, sum(os.times()[:4]) / 60  # with the processes that compiled
    counts = Counter(f"{'PTX of ' if row['is_ptx'] else ''}sm_{row['arch']}" for row in rows)
    parts = ", ".join(f"{count} for {form}" for form, count in counts.items())
    print(f"compiled kernels in {seconds:.0f} s ({minutes_of_cpu:.1f} minutes of CPU time): {parts}", flush=True)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if set(options.archs) - set(device.CARDS):
        parser.error(f"--archs: expected some of {sorted(device.CARDS)}, got {options.archs}")
    if set(options.dtypes) - {*DTYPES}:
        parser.error(f"--dtypes: expected some of {DTYPES}, got {options.dtypes}")
    if not all(1 <= r <= LARGEST_RANK for r in options.ranks):
        parser.error(f"--ranks: expected 1 to {LARGEST_RANK}, got {options.ranks}")
    if options.ptx and options.ptx not in {*PTX_ARCHS} & {*options.archs}:
        parser.error(f"--ptx: expected one of --archs that is one of {PTX_ARCHS}, got {options.ptx}")
    known = {case.op for case in cases(None, options.dtypes, options.ranks)}
    if unknown := set(options.ops or ()) - known:
        parser.error(f"--ops: expected some of {sorted(known)}, got {sorted(unknown)}")


def compile_all(chosen: list[Case], archs: list[int], ptx: int | None, processes: int) -> list[dict]:
    """Returns the rows of all cases, compiled in parallel."""
    jobs = [(case, generation) for generation in generations(archs) for case in chosen]
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


if __name__ == "__main__":
    main()
