"""The result of an experiment: rows "paper / ours / verdict", plots, and notes on how it was done.

A verdict is "within a factor of two", "missed by ×N", "same order" or "less than in the paper" on other hardware, "as
in the paper", "not as in the paper", or, where the paper has no number, "no number to compare with".
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ...output import palette

FACTOR, ORDER = (
    2.0,
    10.0,
)  # up to these factors a number is "the same" on the same problem, "same order" on other hardware


@dataclass(frozen=True)
class Row:
    """A line of the table. ``met``: whether our value agrees with the paper's; None where the paper has no value."""

    what: str
    paper: str
    ours: str
    verdict: str
    met: bool | None


@dataclass(frozen=True)
class Plot:
    """A drawing; ``png`` is the content of its file."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Result:
    """The result of an experiment.

    Attributes:
        source: the paper and its figure or table. notes: problem, settings, statistics, conditions.
        data: further numbers, for the JSON file.
    """

    source: str
    rows: list[Row]
    plots: list[Plot]
    notes: list[str]
    data: dict = field(default_factory=dict)


def compared(what: str, paper: float, ours: float) -> Row:
    """Compares two values of the same problem, which must agree within a factor of two on any machine."""
    factor = _factor(ours, paper)
    verdict = "within a factor of two" if factor <= FACTOR else f"missed by {_times(factor)}{_side(ours, paper)}"
    return Row(what, number(paper), number(ours), verdict, factor <= FACTOR)


def overhead(what: str, paper: float, ours: float) -> Row:
    """Compares two times over plain LoRA's, measured on different machines, by how much they exceed 1."""
    factor = _factor(ours - 1, paper - 1)
    if factor <= ORDER:
        verdict, met = "same order, other hardware", True
    elif ours < paper:
        verdict, met = "less than in the paper, other hardware", True
    else:
        verdict, met = f"missed by {_times(factor)}, other hardware", False
    return Row(what, f"{paper:.2f}", f"{ours:.3f}", verdict, met)


def claim(what: str, paper: str, ours: str, holds: bool) -> Row:
    """Compares with a statement of the paper in words."""
    return Row(what, paper, ours, "as in the paper" if holds else "not as in the paper", holds)


def unmatched(what: str, ours: str) -> Row:
    """Returns a row for a figure of ours for which the paper has no number."""
    return Row(what, "–", ours, "no number to compare with", None)


def number(value: float) -> str:
    """Formats a number with three significant digits, very large and very small ones as powers of ten."""
    if not math.isfinite(value):
        return "diverged"
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def draw(name: str, caption: str, paint: Callable, panels: int = 1) -> Plot:
    """Draws a plot. ``paint`` takes the axes, or the list of axes where there are several ``panels`` side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "axes.prop_cycle": matplotlib.cycler(color=palette.COLOURS),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4 if panels == 1 else 4.8 * panels, 4), layout="constrained")
        axes = figure.subplots(1, panels)
        paint(axes)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150)
    return Plot(name, caption, out.getvalue())


def _factor(ours: float, paper: float) -> float:
    """Returns the larger over the smaller value, or infinity if either is not a positive number."""
    if not (math.isfinite(ours) and math.isfinite(paper) and ours > 0 and paper > 0):
        return math.inf
    return max(ours / paper, paper / ours)


def _times(factor: float) -> str:
    return f"×{number(factor)}" if math.isfinite(factor) else "any factor"


def _side(ours: float, paper: float) -> str:
    return " (lower)" if ours < paper else " (higher)"
