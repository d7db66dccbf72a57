"""lora-fast reproduce: runs the experiments one after the other and writes the page, the plots and the numbers. Each
experiment is a file in experiments/."""

from __future__ import annotations

import base64
import importlib
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...checks import ArgumentError
from ..output import pages, run_folder
from ..output.terminal import Display, Interrupted, exit_codes
from .experiments import EXPERIMENTS

if TYPE_CHECKING:
    from .experiments.result import Result, Row

PAGE, RESULTS = "reproduce.html", "reproduce.json"
EPILOG = "**Experiments**\n\n" + "\n\n".join(f"- `{name}`: {what}" for name, (_, what) in EXPERIMENTS.items())

_NAMES = "The experiments to run, listed below; all of them by default."
_QUICK = "Run less of everything, in a minute or two; the figures are rougher."
_OUTPUT = "A new folder for the results; by default the next number in runs/."


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment, or the text of its error."""

    name: str
    what: str
    seconds: float
    result: Result | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, object]:
        values = {"what": self.what, "seconds": self.seconds, "error": self.error}
        if self.result is not None:
            rows = [asdict(row) for row in self.result.rows]
            plots = [f"{plot.name}.png" for plot in self.result.plots]
            values |= {"source": self.result.source, "rows": rows, "plots": plots, "notes": self.result.notes}
            values["data"] = self.result.data
        return values


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help=_NAMES, show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help=_QUICK)] = False,
    output: Annotated[Path | None, typer.Option(help=_OUTPUT)] = None,
) -> None:
    """Repeat experiments of the methods' papers, as far as possible without a GPU and a network.

    Runs each experiment (all of them take many minutes on a CPU) and compares its numbers with the paper's. Writes
    reproduce.html with the table and the plots, the plots as PNG, and reproduce.json into a folder. Seeds are fixed.
    Timings are accurate only on a quiet machine. Ctrl-C keeps the finished experiments; an experiment that fails is
    reported, and the others go on.

    **Examples**

    - `lora-fast reproduce`

        runs all experiments

    - `lora-fast reproduce --quick`

        runs all experiments with fewer steps

    - `lora-fast reproduce scalora-regression balora-factorisation`

        runs two experiments that need neither a model nor a text
    """
    display = Display()
    with exit_codes(display):
        chosen = list(dict.fromkeys(names or EXPERIMENTS))
        for name in chosen:
            if name not in EXPERIMENTS:
                raise ArgumentError("NAME", f"some of {', '.join(EXPERIMENTS)}", repr(name))
        folder = output or run_folder.fresh("reproduce", "papers")
        run_folder.check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes, interrupted = run(chosen, quick, folder, display)
    failed = [outcome.name for outcome in outcomes if outcome.error]
    if outcomes:
        display.note(f"\npage      {folder / PAGE}\nnumbers   {folder / RESULTS}")
    if interrupted:
        display.note(f"Interrupted: {len(outcomes)} of {len(chosen)} experiments have finished.")
        raise typer.Exit(130)
    if failed:
        display.error(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


def run(names: list[str], quick: bool, folder: Path, display: Display) -> tuple[list[Outcome], bool]:
    """Runs the experiments and writes the files again after each.

    Returns:
        The outcomes of the experiments that ended, and whether Ctrl-C ended the run before the others.
    """
    from .experiments.session import Session

    session = Session(folder, quick, display)
    outcomes: list[Outcome] = []
    for name in names:
        display.note(f"\n{name}", style="bold")
        try:
            outcomes.append(attempt(name, session))
        except (KeyboardInterrupt, Interrupted):
            return outcomes, True
        write(folder, outcomes, quick)
        if outcomes[-1].error:
            display.error(outcomes[-1].error)
        else:
            display.console.print(table(outcomes[-1].result.rows))
    return outcomes, False


def attempt(name: str, session) -> Outcome:
    """Runs an experiment. An error in it becomes its outcome, with the traceback."""
    module, what = EXPERIMENTS[name]
    start = time.perf_counter()
    try:
        result = importlib.import_module(f".experiments.{module}", __package__).run(session)
    except Interrupted:
        raise
    except ArgumentError as error:
        return Outcome(name, what, time.perf_counter() - start, error=str(error))
    except Exception:
        return Outcome(name, what, time.perf_counter() - start, error=traceback.format_exc())
    return Outcome(name, what, time.perf_counter() - start, result)


def table(rows: list[Row]):
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "paper", "ours", "verdict"):
        shown.add_column(heading)
    for row in rows:
        style = {True: "green", False: "red", None: "dim"}[row.met]
        shown.add_row(Text(row.what), row.paper, row.ours, Text(row.verdict, style=style))
    return shown


def write(folder: Path, outcomes: list[Outcome], quick: bool) -> None:
    """Writes the page, the numbers and the plots of all outcomes so far."""
    from ...measure.machine import environment

    machine = environment()
    plots = [plot for outcome in outcomes if outcome.result for plot in outcome.result.plots]
    for plot in plots:
        (folder / f"{plot.name}.png").write_bytes(plot.png)
    images = {plot.name: base64.b64encode(plot.png).decode() for plot in plots}
    text = pages.render(
        "reproduce/reproduce.html.jinja",
        outcomes=outcomes,
        images=images,
        environment=machine,
        quick=quick,
        results=RESULTS,
    )
    experiments = {outcome.name: outcome.as_dict() for outcome in outcomes}
    run_folder.write_json(folder / RESULTS, {"environment": machine, "quick": quick, "experiments": experiments})
    run_folder.write_text(folder / PAGE, text)
