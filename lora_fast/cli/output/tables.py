"""Tables that the terminal and the HTML page share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """An entry of a table. ``colour`` is the colour of the run that the cell names; ``strong`` marks the best
    value."""

    text: str
    colour: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows below a head. ``short`` lists the columns that a terminal shows; None shows all of them."""

    title: str
    head: list[Cell]
    rows: list[list[Cell]]
    short: list[int] | None = None
