"""The report's figures of norm-bounded layers: the share of its bound that each layer uses."""

from __future__ import annotations

import math

from ..inputs import method_options
from ..output.palette import colours
from ..output.plots import Series, cells, lines
from .record import Record


def figures(runs: list[Record]) -> list[tuple[str, str, str]]:
    """Returns (heading, caption, wide drawing) of each figure: one over the steps, and one over the layers for each run
    that has bounds."""
    bounded = [run for run in runs if run.bounds]
    if not bounded:
        return []
    caption = "‖ΔW‖ over its bound, at most 100 %. The line is the mean over the layers; the area spans all layers."
    return [
        ("Bound used, over the steps", caption, _over_steps(runs, bounded)),
        *(_by_layer(run, i, several=len(bounded) > 1) for i, run in enumerate(bounded)),
    ]


def _over_steps(runs: list[Record], bounded: list[Record]) -> str:
    colour = colours(run.label for run in runs)
    series = []
    for run in bounded:
        curves = [run.curve(f"adapter/bound_used_{figure}") for figure in ("mean", "min", "max")]
        mean, low, high = ([100 * used for used in values] for _, values in curves)
        series.append(Series(run.label, colour[run.label], curves[0][0], mean, {"marker": "o"}, band=(low, high)))
    return lines("bounds", series, "steps done", "% of the bound", wide=True, zero=True)


def _by_layer(run: Record, i: int, several: bool) -> tuple[str, str, str]:
    places, used = _places(list(run.bounds)), run.bounds_used()
    rows = list(dict.fromkeys(kind for kind, _ in places.values()))
    columns = sorted({depth for _, depth in places.values()})
    values = [[math.nan] * len(columns) for _ in rows]
    for name, (kind, depth) in places.items():
        values[rows.index(kind)][columns.index(depth)] = 100 * used[name]
    heading = "Bound used, by layer at the end" + (f": {run.label}" if several else "")
    norm, bounds = next(iter(run.bounds.values()))["norm"], [row["bound"] for row in run.bounds.values()]
    caption = (
        f"{method_options.describe_bounds(norm, bounds)}. metrics.json has each bound, and each norm over the steps."
    )
    return heading, caption, cells(f"layers-{i}", rows, columns, values, "depth", "% of the bound")


def _places(names: list[str]) -> dict[str, tuple[str, int]]:
    """Maps each layer to its kind and its depth: ``model.layers.7.mlp.up_proj`` → ("mlp.up_proj", 7). The depth is the
    first number in the name. The kind is the name without this number and without the prefix that all names share."""
    kinds, depths = {}, {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        depths[name] = 0 if number is None else int(parts[number])
        kinds[name] = parts if number is None else parts[:number] + parts[number + 1 :]
    shared, longest = 0, min(map(len, kinds.values())) - 1  # at least the last part stays in the kind
    while shared < longest and len({kind[shared] for kind in kinds.values()}) == 1:
        shared += 1
    return {name: (".".join(kinds[name][shared:]), depths[name]) for name in names}
