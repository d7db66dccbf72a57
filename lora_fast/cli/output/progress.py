"""One progress bar for a command that does several things in a row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .terminal import Display


class Bar:
    """``doing`` says what comes next; ``advance`` that one part is done."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._task = progress, progress.add_task("", total=total)

    def doing(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def advance(self) -> None:
        self._progress.advance(self._task)


@contextlib.contextmanager
def bar(display: Display, total: int) -> Iterator[Bar]:
    """``total``: the number of parts. Gone when the block ends; nothing is shown where no terminal listens."""
    console = display.console
    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, total)
