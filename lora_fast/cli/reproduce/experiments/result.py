"""What an experiment hands back: rows "paper / ours / verdict", plots, and how it was done.

A verdict is one of: within a factor of two; missed by ×N; same order (or less) on other hardware; as in the paper; not
as in the paper; or, where a paper shows no number, none.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ...output import palette

FACTOR, ORDER = 2.0, 10.0  # what counts as the same number on the same problem; as the same order on other hardware


@dataclass(frozen=True)
class Row:
    """One line of the table. ``met``: whether ours is what the paper shows; None where there is nothing to compare."""

    what: str
    paper: str
    ours: str
    verdict: str
    met: bool | None


@dataclass(frozen=True)
class Plot:
    """A drawing beside a figure of a paper: ``png`` is the file's content."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Result:
    """``source``: which paper shows it, and where. ``notes``: problem, settings, statistics, conditions. ``data``: more
    numbers, for the JSON file."""

    source: str
    rows: list[Row]
    plots: list[Plot]
    notes: list[str]
    data: dict = field(default_factory=dict)


def compared(what: str, paper: float, ours: float) -> Row:
    """The same problem on any machine: within a factor of two, either way, or missed."""
    far = _apart(ours, paper)
    verdict = "within a factor of two" if far <= FACTOR else f"missed by {_times(far)}{_side(ours, paper)}"
    return Row(what, number(paper), number(ours), verdict, far <= FACTOR)


def overhead(what: str, paper: float, ours: float) -> Row:
    """Time over the time of plain LoRA, measured on another machine: what exceeds 1 is compared."""
    far = _apart(ours - 1, paper - 1)
    if far <= ORDER:
        verdict, met = "same order, other hardware", True
    elif ours < paper:
        verdict, met = "less than in the paper, other hardware", True
    else:
        verdict, met = f"missed by {_times(far)}, other hardware", False
    return Row(what, f"{paper:.2f}", f"{ours:.3f}", verdict, met)


def claim(what: str, paper: str, ours: str, holds: bool) -> Row:
    """What the paper says in words."""
    return Row(what, paper, ours, "as in the paper" if holds else "not as in the paper", holds)


def noted(what: str, ours: str) -> Row:
    """A figure of ours for which no paper has a number."""
    return Row(what, "–", ours, "no number to compare with", None)


def number(value: float) -> str:
    """Three significant digits; powers of ten for the very large and the very small."""
    if not math.isfinite(value):
        return "diverged"
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def draw(name: str, caption: str, paint: Callable, panels: int = 1) -> Plot:
    """``paint`` gets the axes: one, or a list of ``panels`` side by side."""
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


def _apart(ours: float, paper: float) -> float:
    """How many times the one is the other, at least 1; infinite where either is not a positive number."""
    if not (math.isfinite(ours) and math.isfinite(paper) and ours > 0 and paper > 0):
        return math.inf
    return max(ours / paper, paper / ours)


def _times(far: float) -> str:
    return f"×{number(far)}" if math.isfinite(far) else "any factor"


def _side(ours: float, paper: float) -> str:
    return " (lower)" if ours < paper else " (higher)"
