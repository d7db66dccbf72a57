"""Checks every launch of a layer against the limits of four cards, without a GPU, on the tests' stub driver.

    python bench/launches.py            # five minutes on two cores, half an hour if Triton has cached nothing yet

It runs all combinations of ranks 1 … 256, adapters of 16 and 32 bits and under autocast, dropout, bias, 1 … 8,192
tokens and strategies of the GEMM, forward and backward, on Triton's real launch path, and a sample of those of groups
of layers that read the same x. It writes launches.json beside this file: the number of launches, the failures with
their reasons, and the kernels that spill. ``make test`` runs a sample. The exit status is 1 if a launch failed.
"""

import datetime
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import stub_runs
import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULT = HERE / "launches.json"


GROUPS = "groups"  # in place of a rank: layers that read the same x


def run(arch: int, rank: int | str) -> dict:
    """Runs all cases of one card and rank, or a sample of groups, in a process of its own and returns their counts."""
    command = [GROUPS] if rank == GROUPS else ["matrix", "--rank", str(rank)]
    words = [sys.executable, "-W", "ignore", stub_runs.__file__, *command, "--arch", str(arch)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(words, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"sm_{arch}, rank {rank}: {done.stderr[-3000:]}")
    return json.loads(done.stdout)


def added(results: list[dict]) -> dict:
    """Adds up the ranks of one card. Kernels of different ranks are different kernels."""
    counts = {name: sum(result[name] for result in results) for name in ("cases", "launches", "kernels")}
    failures = [failure for result in results for failure in result["failures"]]
    spilling = {name: stack for result in results for name, stack in result["spilling"].items()}
    return {"card": results[0]["card"], **counts, "failures": failures, "bytes spilled a thread": spilling}


def main() -> None:
    console = Console()
    ranks = [*stub_runs.DIMENSIONS["r"], GROUPS]
    results: dict[int, dict[int | str, dict]] = {}  # arch → rank → counts
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task("ranks × cards", total=len(ranks) * len(stub_runs.ARCHS))
        jobs = {pool.submit(run, arch, rank): (arch, rank) for rank in ranks for arch in stub_runs.ARCHS}
        for job in as_completed(jobs):
            arch, rank = jobs[job]
            results.setdefault(arch, {})[rank] = job.result()
            progress.update(task, advance=1, description=f"sm_{arch}, rank {rank}")
    cards = {f"sm_{arch}": added([results[arch][rank] for rank in ranks]) for arch in stub_runs.ARCHS}
    versions = {"torch": torch.__version__, "triton": triton.__version__, "date": f"{datetime.date.today()}"}
    RESULT.write_text(json.dumps(versions | cards, indent=1) + "\n", encoding="utf-8")
    table = Table(title="Launches of a layer on the stub driver")
    for column in ("", "card", "cases", "launches", "compiled kernels", "failed", "spill"):
        table.add_column(column, justify="right")
    for arch, card in cards.items():
        counts = (str(card[name]) for name in ("cases", "launches", "kernels"))
        table.add_row(arch, card["card"], *counts, str(len(card["failures"])), str(len(card["bytes spilled a thread"])))
    console.print(table)
    for card in cards.values():
        for failure in card["failures"]:
            console.print(card["card"], failure, style="red")
    console.print(f"{RESULT.relative_to(HERE.parent)} written")
    sys.exit(any(card["failures"] for card in cards.values()))


if __name__ == "__main__":
    main()
