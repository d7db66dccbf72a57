"""The report's plots as inline SVG. Text and axes take the page's own colour, so they read on light and on dark."""

from __future__ import annotations

import io
import re

from .measure import Record

COLOURS = {"fused": "#2f7de1", "eager": "#e0802f"}
_INK = "#010203"  # drawn with this, served as currentColor
_STYLE = {
    "svg.fonttype": "none",
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
# Where both engines agree, the second line would hide the first: the eager one is broad and pale, the fused one thin.
_WIDTH = {"fused": {"linewidth": 1.6, "zorder": 3}, "eager": {"linewidth": 5, "alpha": 0.45, "zorder": 2}}


def loss(runs: list[Record], wide: bool) -> str:
    """Training loss of each step, held-out loss where it was taken."""

    def draw(axes):
        for run in runs:
            look = {"color": COLOURS[run.engine], **_WIDTH[run.engine]}
            axes.plot(range(len(run.losses)), run.losses, label=f"{run.engine}, training", **look)
            look |= {"linestyle": "--", "marker": "o", "markersize": 5 if run.engine == "fused" else 10}
            axes.plot(*zip(*run.held_out, strict=True), label=f"{run.engine}, held out", **look)
        axes.set(xlabel="steps done", ylabel="loss (nats per token)")

    return _svg("loss", draw, width=12.4 if wide else 6)


def step_time(runs: list[Record]) -> str:
    def draw(axes):
        for run in runs:
            colour, median = COLOURS[run.engine], run.step_time()["median"]
            axes.plot(range(1, len(run.seconds) + 1), run.seconds, ".", color=colour, label=run.engine, markersize=6)
            axes.axhline(median, color=colour, linewidth=1.2, label=f"{run.engine}, median {median:.3g} s")
        axes.set(xlabel="step", ylabel="seconds", ylim=(0, 1.35 * max(max(run.seconds) for run in runs)))

    return _svg("time", draw)


def saved(runs: list[Record]) -> str:
    def draw(axes):
        values = [run.saved_bytes / 2**20 for run in runs]
        names = [run.engine for run in runs]
        bars = axes.barh(names, values, color=[COLOURS[name] for name in names], height=0.5)
        axes.bar_label(bars, fmt="%.1f MiB", padding=4)
        axes.set(xlabel="MiB", xlim=(0, max(values) * 1.25), ylim=(1.6, -0.6))  # downwards
        axes.grid(axis="y", visible=False)

    return _svg("saved", draw, legend=False, steps=False)


def memory(runs: list[Record]) -> str:
    def draw(axes):
        for run in runs:
            steps = range(1, len(run.memory) + 1)
            axes.plot(steps, [size / 2**20 for size in run.memory], color=COLOURS[run.engine], label=run.engine)
        axes.set(xlabel="step", ylabel="MiB", ylim=(0, 1.35 * max(max(run.memory) for run in runs) / 2**20))

    return _svg("memory", draw)


def _svg(name: str, draw, legend: bool = True, steps: bool = True, width: float = 6) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, 3.2), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if steps:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if legend:
            axes.legend(ncols=2)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")  # not the XML prologue: it names a DTD's address
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)  # several drawings share one page
