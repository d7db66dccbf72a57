"""A progress bar for commands that do several things in a row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .terminal import Display


class Bar:
    """Shows the current activity (``doing``) and the number of parts that are done (``advance``)."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._task = progress, progress.add_task("", total=total)

    def doing(self, text: str) -> None:
        """Shows ``text`` as the current activity."""
        self._progress.update(self._task, description=text)

    def advance(self) -> None:
        """Counts one more part as done."""
        self._progress.advance(self._task)


@contextlib.contextmanager
def bar(display: Display, total: int) -> Iterator[Bar]:
    """Yields a bar of ``total`` parts, which disappears when the block ends. Shows nothing if the output is not a
    terminal."""
    console = display.console
    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, total)
