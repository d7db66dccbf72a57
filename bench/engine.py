"""Measures the host time of a call of the C library, without a GPU, in a few seconds beside the build.

    python bench/engine.py                      # builds a small library below build/engine, in two minutes
    python bench/engine.py --build build/aot    # takes a library that CMake has built, with its tests

The library launches into the tests' stub driver (aot/tests/stub_cuda.c), which reports an H100 and computes nothing. A
call's own time is what remains of it without the driver's functions for launches and tensor maps, which are called
again with the same arguments. The figures are CPU times of one thread in interleaved rounds: the lower quartile of the
rounds' means (aot/tests/host_time.c). CUDA's own driver takes microseconds a launch, which are not in the figures.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
ARCH, ROUNDS, GOAL = 90, 200, 1500  # nanoseconds
OPS = "project;linear;add_to_y;grad_s_b;grad_a;grad_x;add_to_dx;sum;batch_project;batch_add;gram;adamw_step;imbalance"


def build(folder: Path) -> None:
    """Builds a library for one arch and one rank."""
    choices = [f"-DLORA_FAST_ARCHS={ARCH}", "-DLORA_FAST_RANKS=16", f"-DLORA_FAST_OPS={OPS}"]
    configure = ["cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *choices]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in (configure, ["cmake", "--build", folder]):
        subprocess.run(command, check=True, env=environment)


def host_times(folder: Path) -> list[list[str]]:
    """Returns name, launches, and nanoseconds of the call, of the driver's functions and of the rest, by function."""
    program = folder / "aot" / "tests" / "lora_fast_host_time"
    process = subprocess.run([program, str(ARCH), str(ROUNDS)], check=True, stdout=subprocess.PIPE, text=True)
    return [line.split("\t") for line in process.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="a folder in which CMake has built the library and its tests")
    folder = parser.parse_args().build
    if folder is None:
        folder = ROOT / "build" / "engine"
        build(folder)
    library = folder.resolve() / "liblora_fast.so"
    console = Console()
    table = Table(title=f"ns on the host, {library.stat().st_size / 2**20:.1f} MiB library, launches for an H100")
    table.add_column("lora_fast_…")
    for column in ("launches", "call", "driver's functions", "own"):
        table.add_column(column, justify="right")
    rows = host_times(folder.resolve())
    for row in rows:
        table.add_row(*row)
    console.print(table)
    most = max(int(nanoseconds) for *_, nanoseconds in rows)
    console.print(f"Goal: own ≤ {GOAL}; the largest is {most}{'' if most <= GOAL else ' (missed)'}.")


if __name__ == "__main__":
    main()
