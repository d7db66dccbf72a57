"""lora-fast bench: runs the suite in bench/, which comes with the repository and not with the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

SUITE = Path(__file__).resolve().parents[2] / "bench" / "run.py"

_OPS = "Which ops: all, if none is given (project, linear, grads, layer, gram, solve, hadamard, cayley, step, merge)."
_QUICK = "One case an op, within a minute on a CPU: rough figures."
_COMPARE = "An earlier bench.json: mark what changed beyond noise."
_OUTPUT = "A new folder for the results: if not given, the next runs/bench-N."


def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="OP", help=_OPS, show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help=_QUICK)] = False,
    compare: Annotated[Path | None, typer.Option(help=_COMPARE)] = None,
    output: Annotated[Path | None, typer.Option(help=_OUTPUT)] = None,
) -> None:
    """Time every op beside eager torch, torch.compile, PEFT and a hand-written autograd function.

    On a GPU: the Triton kernels, at the sizes of real models. On a CPU: their torch twins at smaller sizes (about two
    minutes), and the kernels' traffic and launches counted in Triton's interpreter. The tests of an op run first: no
    numbers on a red test. Leaves bench.json, bench.csv, plots and a page.

    **Examples**

    - `lora-fast bench --quick`

        one case an op

    - `lora-fast bench layer step --compare runs/bench-1/bench.json`

        two ops, and what has changed since an earlier run
    """
    if not SUITE.exists():
        message = f"no {SUITE}: the suite comes with the repository, and lora_fast was installed without it"
        typer.echo(f"lora-fast bench: {message}. Clone it and run `pip install -e '.[bench]'` there.", err=True)
        raise typer.Exit(2)
    command = [sys.executable, str(SUITE), *(ops or [])]
    command += ["--quick"] if quick else []
    for name, value in (("--compare", compare), ("--output", output)):
        command += [name, str(value)] if value else []
    raise typer.Exit(subprocess.run(command).returncode)
