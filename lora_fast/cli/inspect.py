"""``lora-fast inspect`` compiles every kernel for every arch, checks the result against rules, and prints a table or
JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..checks import ArgumentError
from .output.terminal import Display, exit_codes

if TYPE_CHECKING:
    from ..kernels.inspection.catalogue import Case

CompileJob = tuple["Case", int]  # a case and the arch to compile it for
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_ARCH = "An arch, such as 90 for sm_90. Repeatable; the default is all."
_OP = "An op, such as project or gram. Repeatable; the default is all."
_RANK = "A rank of the adapters, such as 16. Repeatable; the default is all."
_TRAFFIC = "Also count the bytes that the kernels move, in Triton's interpreter."
_JSON = "Print JSON instead of tables."
_PROCESSES = "Number of processes that compile in parallel."
EPILOG = """
**Examples**

- `lora-fast inspect --arch 90 --rank 16`

    inspects one arch and one rank, which takes a few minutes

- `lora-fast inspect --op gram --op adamw_step --no-traffic`

    compiles two ops, and does not count their traffic

- `lora-fast inspect --json > kernels.json`

    inspects everything, and prints it for another program to read
"""


def inspect(
    arch: Annotated[list[int] | None, typer.Option(help=_ARCH)] = None,
    op: Annotated[list[str] | None, typer.Option(help=_OP)] = None,
    rank: Annotated[list[int] | None, typer.Option(help=_RANK)] = None,
    traffic: Annotated[bool, typer.Option(help=_TRAFFIC)] = True,
    as_json: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
    processes: Annotated[int, typer.Option(help=_PROCESSES, min=1)] = os.cpu_count() or 1,
) -> None:
    """Compile every kernel for sm_80, 86, 89, 90, 100 and 120, and check the result. Needs no GPU.

    Prints for each kernel in each configuration: registers, stack, spills, shared memory, an estimate of occupancy,
    tensor-core and TMA instructions, 128-bit loads and stores, how far the loop of a GEMM is pipelined, and the bytes
    moved relative to the bytes of all operands.

    The exit code is 1 if a kernel breaks a rule: it spills or has a stack, needs more shared memory than the arch's
    cards have, computes 16-bit products without tensor cores, is a GEMM without TMA on sm_90 or later, or is a GEMM
    whose loop leaves no product in flight. Inspecting everything takes most of an hour the first time on two cores.
    Triton caches what it compiled.
    """
    with exit_codes(Display()):
        rows = measure(_jobs(arch, op, rank), traffic, processes)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _show(rows)
    if any(row["broken"] for row in rows):
        raise typer.Exit(1)


def _jobs(archs: list[int] | None, ops: list[str] | None, ranks: list[int] | None) -> list[CompileJob]:
    from .. import platforms

    platforms.require("lora-fast inspect", platforms.triton_obstacle())
    from ..kernels.inspection import catalogue, rules

    for name, chosen, known in (("arch", archs, rules.ARCHS), ("op", ops, tuple(catalogue.OPS))):
        for value in chosen or ():
            if value not in known:
                raise ArgumentError(f"--{name}", f"one of {', '.join(map(str, known))}", value)
    cases = catalogue.cases(ops or None, ranks or None)
    if not cases:
        assert ranks, "every op has cases of some rank"
        listed = sorted({case.r for case in catalogue.cases(ops or None)})
        raise ArgumentError("--rank", f"some of {', '.join(map(str, listed))}", ", ".join(map(str, ranks)))
    return [(case, arch) for arch in archs or rules.ARCHS for case in cases if case.runs_on(arch)]


def measure(jobs: list[CompileJob], traffic: bool, processes: int) -> list[dict]:
    """Returns a row for each kernel, in the order of the jobs. Launches that compile to the same kernel share a row."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        compiled = _in_parallel(_compile, jobs, processes, False, progress)
        counted: dict[
            str, CompileJob
        ] = {}  # tiles → the first job that has them: archs with the same tiles have the same traffic
        for job, rows in zip(jobs, compiled, strict=True):
            if traffic and job[0].counted:
                counted.setdefault(_tiles(job, rows), job)
        measured = _in_parallel(_count, list(counted.values()), processes, True, progress)
        ratios = dict(zip(counted, measured, strict=True))
    kernels: dict[str, dict] = {}
    for job, rows in zip(jobs, compiled, strict=True):
        for row in rows:
            kernels.setdefault(row.pop("hash"), row | {"traffic": ratios.get(_tiles(job, rows))})
    return list(kernels.values())


