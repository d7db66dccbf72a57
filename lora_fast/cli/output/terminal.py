"""The terminal: one progress bar, short notes, errors in one paragraph."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING

import rich.table
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ...checks import ArgumentError
from ..inputs.settings import Run
from .palette import colours

if TYPE_CHECKING:
    from ..finetune.record import Record
    from .tables import Table


class Interrupted(Exception):
    """Ctrl-C. Its argument: the folder to resume from, or None if nothing was written."""


class Diverged(Exception):
    """The loss is not a finite number any more. ``record``: the run until then."""

    def __init__(self, message: str, record: Record):
        super().__init__(message)
        self.record = record


@contextlib.contextmanager
def exit_codes(display: Display) -> Iterator[None]:
    """Foreseen ends become a paragraph and an exit code: 2 for input that does not fit, 1 for a run that diverged, 130
    for Ctrl-C. Anything else keeps its traceback."""
    try:
        yield
    except ArgumentError as error:
        display.error(str(error))
        raise typer.Exit(2) from None
    except Diverged as error:
        display.error(str(error))
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, Interrupted) as error:
        folder = error.args[0] if error.args else None
        if folder is None:
            display.note("Interrupted: nothing has been written.")
        else:
            display.note("Interrupted. Go on with:")
            display.note(f"  lora-fast finetune --output {shlex.quote(str(folder))} --resume", style="cyan")
        raise typer.Exit(130) from None


class _Bar(Progress):
    """A progress bar with a line below it, while there is one."""

    below = ""

    def get_renderables(self):
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim")


class Display:
    """Progress of one run after the other. Where no terminal listens, only the notes remain."""

    def __init__(self):
        self.console = Console(highlight=False)
        self._progress: _Bar | None = None

    def note(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def error(self, text: str) -> None:
        Console(stderr=True, highlight=False).print(f"Error: {text}", style="red", markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        self.console.print(_table(table))

    def working(self, text: str):
        """A spinner while the block runs."""
        return self.console.status(text)

    @contextlib.contextmanager
    def training(self, run: Run, runs: list[Run], total: int, done: int) -> Iterator[None]:
        colour = colours(other.label for other in runs)[run.label]
        place = f"{runs.index(run) + 1}/{len(runs)} " if len(runs) > 1 else ""
        columns = (
            TextColumn(f"{place}[{colour}]{literal(run.label)}[/] {{task.description:<13}}"),
            BarColumn(bar_width=None, complete_style=colour, finished_style=colour),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        with _Bar(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            self._progress = progress
            self._task = progress.add_task("held-out loss", total=total, completed=done, figures="")
            yield
        self._progress = None

    def evaluating(self) -> None:
        self._progress.update(self._task, description="held-out loss")

    def step(self, step: int, loss: float, seconds: float) -> None:
        figures = f"loss {loss:.3f} · {seconds:.2f} s/step"
        self._progress.update(self._task, completed=step, figures=figures)

    def bounds(self, used: list[float]) -> None:
        """``used``: how much of its bound each norm-bounded layer uses, 0 to 1."""
        if used:
            self._progress.below = f"  of the layers' bounds used: mean {fmean(used):.1%}, most {max(used):.1%}"

    def held_out(self, step: int, loss: float) -> None:
        self.note(f"  step {step:>4}   held-out loss {loss:.3f}", style="dim")
        self._progress.update(self._task, description="training")


def _table(content: Table) -> rich.table.Table:
    table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=content.title, title_justify="left")
    shown = range(len(content.head)) if content.short is None else content.short
    for i in shown:
        table.add_column(Text(content.head[i].text, style=content.head[i].colour), no_wrap=i == 0, vertical="bottom")
    for row in content.rows:
        table.add_row(*(Text(row[i].text, style=row[i].colour or ("bold" if row[i].strong else "")) for i in shown))
    return table


def literal(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
