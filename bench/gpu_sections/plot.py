"""Draws the picture of a run: a panel for each figure, with a bar for each provider."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

from gpu_sections.goals import TRAINING, WHOLE

OURS, OTHERS = "#cf4d8f", "#7f8896"
SECTIONS = ("gemm", "layers", "steps", "inverses", "grid", "with_compile", "small", "other_steps")
GROUPED = ("steps", "inverses", "small", "other_steps")  # sections whose figures already start with the op's name
FAR = 20  # largest ratio between two bars on a linear axis


class Panel(NamedTuple):
    """A panel of the picture. ``bars``: name → value. ``exposed``: the bars that include the host's time."""

    title: str
    unit: str
    bars: dict[str, float]
    exposed: frozenset[str] = frozenset()


def panels(results: dict) -> list[Panel]:
    """Returns the panels for some figures (section → figure → values)."""
    drawn = []
    for section in SECTIONS:
        for name, values in results.get(section, {}).items():
            rows = [row for row in values.get("rows", ()) if row["p50"] is not None]
            mode = "full" if any(row["mode"] == "full" for row in rows) else "forward"
            rows = [row for row in rows if row["mode"] == mode]
            what = "forward + backward, " if mode == "full" else ""
            title = name if section in GROUPED else f"{section}: {name}"
            exposed = frozenset(row["provider"] for row in rows if row["exposed"])
            unit = f"µs on the device, {what}median" + ("; hatched: with the host's" if exposed else "")
            drawn += [Panel(title, unit, {row["provider"]: row["p50"] for row in rows}, exposed)] if rows else []
    methods = results.get("training", {}).get(TRAINING, {})
    steps = {
        name: values["microseconds a step"][1]
        for name, values in methods.items()
        if isinstance(values, dict) and "host" in values
    }
    drawn += [Panel(f"training: {TRAINING}", "µs a step, median", steps)] if steps else []
    engines = results.get("whole", {}).get(WHOLE, {})
    speeds = {
        name: values["tokens a second"]
        for name, values in engines.items()
        if isinstance(values, dict) and "rounds" in values
    }
    return drawn + ([Panel(WHOLE, "tokens a second", speeds)] if speeds else [])


def draw(results: dict, path: Path) -> str:
    """Draws the picture. Returns its path, or why there is none, in words."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no picture: {error}"
    drawn = panels(results)
    if not drawn:
        return "no picture: no figure of a panel was measured"
    lines = -(-len(drawn) // 2)
    height = 0.5 + 0.24 * max(len(panel.bars) for panel in drawn)
    drawing = Figure(figsize=(15, lines * max(2.0, height)), layout="constrained")
    axes_of_panels = list(drawing.subplots(lines, 2, squeeze=False).flat)
    for panel, axes in zip(drawn, axes_of_panels, strict=False):
        colours = [OURS if name.startswith("ours") else OTHERS for name in panel.bars]
        hatches = ["//" if name in panel.exposed else "" for name in panel.bars]
        bars = axes.barh(list(panel.bars), list(panel.bars.values()), color=colours, hatch=hatches, edgecolor="white")
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        unit, least, most = panel.unit, min(panel.bars.values()), max(panel.bars.values())
        if most > FAR * least:
            axes.set_xscale("log")
            axes.set_xlim(least / 2, most * 4)
            unit += "; logarithmic"
        else:
            axes.margins(x=0.14)
        axes.set_title(textwrap.fill(panel.title, 70), fontsize=10)
        axes.set_xlabel(unit, fontsize=8)
        axes.invert_yaxis()
    for axes in axes_of_panels[len(drawn) :]:
        axes.set_axis_off()
    drawing.savefig(path, dpi=100)
    return f"picture: {path}"
