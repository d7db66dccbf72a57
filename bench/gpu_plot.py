"""The picture beside a results file of bench/gpu.py."""

from __future__ import annotations

from pathlib import Path

OURS, OTHERS = "#cf4d8f", "#7f8896"


def draw(results: dict, path: Path) -> str:
    """Bars of the layer's providers, one panel a case; returns where they are, or why there is no plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no plots: {error}"
    layers = results.get("layers", {}).get("figures", {})
    figures = {name: found["rows"] for name, found in layers.items() if "rows" in found}
    if not figures:
        return "no plots: the layer was not measured"
    lines = -(-len(figures) // 2)
    drawing = Figure(figsize=(13, 2.6 * lines), layout="constrained")
    panels = drawing.subplots(lines, 2, squeeze=False).flat
    for (name, rows), axes in zip(figures.items(), panels, strict=False):
        rows = [row for row in rows if row["mode"] == "full" and row["p50"] is not None]
        colours = [OURS if row["provider"].startswith("ours") else OTHERS for row in rows]
        bars = axes.barh([row["provider"] for row in rows], [row["p50"] for row in rows], color=colours)
        axes.bar_label(bars, fmt="{:.0f}", padding=3, fontsize=8)
        axes.margins(x=0.12)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("µs, forward + backward, median", fontsize=8)
        axes.invert_yaxis()
    for axes in panels:  # the last, of an odd number
        axes.set_axis_off()
    drawing.savefig(path, dpi=120)
    return f"plots: {path}"
