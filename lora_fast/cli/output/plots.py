"""Draws the plots of the HTML pages as inline SVG. Text and axes take the colour of the page's text, so that they are
readable on light and on dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

_INK = "#010203"  # a colour that nothing else uses: _svg replaces it by currentColor
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",  # text stays text: it is searchable and takes the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.color": _INK,
    "legend.frameon": False,
}
_WIDTH, _WIDE = 6, 12.4  # inches: one column of the page, and both
MOST_NUMBERS = 40  # that fit side by side into a wide drawing
_LETTERS = {_WIDTH: 62, _WIDE: 140}  # characters of legend text that fit into one row


@dataclass(frozen=True)
class Series:
    """A line to draw. ``look`` holds keyword arguments for matplotlib's ``plot``. ``band`` holds the lower and the
    upper values of a shaded area around the line."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    look: Mapping[str, object] = field(default_factory=dict)
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Bar:
    """A bar with ``text`` at its end. ``span``, a lower and an upper value, is drawn as a whisker."""

    label: str
    colour: str
    value: float
    text: str
    span: tuple[float, float] | None = None


def lines(
    name: str, series: list[Series], x: str, y: str, *, wide: bool = False, log: bool = False, zero: bool = False
) -> str:
    """Draws lines over steps, with the legend above them. ``name`` must be unique on the page. ``zero`` starts the y
    axis at 0."""

    def draw(axes):
        for line in series:
            axes.plot(line.x, line.y, color=line.colour, label=line.label, **line.look)
            if line.band is not None:
                axes.fill_between(line.x, *line.band, color=line.colour, alpha=0.15, linewidth=0)
        axes.set(xlabel=x, ylabel=y)
        if log:
            axes.set_yscale("log")
        if zero:
            axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)  # 1 if all values are 0: an empty range is an error
        _whole_numbers(axes.xaxis)

    return _svg(name, draw, _WIDE if wide else _WIDTH, legend=[line.label for line in series])


def bars(name: str, values: list[Bar], x: str) -> str:
    """Draws horizontal bars, the first one on top."""

    def draw(axes):
        places = range(len(values))
        axes.barh(places, [bar.value for bar in values], color=[bar.colour for bar in values], height=0.6)
        ends = [max(bar.value, bar.span[1] if bar.span else 0) for bar in values]
        for place, bar, end in zip(places, values, ends, strict=True):
            if bar.span:
                axes.plot(bar.span, [place, place], color=_INK, linewidth=1.2, alpha=0.7)
            axes.annotate(bar.text, (end, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, [bar.label for bar in values])
        axes.set(xlabel=x, xlim=(0, max(ends) * 1.4 or 1), ylim=(len(values) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)

    return _svg(name, draw, _WIDTH, height=max(2.4, 1 + 0.32 * len(values)))


def cells(name: str, rows: list[str], columns: list[int], values: list[list[float]], x: str, unit: str) -> str:
    """Draws ``values[row][column]`` as a wide table of coloured cells. The colour scale runs from 0 to the largest
    value, and NaN stays empty. The cells also contain the numbers if there are at most MOST_NUMBERS columns."""

    def draw(axes):
        import matplotlib

        top = max((value for row in values for value in row if not math.isnan(value)), default=0) or 1
        scale = matplotlib.colormaps["viridis"].resampled(20)
        mesh = axes.pcolormesh(values, cmap=scale, vmin=0, vmax=top, edgecolor=_INK, linewidth=0.2)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if len(columns) <= MOST_NUMBERS and not math.isnan(value):
                    ink = "white" if value < 0.6 * top else "black"
                    text = f"{value:.0f}" if top >= 10 else f"{value:.2g}"
                    axes.text(j + 0.5, i + 0.5, text, color=ink, ha="center", va="center", fontsize=8)
        spacing = -(-len(columns) // MOST_NUMBERS)  # columns between two tick labels, so that they do not overlap
        axes.set_xticks([j + 0.5 for j in range(0, len(columns), spacing)], columns[::spacing])
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set(xlabel=x)
        axes.figure.colorbar(mesh, ax=axes, label=unit, fraction=0.03, pad=0.01).outline.set_visible(False)

    return _svg(name, draw, _WIDE, height=1.2 + 0.28 * len(rows))


def _whole_numbers(axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _svg(name: str, draw: Callable, width: float, height: float = 3.2, legend: Sequence[str] = ()) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    columns = max(1, _LETTERS[width] // (6 + max(map(len, legend), default=0)))
    rows = -(-len(legend) // columns)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):  # the same ids at every call
        figure = Figure(figsize=(width, height + 0.2 * rows), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if len(legend) > 1:
            figure.legend(loc="outside upper left", ncols=columns)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(
        _INK, "currentColor"
    )  # without the XML prologue, which is not allowed within HTML
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)  # ids are unique on a page of several drawings
