"""The session that every experiment is given: its folder, its extent, and a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...finetune.record import Record
from ...output import progress
from ...output.terminal import Display


@dataclass(frozen=True)
class Session:
    """A call of ``lora-fast reproduce``.

    Attributes:
        folder: of all results. quick: whether experiments run less of everything.
        trained: method → record of its training run, for experiments that share runs (finetunes.py).
    """

    folder: Path
    quick: bool
    display: Display
    trained: dict[str, Record] = field(default_factory=dict)

    @contextlib.contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """Shows a bar of ``total`` parts and yields the function that marks one part as done."""
        with progress.bar(self.display, total) as bar:
            bar.doing(text)
            yield bar.advance


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread inside, since on small matrices more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
