"""A table, for the terminal and the page alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """``colour``: that of the run it names. ``strong``: the best of its kind."""

    text: str
    colour: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a head. ``short``: the columns for a terminal; None for all."""

    title: str
    head: list[Cell]
    rows: list[list[Cell]]
    short: list[int] | None = None
