"""Gives each run one colour in the terminal, the tables and the plots. The colours are readable on light and on
dark."""

from __future__ import annotations

from collections.abc import Iterable

COLOURS = (
    "#2f7de1",  # blue
    "#e0802f",  # orange
    "#2c9c61",  # green
    "#cf4d8f",  # pink
    "#8a6be6",  # violet
    "#12a3b4",  # teal
    "#d8474b",  # red
    "#a08a18",  # olive
    "#7f8896",  # grey
)


def colours(labels: Iterable[str]) -> dict[str, str]:
    """Maps each label to a colour, in order. The tenth label gets the first colour again."""
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
