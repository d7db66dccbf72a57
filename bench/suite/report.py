"""Writes the files of a run of the suite: bench.json, bench.csv (with Liger's columns), plots/*.svg and one
self-contained page, bench.html."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import jinja2

from lora_fast.cli.output import plots
from lora_fast.cli.output.palette import COLOURS, colours
from suite.cases import Case, from_dict
from suite.changes import Change

COLUMNS = (
    "kernel_name", "kernel_provider", "metric_name", "metric_unit", "kernel_operation_mode", "x_name", "x_label",
    "x_value", "y_value_20", "y_value_50", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp",
    "lora_fast_version",
)  # fmt: skip
MAIN = ("full", "forward")  # a case is shown in the first of these modes that it has


def write(folder: Path, run: dict, changes: list[Change]) -> None:
    """Writes all files into an existing folder."""
    (folder / "bench.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
    (folder / "bench.csv").write_text(as_csv(run), encoding="utf-8")
    drawn = draw(run["rows"])
    (folder / "plots").mkdir(exist_ok=True)
    for name, svg in drawn.items():
        (folder / "plots" / f"{file_name(name)}.svg").write_text(svg, encoding="utf-8")
    (folder / "bench.html").write_text(page(run, drawn, changes), encoding="utf-8")


def as_csv(run: dict) -> str:
    """Returns a line for each figure: the speed in every mode; memory, saved memory and error of every provider."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    where = run["environment"]
    for row in measured(run["rows"]):
        case = from_dict(row["case"])
        config = json.dumps({**row["case"], "pairs": len(case.pairs), "shape": case.pairs[0]})
        quantiles = [value / 1e3 for value in (row["p20"], row["p50"], row["p80"])]
        figures = [("speed", "ms", quantiles)]
        if row["mode"] in MAIN:
            figures += [
                (name, unit, [row[field] * factor] * 3)
                for name, unit, field, factor in (
                    ("memory", "MB", "peak", 2**-20),
                    ("saved", "MB", "saved", 2**-20),
                    ("error", "relative L2", "error", 1),
                )
                if row[field] is not None
            ]
        for metric, unit, values in figures:
            version = where["versions"]["lora-fast"]
            writer.writerow(
                [case.op, row["provider"], metric, unit, row["mode"], "r", "rank", case.r, *values, config]
                + [where["device"], run["timestamp"], version]
            )
    return out.getvalue()


def measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not row["unavailable"]]


def shown(rows: list[dict]) -> list[dict]:
    """Returns the row in the main mode of each case and provider, and the rows of unavailable providers."""
    modes = {(from_dict(row["case"]), row["mode"]) for row in measured(rows)}

    def main(case: Case) -> str:
        return next((mode for mode in MAIN if (case, mode) in modes), MAIN[0])

    return [row for row in rows if row["unavailable"] or row["mode"] == main(from_dict(row["case"]))]


def draw(rows: list[dict]) -> dict[str, str]:
    """Returns title → SVG of each provider's time: bars for one rank, lines over several ranks."""
    groups: dict[str, list[dict]] = {}
    for row in measured(shown(rows)):
        case = from_dict(row["case"])
        groups.setdefault(f"{case.op}: {title(case)}", []).append(row)
    drawn = {}
    for name, members in groups.items():
        op = members[0]["case"]["op"]
        names = [row["provider"] for row in measured(rows) if row["case"]["op"] == op]
        providers = list(dict.fromkeys(["ours", *names]))  # first, so that ours has one colour on the whole page
        colour = colours(providers)
        ranks = sorted({row["case"]["r"] for row in members})
        if len(ranks) == 1:
            bars = []
            for row in members:
                label, value, span = row["provider"], row["p50"], (row["p20"], row["p80"])
                bars.append(plots.Bar(label, colour[label], value, microseconds(value), span))
            drawn[name] = plots.bars(file_name(name), bars, f"µs, median and p20–p80, r={ranks[0]}")
            continue
        lines = []
        for provider in dict.fromkeys(row["provider"] for row in members):
            by_rank = sorted((row for row in members if row["provider"] == provider), key=lambda row: row["case"]["r"])
            values = [[row[field] for row in by_rank] for field in ("p20", "p50", "p80")]
            x = [row["case"]["r"] for row in by_rank]
            band = values[0], values[2]
            dashed = providers.index(provider) >= len(COLOURS)  # the colours repeat, so the line differs
            look = {"marker": "o", "linestyle": "--" if dashed else "-"}
            lines.append(plots.Series(provider, colour[provider], x, values[1], look, band))
        drawn[name] = plots.lines(file_name(name), lines, "rank", "µs, median and p20–p80", zero=True)
    return drawn


def microseconds(value: float) -> str:
    """Formats µs with four digits, or as an integer."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def title(case: Case) -> str:
    """Returns the name of a case without its rank."""
    return case.name.replace(f", r={case.r}", "")


def file_name(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "-", name.replace("→", "-to-")).strip("-").lower()


def page(run: dict, drawn: dict[str, str], changes: list[Change]) -> str:
    """Renders the page; ``drawn``: title → SVG."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mib"] = lambda size: "–" if size is None else f"{size / 2**20:.4g}"
    environment.filters["number"] = lambda value, form="{:.4g}": "–" if value is None else form.format(value)
    environment.filters["microseconds"] = microseconds
    ops: dict[str, dict] = {}
    for row in shown(run["rows"]):
        case = from_dict(row["case"])
        ops.setdefault(case.op, {}).setdefault(case, []).append(row)
    plots_of = {op: {name: svg for name, svg in drawn.items() if name.startswith(f"{op}: ")} for op in ops}
    return environment.get_template("page.html.jinja").render(run=run, ops=ops, plots=plots_of, changes=changes)
