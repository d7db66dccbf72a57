"""Writes metrics.json and report.html; report_engines.py and report_methods.py choose their contents."""

from __future__ import annotations

import math
from pathlib import Path

from ..inputs.settings import Run, Settings
from ..output import pages, run_folder
from ..output.palette import colours
from ..output.tables import Table
from . import report_bounds, report_engines, report_methods
from .record import Record


def _teller(settings: Settings):
    return report_methods if settings.compares_methods else report_engines


def tables(settings: Settings, runs: list[Record]) -> list[Table]:
    """The figures, for the terminal and the page."""
    return _teller(settings).tables(settings, runs)


def write(folder: Path, settings: Settings, runs: list[Record], environment: dict, prompt: str) -> None:
    """report.html, then metrics.json: with it the job has finished."""
    metrics = {
        "settings": settings.as_dict(),
        "environment": environment,
        "prompt": prompt,
        "comparison": _teller(settings).comparison(settings, runs),
        "runs": {run.label: _metrics(run, planned) for run, planned in zip(runs, settings.runs, strict=True)},
    }
    run_folder.write_text(folder / run_folder.REPORT, html(settings, runs, environment, prompt))
    run_folder.write_json(folder / run_folder.METRICS, _finite(metrics))


def _metrics(run: Record, planned: Run) -> dict[str, object]:
    method = {"engine": planned.engine, "method": planned.method.text, "options": planned.method.options}
    return run.as_dict() | method | {"step_time": run.step_time(), "optimizer_time": run.optimizer_time()}


def _finite(content: object) -> object:
    """The same with null for what JSON has no number for."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def html(settings: Settings, runs: list[Record], environment: dict, prompt: str) -> str:
    """One page that needs nothing else: styles and drawings are inside."""
    teller = _teller(settings)
    return pages.render(
        "finetune/report.html.jinja",
        title=f"{Path(settings.model).name} on {Path(settings.data).name}",
        settings=settings,
        runs=runs,
        colours=colours(run.label for run in runs),
        environment=environment,
        prompt=prompt,
        headline=teller.headline(settings, runs),
        tables=teller.tables(settings, runs),
        notes=teller.notes(settings, runs),
        figures=teller.figures(settings, runs),
        wide_figures=report_bounds.figures(runs),
        steps=max(len(run.losses) for run in runs),
    )
