"""What a finished job tells: metrics.json and report.html. What is said of what: engine_report.py, method_report.py."""

from __future__ import annotations

import math
from pathlib import Path

from . import bound_report, engine_report, method_report, run_folder
from .measure import Record
from .palette import colours
from .settings import Run, Settings
from .tables import Table


def _teller(settings: Settings):
    return method_report if settings.compares_methods else engine_report


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
    import jinja2

    loader = jinja2.PackageLoader("lora_fast.cli", package_path="")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    teller = _teller(settings)
    return page.get_template("report.html.jinja").render(
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
        wide_figures=bound_report.figures(runs),
        steps=max(len(run.losses) for run in runs),
    )
