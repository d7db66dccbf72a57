"""The report's contents for a comparison of methods, from which a reader can choose one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from ..inputs.settings import Settings
from ..output.palette import colours
from ..output.plots import Bar, Series, bars, lines
from ..output.tables import Cell, Table
from .record import Record

MIB = 2**20
MARKERS, SHAPES = 5, "os^Dv*PXh"  # approximate number of markers on a curve; matplotlib's markers
HOLLOW = {"markersize": 7, "fillstyle": "none", "markevery": 1}


def baseline(settings: Settings, runs: list[Record]) -> Record:
    """Returns the run that the others are compared with: the first plain LoRA or else the first run, among those that
    did not diverge."""
    plain = [run for run, planned in zip(runs, settings.runs, strict=True) if planned.method.name == "lora"]
    return next((run for run in [*plain, *runs] if not run.diverged), runs[0])


def comparison(settings: Settings, runs: list[Record]) -> dict[str, dict[str, float]]:
    """Returns the figures of the tables by method. The final losses of a diverged run are NaN."""
    base = baseline(settings, runs)
    return {run.label: _figures(run, base) for run in runs}


def _figures(run: Record, base: Record) -> dict[str, float]:
    step, base_step = (record.step_time()["median"] for record in (run, base))
    after = math.nan if run.diverged else run.held_out[-1][1]
    return {
        "held_out_before": run.held_out[0][1],
        "held_out_after": after,
        "held_out_over_baseline": after - (math.nan if base.diverged else base.held_out[-1][1]),
        "training_loss_last_10": math.nan if run.diverged else statistics.mean(run.losses[-10:]),
        "norm_a": run.last("adapter/norm_a_mean"),
        "norm_b": run.last("adapter/norm_b_mean"),
        "rms_ratio": run.last("adapter/rms_ratio_mean"),
        "rank": run.last("adapter/rank_mean"),
        "erank": run.last("adapter/erank_mean"),
        "change_erank": run.last("adapter/erank_mean") if run.change_erank is None else run.change_erank,
        "bound_used_mean": run.last("adapter/bound_used_mean"),
        "bound_used_max": run.last("adapter/bound_used_max"),
        "step_seconds": step,
        "step_over_baseline": step / base_step,
        "optimizer_seconds": run.optimizer_time(),
        "optimizer_over_baseline": run.optimizer_time() - base.optimizer_time(),
        "overhead": (run.optimizer_time() - base.optimizer_time()) / base_step,
        "state_bytes": run.optimizer_bytes,
        "peak_bytes": run.optimizer_peak_bytes,
    }


def best(runs: list[Record]) -> Record:
    """Returns the run with the lowest final held-out loss among those that did not diverge, or the first if all did."""
    return min((run for run in runs if not run.diverged), key=lambda run: run.held_out[-1][1], default=runs[0])


def headline(settings: Settings, runs: list[Record]) -> str:
    """Returns the one line below the title."""
    lowest, base = best(runs), baseline(settings, runs)
    if lowest.diverged:
        return "Every method diverged. Try a smaller --lr."
    loss = f"Lowest held-out loss: {lowest.label}, {lowest.held_out[0][1]:.4f} → {lowest.held_out[-1][1]:.4f}"
    if lowest is base or base.diverged:
        return loss
    figures = comparison(settings, runs)[lowest.label]
    gain, overhead = -figures["held_out_over_baseline"], 100 * figures["overhead"]
    return f"{loss}, {gain:.4f} below {base.label}'s. The overhead of its optimizer is {overhead:+.1f} % of a step."


class Column(NamedTuple):
    """A column of a table: ``figure`` is its key in ``_figures``; ``in_terminal`` keeps it in the short table."""

    head: str
    figure: str
    format: Callable[[float], str]
    less_is_better: bool = False
    in_terminal: bool = False


def tables(settings: Settings, runs: list[Record]) -> list[Table]:
    """Returns two tables with a row for each method: what was learnt, and what it cost. In columns where less is
    better, the best value is strong."""
    base = baseline(settings, runs).label
    learnt: list[Column] = [
        Column("held-out loss before", "held_out_before", "{:.4f}".format),
        Column("held-out loss after", "held_out_after", "{:.4f}".format, less_is_better=True, in_terminal=True),
        Column(f"after, minus {base}'s", "held_out_over_baseline", "{:+.4f}".format, in_terminal=True),
        Column("training loss, last 10", "training_loss_last_10", "{:.4f}".format, less_is_better=True),
        Column("‖a‖", "norm_a", "{:.3g}".format),
        Column("‖b‖", "norm_b", "{:.3g}".format),
        Column("rms a / b", "rms_ratio", "{:.3g}".format, in_terminal=True),
        Column("rank", "rank", "{:.1f}".format),
        Column("erank", "erank", "{:.2f}".format, in_terminal=True),
        Column("erank with merges", "change_erank", "{:.2f}".format),
    ]
    if all(run.change_erank is None for run in runs):
        learnt.pop()  # without merges the last column equals the erank
    if any(run.bounds for run in runs):
        learnt.append(Column("bound used", "bound_used_mean", "{:.1%}".format, in_terminal=True))
    cost: list[Column] = [
        Column("step, s", "step_seconds", "{:.3f}".format, less_is_better=True, in_terminal=True),
        Column(f"step over {base}'s", "step_over_baseline", "{:.3f}".format),
        Column("optimizer, ms", "optimizer_seconds", _milliseconds, less_is_better=True, in_terminal=True),
        Column(f"minus {base}'s, ms", "optimizer_over_baseline", lambda seconds: f"{1e3 * seconds:+.1f}"),
        Column(f"overhead, % of {base}'s step", "overhead", lambda share: f"{100 * share:+.1f}", in_terminal=True),
        Column("optimizer state, MiB", "state_bytes", _mib, less_is_better=True),
        Column("peak in its step, MiB", "peak_bytes", _mib, less_is_better=True, in_terminal=True),
    ]
    figures = list(comparison(settings, runs).values())
    return [
        _table("What was learnt", learnt, figures, runs),
        _table("What it cost", cost, figures, runs),
    ]


def _table(title: str, columns: list[Column], figures: list[dict], runs: list[Record]) -> Table:
    rows = [[Cell(label, colour)] for label, colour in _colours(runs).items()]
    for column in columns:
        values = [row[column.figure] for row in figures]
        texts = ["–" if math.isnan(value) else column.format(value) for value in values]
        least = column.format(min((value for value in values if not math.isnan(value)), default=math.nan))
        has_best = column.less_is_better and len(set(texts)) > 1
        for row, run, shown in zip(rows, runs, texts, strict=True):
            diverged = run.diverged and column.figure == "held_out_after"
            row.append(Cell("diverged" if diverged else shown, strong=has_best and shown == least))
    short = [0, *(i + 1 for i, column in enumerate(columns) if column.in_terminal)]
    return Table(title, [Cell("method"), *(Cell(column.head) for column in columns)], rows, short)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _mib(size: float) -> str:
    return f"{size / MIB:.3g}"


def figures(settings: Settings, runs: list[Record]) -> list[tuple[str, str, str]]:
    """Returns (heading, caption, drawing) of each figure."""
    base = baseline(settings, runs)
    mean = "The curve is the mean over all adapters."
    return [
        (
            "Training loss",
            "The loss of each step before its update. All methods see the same batch at a step.",
            _over_steps("loss", runs, lambda run: (range(len(run.losses)), run.losses), "nats per token"),
        ),
        (
            f"Training loss, minus {base.label}'s",
            f"The difference at the same step, on the same batch. Below 0 is better than {base.label}.",
            _over_steps("difference", runs, lambda run: _difference(run, base), "nats per token"),
        ),
        (
            "Held-out loss",
            "The loss on text that is never trained on.",
            _over_steps("held-out", runs, lambda run: zip(*run.held_out, strict=True), "nats per token", **HOLLOW),
        ),
        (
            f"Held-out loss, minus {base.label}'s",
            f"The difference after the same number of steps. Below 0 is better than {base.label}.",
            _over_steps("gain", runs, lambda run: _held_out_difference(run, base), "nats per token", **HOLLOW),
        ),
        ("Norm of a", f"Frobenius norm of a. {mean}", _adapter("norm-a", runs, "norm_a", "‖a‖")),
        ("Norm of b", f"Frobenius norm of b, which starts at 0. {mean}", _adapter("norm-b", runs, "norm_b", "‖b‖")),
        (
            "Ratio of the factors",
            "Root mean square of a's entries over that of b's. The curve is the geometric mean over all adapters.",
            _adapter("ratio", runs, "rms_ratio", "rms(a) / rms(b)", log=True),
        ),
        (
            "Rank",
            f"Number of singular values of ΔW = s·b·a above 0.005. {mean}",
            _adapter("rank", runs, "rank", "singular values", zero=True),
        ),
        (
            "Effective rank",
            f"Stable rank of ΔW, ‖ΔW‖²_F / ‖ΔW‖²₂. {mean}",
            _adapter("erank", runs, "erank", "erank"),
        ),
        ("Optimizer time", "The mean of the steps after the first.", _optimizer_bars(settings, runs)),
        (
            f"Step time over {base.label}'s",
            "Medians of whole steps. The whiskers span the 20th to the 80th percentile.",
            _step_bars(settings, runs),
        ),
        (
            "Memory of the optimizer",
            "The most memory that was allocated at once in its first step, including its state.",
            _memory_bars(runs),
        ),
    ]


def notes(settings: Settings, runs: list[Record]) -> list[str]:
    """Returns sentences on how the figures were measured."""
    base = baseline(settings, runs).label
    sentences = [
        f"All methods ran one after the other in one process, from the same weights, the same initial adapters and the "
        f"same batches (seed {settings.seed}). This is a single seed: small differences in loss may be reversed by "
        "another one, and some methods need another learning rate (--method NAME:lr=…).",
        "The step time is the median over forward, backward, gradient clipping and the optimizer's update. It excludes "
        "data loading, evaluation, statistics, checkpoints, logging, and the first step, which allocates.",
        f"The figure to quote is the overhead: the optimizer's time minus that of {base}, over {base}'s median step. "
        f"The methods share everything but the optimizer, so any other difference to {base}'s step time is noise.",
        "The optimizer time is the mean over the steps after the first, which includes what a method does every few "
        "steps only.",
        "The optimizer memory is the most that was allocated at once during the optimizer's first step (scratch memory "
        "within an operation is not seen), and the size of its state afterwards.",
        "Norms, ratios and ranks of the adapters are those of lora_fast.metrics.adapter_stats. Their mean over the "
        "adapters is geometric for the ratio and arithmetic for the others.",
    ]
    sentences += filter(None, [runs[0].weights_note()])
    if any(planned.method.adapters for planned in settings.runs):
        sentences.append(
            "nb-lora and sing-lora start from initial adapters of their own. Their a and b are computed from the "
            "trained parameters; the time for this counts as forward and backward pass, not as the optimizer's."
        )
    if any(run.change_erank is not None for run in runs):
        sentences.append(
            "scalora merges into the frozen weights. Its norms, rank and erank describe the adapter alone; erank with "
            "merges describes all that training changed, W + s·b·a − W₀, at the end. For the other methods this is ΔW."
        )
    sentences += [f"{run.label}: {run.diverged}." for run in runs if run.diverged]
    lost = {run.label: run.last("adapter/not_finite") for run in runs}
    sentences += [
        f"{label}: {count:.0f} adapters have factors that are not finite at the end. Its norms, ratios and ranks are "
        "means over the others."
        for label, count in lost.items()
        if count > 0  # NaN, where all are finite, is not
    ]
    layers = dict.fromkeys(run.layers for run in runs)
    return [*sentences, *(f"Layers: {text}." for text in layers)]


def _colours(runs: list[Record]) -> dict[str, str]:
    return colours(run.label for run in runs)


def _over_steps(name: str, runs: list[Record], curve: Callable, y: str, zero=False, log=False, **look) -> str:
    """Draws one curve for each run. The markers of each curve have their own shape and their own steps, so that curves
    that coincide can still be told apart."""
    series = []
    for i, (run, colour) in enumerate(zip(runs, _colours(runs).values(), strict=True)):
        steps, values = map(list, curve(run))
        between = max(len(runs), len(steps) // MARKERS)
        markers = {"linewidth": 1.5, "marker": SHAPES[i % len(SHAPES)], "markersize": 5}
        markers["markevery"] = (i * between // len(runs), between)
        series.append(Series(run.label, colour, steps, values, markers | look))
    return lines(name, series, "steps done", y, zero=zero, log=log)


def _adapter(name: str, runs: list[Record], figure: str, y: str, **axis) -> str:
    return _over_steps(name, runs, lambda run: run.curve(f"adapter/{figure}_mean"), y, **axis)


def _difference(run: Record, base: Record) -> tuple[range, list[float]]:
    differences = [a - b for a, b in zip(run.losses, base.losses, strict=False)]  # a diverged run is shorter
    return range(len(differences)), differences


def _held_out_difference(run: Record, base: Record) -> tuple[list[int], list[float]]:
    pairs = list(zip(run.held_out, base.held_out, strict=False))
    return [step for (step, _), _ in pairs], [loss - other for (_, loss), (_, other) in pairs]


def _optimizer_bars(settings: Settings, runs: list[Record]) -> str:
    base = 1e3 * baseline(settings, runs).optimizer_time()
    named = _colours(runs).items()
    times = [1e3 * run.optimizer_time() for run in runs]
    values = [
        Bar(label, colour, time, f"{time:.1f} ({time - base:+.1f})")
        for (label, colour), time in zip(named, times, strict=True)
    ]
    return bars("optimizer", values, f"ms a step (minus {baseline(settings, runs).label}'s)")


def _step_bars(settings: Settings, runs: list[Record]) -> str:
    base = baseline(settings, runs)
    values = []
    for run, colour in zip(runs, _colours(runs).values(), strict=True):
        low, middle, high = (run.step_time()[q] / base.step_time()["median"] for q in ("p20", "median", "p80"))
        values.append(Bar(run.label, colour, middle, f"{middle:.3f}", (low, high)))
    return bars("step", values, f"times {base.label}'s median, {base.step_time()['median']:.3g} s")


def _memory_bars(runs: list[Record]) -> str:
    values = [
        Bar(run.label, colour, run.optimizer_peak_bytes / MIB,
            f"{_mib(run.optimizer_peak_bytes)}, of it state {_mib(run.optimizer_bytes)}")
        for run, colour in zip(runs, _colours(runs).values(), strict=True)
    ]  # fmt: skip
    return bars("optimizer-memory", values, "MiB")
