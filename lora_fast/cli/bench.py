"""``lora-fast bench`` runs the suite in bench/, which is part of the repository but not of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .output.terminal import Display, exit_codes

SUITE = Path(__file__).resolve().parents[2] / "bench" / "run.py"

_OPS = (
    "The ops to time: project, linear, grads, layer, decode, dora, experts, gram, solve, hadamard, cayley, step, "
    "merge. The default is all."
)
_QUICK = "Time one case of each op, for rough figures within a minute on a CPU."
_COMPARE = "An earlier bench.json. Changes beyond noise are marked."
_OUTPUT = "A new folder for the results. The default is the next free runs/bench-N."


def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="OP", help=_OPS, show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help=_QUICK)] = False,
    compare: Annotated[Path | None, typer.Option(help=_COMPARE)] = None,
    output: Annotated[Path | None, typer.Option(help=_OUTPUT)] = None,
) -> None:
    """Time every op beside eager torch, torch.compile, PEFT and a hand-written autograd function.

    On a GPU it times the Triton kernels, at the sizes of real models. On a CPU it times their torch twins at smaller
    sizes, in about two minutes, and counts the traffic and the launches of the kernels in Triton's interpreter. The
    tests of the ops run first. If one fails, nothing is timed. Writes bench.json, bench.csv, plots and a page.

    **Examples**

    - `lora-fast bench --quick`

        times one case of each op

    - `lora-fast bench layer step --compare runs/bench-1/bench.json`

        times two ops, and marks what has changed since an earlier run
    """
    if not SUITE.exists():
        message = f"lora-fast bench: there is no {SUITE}. The suite is part of the repository, not of the package."
        typer.echo(f"{message} Clone the repository and run `pip install -e '.[bench]'` in it.", err=True)
        raise typer.Exit(2)
    with exit_codes(Display()):
        _check_kernels()
    command = [sys.executable, str(SUITE), *(ops or [])]  # a process whose sys.path starts at bench/
    command += ["--quick"] if quick else []
    for name, value in (("--compare", compare), ("--output", output)):
        command += [name, str(value)] if value else []
    raise typer.Exit(subprocess.run(command).returncode)


def _check_kernels() -> None:
    """Raises BackendError if the kernels cannot run here: on the GPU or, where there is none, in the interpreter."""
    import torch

    from .. import platforms

    on_gpu = torch.cuda.is_available()
    obstacle = platforms.obstacle(torch.device("cuda")) if on_gpu else platforms.triton_obstacle()
    platforms.require("lora-fast bench", obstacle)
