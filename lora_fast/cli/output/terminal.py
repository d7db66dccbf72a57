"""Prints to the terminal: one progress bar, short notes, tables, and errors of one paragraph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING

import rich.table
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ...checks import ArgumentError, BackendError, MissingPackageError
from .palette import colours

if TYPE_CHECKING:
    from .tables import Table


class Interrupted(Exception):
    """Ctrl-C ended the command. The argument is the command line that continues it, or None if nothing was written."""


class RunFailed(Exception):
    """A run ended without a result, for a reason that the message explains."""


@contextlib.contextmanager
def exit_codes(display: Display) -> Iterator[None]:
    """Turns the foreseen errors into a paragraph and an exit code: 2 for invalid input or a missing package, 1 for a
    run that failed, 130 for Ctrl-C. Any other exception keeps its traceback."""
    try:
        yield
    except (ArgumentError, BackendError, MissingPackageError) as error:
        display.error(str(error))
        raise typer.Exit(2) from None
    except RunFailed as error:
        display.error(str(error))
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, Interrupted) as error:
        command = error.args[0] if error.args else None
        if command is None:
            display.note("Interrupted. Nothing has been written.")
        else:
            display.note("Interrupted. Continue with:")
            display.note(f"  {command}", style="cyan")
        raise typer.Exit(130) from None


class _BarWithLine(Progress):
    """A progress bar with a line of text below it, if the text is not empty."""

    below = ""

    def get_renderables(self):
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim")


class Display:
    """Shows the progress of runs that follow each other. If the output is not a terminal, only the notes are
    printed."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self._progress: _BarWithLine | None = None  # the bar of the run that is shown

    def note(self, text: str, style: str = "") -> None:
        """Prints ``text`` as it is: without markup, and without line breaks that a copied command would contain."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def error(self, text: str) -> None:
        """Prints ``text`` as an error, to standard error."""
        Console(stderr=True, highlight=False).print(f"Error: {text}", style="red", markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Prints a table, reduced to its ``short`` columns."""
        self.console.print(_rich_table(table))

    def working(self, text: str):
        """Returns a context manager that shows a spinner and ``text``."""
        return self.console.status(text)

    @contextlib.contextmanager
    def training(self, label: str, labels: list[str], total: int, done: int) -> Iterator[None]:
        """Shows a progress bar for the run ``label``, one of ``labels``, with ``done`` of its ``total`` steps done."""
        colour = colours(labels)[label]
        position = f"{labels.index(label) + 1}/{len(labels)} " if len(labels) > 1 else ""
        columns = (
            TextColumn(f"{position}[{colour}]{escape_markup(label)}[/] {{task.description:<13}}"),
            BarColumn(bar_width=None, complete_style=colour, finished_style=colour),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        with _BarWithLine(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            self._progress = progress
            self._task = progress.add_task("held-out loss", total=total, completed=done, figures="")
            yield
        self._progress = None

    @property
    def _bar(self) -> _BarWithLine:
        assert self._progress is not None, "training() must be open while steps are shown"
        return self._progress

    def evaluating(self) -> None:
        """Shows that the held-out loss is being computed."""
        self._bar.update(self._task, description="held-out loss")

    def step(self, step: int, loss: float, seconds: float) -> None:
        """Shows that ``step`` is done, with its training loss and its duration."""
        figures = f"loss {loss:.3f} · {seconds:.2f} s/step"
        self._bar.update(self._task, completed=step, figures=figures)

    def bounds(self, used: list[float]) -> None:
        """Shows the shares, 0 to 1, that norm-bounded layers use of their bounds; nothing if there are no such
        layers."""
        if used:
            self._bar.below = f"  of the layers' bounds used: mean {fmean(used):.1%}, most {max(used):.1%}"

    def held_out(self, step: int, loss: float) -> None:
        """Prints the held-out loss after ``step`` steps."""
        self.note(f"  step {step:>4}   held-out loss {loss:.3f}", style="dim")
        self._bar.update(self._task, description="training")


def _rich_table(content: Table) -> rich.table.Table:
    table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=content.title, title_justify="left")
    shown = range(len(content.head)) if content.short is None else content.short
    for i in shown:
        table.add_column(Text(content.head[i].text, style=content.head[i].colour), no_wrap=i == 0, vertical="bottom")
    for row in content.rows:
        table.add_row(*(Text(row[i].text, style=row[i].colour or ("bold" if row[i].strong else "")) for i in shown))
    return table


def escape_markup(text: str) -> str:
    """Returns ``text`` on one line, with square brackets that rich does not take for markup."""
    return escape(" ".join(text.split()))
