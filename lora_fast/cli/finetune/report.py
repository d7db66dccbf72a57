"""Writes metrics.json and report.html. report_engines.py or report_methods.py provides their contents."""

from __future__ import annotations

import math
from pathlib import Path

from ..inputs.settings import Run, Settings
from ..output import pages, run_folder
from ..output.palette import colours
from ..output.tables import Table
from . import report_bounds, report_engines, report_methods
from .record import Record


def _contents(settings: Settings):
    """Returns the module whose functions provide the headline, the tables, the figures and the notes."""
    return report_methods if settings.compares_methods else report_engines


def tables(settings: Settings, runs: list[Record]) -> list[Table]:
    """Returns the tables of the terminal and the page."""
    return _contents(settings).tables(settings, runs)


def write(folder: Path, settings: Settings, runs: list[Record], environment: dict, prompt: str) -> None:
    """Writes report.html and then metrics.json, whose presence marks the run as finished."""
    metrics = {
        "settings": settings.as_dict(),
        "environment": environment,
        "prompt": prompt,
        "comparison": _contents(settings).comparison(settings, runs),
        "runs": {run.label: _metrics(run, planned) for run, planned in zip(runs, settings.runs, strict=True)},
    }
    run_folder.write_text(folder / run_folder.REPORT, html(settings, runs, environment, prompt))
    run_folder.write_json(folder / run_folder.METRICS, _finite(metrics))


def _metrics(run: Record, planned: Run) -> dict[str, object]:
    method = {"engine": planned.engine, "method": planned.method.text, "options": planned.method.options}
    return run.as_dict() | method | {"step_time": run.step_time(), "optimizer_time": run.optimizer_time()}


def _finite(content: object) -> object:
    """Returns ``content`` with None for every NaN and infinity, which JSON cannot represent."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def html(settings: Settings, runs: list[Record], environment: dict, prompt: str) -> str:
    """Returns the page, which contains its styles and drawings."""
    contents = _contents(settings)
    return pages.render(
        "finetune/report.html.jinja",
        title=f"{Path(settings.model).name} on {Path(settings.data).name}",
        settings=settings,
        runs=runs,
        colours=colours(run.label for run in runs),
        environment=environment,
        prompt=prompt,
        headline=contents.headline(settings, runs),
        tables=contents.tables(settings, runs),
        notes=contents.notes(settings, runs),
        figures=contents.figures(settings, runs),
        wide_figures=report_bounds.figures(runs),
        steps=max(len(run.losses) for run in runs),
    )
