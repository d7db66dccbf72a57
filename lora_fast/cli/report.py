"""What a finished run tells: the table (one for the terminal and the page), metrics.json and report.html."""

from __future__ import annotations

import statistics
from pathlib import Path

from . import plots, run_folder
from .measure import Record
from .settings import Settings


def comparison(runs: list[Record]) -> dict[str, object] | None:
    """How far two engines are apart, in their losses and in their speed."""
    if len(runs) < 2:
        return None
    one, two = sorted(runs, key=lambda run: run.engine, reverse=True)  # fused, eager
    return {
        "max_loss_difference": max(abs(a - b) for a, b in zip(one.losses, two.losses, strict=True)),
        "max_held_out_difference": max(
            abs(a - b) for (_, a), (_, b) in zip(one.held_out, two.held_out, strict=True)
        ),
        "step_time_ratio": two.step_time()["median"] / one.step_time()["median"],
        "saved_bytes_ratio": two.saved_bytes / one.saved_bytes,
        "ran_first": runs[0].engine,
    }


def table(runs: list[Record]) -> list[tuple[str, list[str], str]]:
    """Rows of: what, a value for each run, the comparison."""
    compared = comparison(runs)
    times = [run.step_time() for run in runs]
    on_gpu = "GPU" in runs[0].memory_kind
    held_out = [[f"{loss:.4f}" for _, loss in (run.held_out[0], run.held_out[-1])] for run in runs]
    last = [f"{statistics.mean(run.losses[-10:]):.4f}" for run in runs]
    pace = [f"{run.tokens_per_step / time['median']:.0f}" for run, time in zip(runs, times, strict=True)]
    kept = [f"{run.saved_bytes / 2**20:.1f} MiB" for run in runs]
    rows = [
        ("held-out loss, before", [before for before, _ in held_out], ""),
        ("held-out loss, after", [after for _, after in held_out], "max |Δ| {max_held_out_difference:.1g}"),
        ("training loss, last 10", last, "max |Δ| {max_loss_difference:.1g}"),
        ("step time, median", [f"{t['median']:.3f} s" for t in times], "eager / fused {step_time_ratio:.3f}"),
        ("step time, p20–p80", [f"{t['p20']:.3f}–{t['p80']:.3f} s" for t in times], ""),
        ("tokens per second", pace, ""),
        ("kept for backward", kept, "eager / fused {saved_bytes_ratio:.3f}"),
        ("trained parameters", [f"{run.trained_parameters:,}" for run in runs], ""),
    ]
    if on_gpu:
        rows.append(("peak GPU memory in a step", [f"{max(run.memory) / 2**20:.0f} MiB" for run in runs], ""))
    return [(what, values, note.format(**compared) if compared else "") for what, values, note in rows]


def notes(runs: list[Record]) -> list[str]:
    """How the figures were taken."""
    said = [
        "Step time: forward, backward, gradient clipping and optimizer update; data loading, evaluation, checkpoints "
        "and logging are outside.",
        "Held-out loss: mean over blocks of text that are never trained on. Training loss, last 10: mean of the last "
        "ten steps, each on other text; the largest difference is over all steps.",
        "Kept for backward: bytes of all distinct tensors that one micro-batch's forward pass stores for its backward "
        "pass, the model's own weights not counted; the output logits, the same for both engines, are in it.",
    ]
    if len(runs) > 1:
        first, second = (run.engine for run in runs)
        said.append(
            f"Both from the same seed, one after the other in one process: {first} first, then {second}. What else the "
            "machine did meanwhile is in the times: a wide span from p20 to p80 shows it."
        )
    if _share_a_process(runs):
        said.append("The process's size is in metrics.json only: in the second run it includes what the first left.")
    return said


def write(folder: Path, settings: Settings, runs: list[Record], environment: dict, prompt: str) -> None:
    """report.html, then metrics.json: with it the run has finished."""
    metrics = {
        "settings": settings.as_dict(),
        "environment": environment,
        "prompt": prompt,
        "comparison": comparison(runs),
        "runs": {run.engine: {**run.as_dict(), "step_time": run.step_time()} for run in runs},
    }
    run_folder.write_text(folder / run_folder.REPORT, html(settings, runs, environment, prompt))
    run_folder.write_json(folder / run_folder.METRICS, metrics)


def html(settings: Settings, runs: list[Record], environment: dict, prompt: str) -> str:
    """One page that needs nothing else: styles and drawings are inside."""
    import jinja2

    loader = jinja2.PackageLoader("lora_fast.cli", package_path="")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    alone = not _share_a_process(runs)
    loss = plots.loss(runs, wide=not alone)  # an odd number of figures: the first one has a row to itself
    figures = [
        ("Loss", "Solid: training loss of each step. Dashed, with dots: held-out loss.", loss),
        ("Step time", "One dot a step; the line is the median.", plots.step_time(runs)),
        ("Kept for backward", "What one forward pass stores until its backward pass.", plots.saved(runs)),
    ]
    if alone:
        figures.append(("Memory", f"MiB, {runs[0].memory_kind}.", plots.memory(runs)))
    return page.get_template("report.html.jinja").render(
        title=f"{Path(settings.model).name} on {Path(settings.data).name}",
        settings=settings.as_dict(),
        runs=runs,
        environment=environment,
        prompt=prompt,
        table=table(runs),
        notes=notes(runs),
        figures=figures,
        compared=comparison(runs),
    )


def _share_a_process(runs: list[Record]) -> bool:
    """Whether the memory figures are sizes of one process that ran two engines: the second would carry the first."""
    return len(runs) > 1 and "GPU" not in runs[0].memory_kind