def _tiles(job: CompileJob, rows: list[dict]) -> str:
    return f"{job[0]} {[row['tile'] for row in rows]}"


def _compile(job: CompileJob) -> list[dict]:
    from ..kernels.inspection import rules

    return rules.compile_case(*job)


def _count(job: CompileJob) -> float:
    from ..kernels.inspection import rules

    return rules.count_case(*job)


def _in_parallel(work: Callable, jobs: list[CompileJob], processes: int, interpret: bool, progress: Progress) -> list:
    """Returns ``work(job)`` of every job, in their order. ``interpret`` starts the processes with Triton's interpreter,
    which Triton can switch on only when it is imported."""
    if not jobs:
        return []
    task = progress.add_task("", total=len(jobs))
    context = multiprocessing.get_context("spawn")  # a forked process would have imported Triton already
    pool = ProcessPoolExecutor(min(processes, len(jobs)), context, _prepare, (interpret,))
    try:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            case, arch = futures[future]
            if error := future.exception():
                error.add_note(f"lora-fast inspect: {case} for sm_{arch}")
                raise error
            progress.update(task, advance=1, description=f"{'counted' if interpret else 'compiled'} sm_{arch} {case}")
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _prepare(interpret: bool) -> None:
    """Sets the environment of a new process before it imports Triton."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"


def _show(rows: list[dict]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width of its own
    for arch in dict.fromkeys(row["arch"] for row in rows):
        rows_of_arch = [row for row in rows if row["arch"] == arch]
        title = f"sm_{arch}: {_kernels(rows_of_arch)}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("kernel, for, tile")
        for column in ("regs", "spills", "KiB", "warps", "tensor", "TMA", "wide", "loop", "traffic"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows_of_arch:
            name = row["kernel"].removeprefix("lora_").removesuffix("_kernel")
            words = f"{name} {_what_for(row)}, {_tile(row)}"
            table.add_row(words, *_figures(row), style="red" if row["broken"] else "")
        console.print(table)
        console.print()
    broken = [row for row in rows if row["broken"]]
    for row in broken:
        where = f"sm_{row['arch']} {row['kernel']} of {row['op']}, {_what_for(row)}, {_tile(row)}"
        console.print(f"{where}: {', '.join(row['broken'])}", style="red", soft_wrap=True)
    console.print(
        "r: rank. w: warps of a block. spills: accesses of local memory / bytes of stack. KiB: shared memory a block. "
        "warps: estimated share of a multiprocessor's warps that are resident. tensor, TMA: numbers of instructions. "
        "wide: 128-bit accesses / all accesses of global memory. loop: instructions in a GEMM's step, products in "
        "flight, steps that loads are ahead. traffic: bytes that all kernels of the op move / bytes of all operands.",
        style="dim",
    )
    verdict = f"{len(broken)} with a broken rule" if broken else "no rule broken"
    console.print(f"{_kernels(rows)}, {verdict}.", style="red" if broken else "green")


def _kernels(rows: list[dict]) -> str:
    return f"{len(rows)} kernel{'s' * (len(rows) > 1)}"


def _what_for(row: dict) -> str:
    """Returns the dtype, the rank and the variant of a kernel in few words, such as ``bf16 r16 fused dropout 0.1``."""
    options = [
        name if value is True else value if name == "strategy" else f"{name} {value}"
        for name, value in row["variant"].items()
        if value
    ]
    words = " ".join([row["dtype"], f"r{row['r']}", *options])
    for long, short in SHORT.items():
        words = words.replace(long, short)
    return words


def _tile(row: dict) -> str:
    tile = row["tile"]
    sizes = [f"{name.removeprefix('BLOCK_').lower()}{size}" for name, size in tile.items() if name.isupper()]
    return " ".join([*sizes, f"w{tile['num_warps']}"])


def _figures(row: dict) -> list[str]:
    return [
        str(row["registers"]),
        f"{row['spills']}/{row['stack']}",
        f"{row['shared'] / 1024:.0f}",
        f"{row['occupancy']:.0%}",
        str(row["tensor_core"] or "–"),
        str(row["tma_loads"] or "–"),
        f"{row['wide_accesses']}/{row['accesses']}",
        "" if row["step"] is None else f"{row['step']} {row['in_flight']} {row['ahead']}",
        "" if row["traffic"] is None else f"{row['traffic']:.2f}",
    ]
