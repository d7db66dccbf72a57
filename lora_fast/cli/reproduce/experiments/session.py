"""What every experiment gets: where to write, how much to do, and a progress bar."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...finetune.record import Record
from ...output import progress
from ...output.terminal import Display


@dataclass(frozen=True)
class Session:
    """One call of ``lora-fast reproduce``.

    Attributes:
        folder: of all results. quick: less of everything.
        trained: method → record of its training run, for the experiments that look at the same runs.
    """

    folder: Path
    quick: bool
    display: Display
    trained: dict[str, Record] = field(default_factory=dict)

    @contextlib.contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of ``total`` parts; call what it gives once a part is done."""
        with progress.bar(self.display, total) as bar:
            bar.doing(text)
            yield bar.advance


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """While it is open, torch computes on one thread: on small matrices more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> str:
    """Conditions of a timing, in words: threads, and what else the machine was doing."""
    threads, cores, load = torch.get_num_threads(), os.cpu_count(), os.getloadavg()[0]
    busy = " (it was not quiet: the figures are rough)" if load > cores else ""
    return f"torch {torch.__version__} on {threads} of {cores} CPU cores, load average {load:.1f} before{busy}"
