"""What the report says of several methods: enough to choose one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from ..inputs.settings import Settings
from ..output.palette import colours
from ..output.plots import Bar, Series, bars, lines
from ..output.tables import Cell, Table
from .record import Record

MIB = 2**20


def baseline(settings: Settings, runs: list[Record]) -> Record:
    """What the others are measured against: the first plain LoRA, else the first run; of those that did not diverge."""
    plain = [run for run, planned in zip(runs, settings.runs, strict=True) if planned.method.name == "lora"]
    return next((run for run in [*plain, *runs] if not run.diverged), runs[0])


def comparison(settings: Settings, runs: list[Record]) -> dict[str, dict[str, float | str]]:
    """The table's figures, by method. A diverged run has no final loss."""
    base = baseline(settings, runs)
    return {run.label: _figures(run, base) for run in runs}


def _figures(run: Record, base: Record) -> dict[str, float | str]:
    step, base_step = (one.step_time()["median"] for one in (run, base))
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
    """The lowest held-out loss of those that did not diverge; the first of all if every one did."""
    return min((run for run in runs if not run.diverged), key=lambda run: run.held_out[-1][1], default=runs[0])


def headline(settings: Settings, runs: list[Record]) -> str:
    lowest, base = best(runs), baseline(settings, runs)
    if lowest.diverged:
        return "Every method diverged: try a smaller --lr"
    said = f"Lowest held-out loss: {lowest.label}, {lowest.held_out[0][1]:.4f} → {lowest.held_out[-1][1]:.4f}"
    if lowest is base or base.diverged:
        return said
    figures = comparison(settings, runs)[lowest.label]
    gain, overhead = -figures["held_out_over_baseline"], 100 * figures["overhead"]
    return f"{said}, {gain:.4f} below {base.label}'s; the overhead of its optimizer is {overhead:+.1f} % of a step"


Column = tuple[str, str, Callable[[float], str], bool, bool]  # head, figure, text, less is better, in the terminal


def tables(settings: Settings, runs: list[Record]) -> list[Table]:
    """A row for each method. Strong: the best of a column where less is better."""
    base = baseline(settings, runs).label
    learnt: list[Column] = [
        ("held-out loss before", "held_out_before", "{:.4f}".format, False, False),
        ("held-out loss after", "held_out_after", "{:.4f}".format, True, True),
        (f"after, less {base}'s", "held_out_over_baseline", "{:+.4f}".format, False, True),
        ("training loss, last 10", "training_loss_last_10", "{:.4f}".format, True, False),
        ("‖a‖", "norm_a", "{:.3g}".format, False, False),
        ("‖b‖", "norm_b", "{:.3g}".format, False, False),
        ("rms a / b", "rms_ratio", "{:.3g}".format, False, True),
        ("rank", "rank", "{:.1f}".format, False, False),
        ("erank", "erank", "{:.2f}".format, False, True),
        ("erank with merges", "change_erank", "{:.2f}".format, False, False),
    ]
    if all(run.change_erank is None for run in runs):
        learnt.pop()  # it is the erank again
    if any(run.bounds for run in runs):
        learnt.append(("bound used", "bound_used_mean", "{:.1%}".format, False, True))
    cost: list[Column] = [
        ("step, s", "step_seconds", "{:.3f}".format, True, True),
        (f"step over {base}'s", "step_over_baseline", "{:.3f}".format, False, False),
        ("optimizer, ms", "optimizer_seconds", _milliseconds, True, True),
        (f"less {base}'s, ms", "optimizer_over_baseline", lambda seconds: f"{1e3 * seconds:+.1f}", False, False),
        (f"overhead, % of {base}'s step", "overhead", lambda share: f"{100 * share:+.1f}", False, True),
        ("optimizer state, MiB", "state_bytes", _mib, True, False),
        ("peak in its step, MiB", "peak_bytes", _mib, True, True),
    ]
    figures = list(comparison(settings, runs).values())
    return [
        _table("What was learnt", learnt, figures, runs),
        _table("What it cost", cost, figures, runs),
    ]


def _table(title: str, columns: list[Column], figures: list[dict], runs: list[Record]) -> Table:
    rows = [[Cell(label, colour)] for label, colour in _colours(runs).items()]
    for _, name, text, less_is_better, _ in columns:
        values = [row[name] for row in figures]
        texts = ["–" if math.isnan(value) else text(value) for value in values]
        least = text(min((value for value in values if not math.isnan(value)), default=math.nan))
        tells = less_is_better and len(set(texts)) > 1
        for row, run, shown in zip(rows, runs, texts, strict=True):
            ended = run.diverged and name == "held_out_after"
            row.append(Cell("diverged" if ended else shown, strong=tells and shown == least))
    short = [0, *(i + 1 for i, column in enumerate(columns) if column[4])]
    return Table(title, [Cell("method"), *(Cell(column[0]) for column in columns)], rows, short)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _mib(size: float) -> str:
    return f"{size / MIB:.3g}"


def figures(settings: Settings, runs: list[Record]) -> list[tuple[str, str, str]]:
    """Heading, caption, drawing."""
    base = baseline(settings, runs)
    by_layer = "Mean over all adapters."
    return [
        (
            "Training loss",
            "Of each step, before its update. At one step every method sees the same batch.",
            _over_steps("loss", runs, lambda run: (range(len(run.losses)), run.losses), "nats per token"),
        ),
        (
            f"Training loss, less {base.label}'s",
            f"At the same step, on the same batch: below 0 is better than {base.label}.",
            _over_steps("difference", runs, lambda run: _difference(run, base), "nats per token"),
        ),
        (
            "Held-out loss",
            "On text that is never trained on.",
            _over_steps("held-out", runs, lambda run: zip(*run.held_out, strict=True), "nats per token", **HOLLOW),
        ),
        (
            f"Held-out loss, less {base.label}'s",
            f"After the same number of steps: below 0 is better than {base.label}.",
            _over_steps("gain", runs, lambda run: _held_out_difference(run, base), "nats per token", **HOLLOW),
        ),
        ("Norm of a", f"‖a‖, Frobenius. {by_layer}", _adapter("norm-a", runs, "norm_a", "‖a‖")),
        ("Norm of b", f"‖b‖, Frobenius; 0 at the start. {by_layer}", _adapter("norm-b", runs, "norm_b", "‖b‖")),
        (
            "Ratio of the factors",
            "Root mean square of a's entries over that of b's: geometric mean over all adapters.",
            _adapter("ratio", runs, "rms_ratio", "rms(a) / rms(b)", log=True),
        ),
        (
            "Rank",
            f"Singular values of ΔW = s·b·a above 0.005. {by_layer}",
            _adapter("rank", runs, "rank", "singular values", zero=True),
        ),
        (
            "Effective rank",
            f"Stable rank of ΔW, ‖ΔW‖²_F / ‖ΔW‖²₂. {by_layer}",
            _adapter("erank", runs, "erank", "erank"),
        ),
        ("Optimizer time", "Mean of the steps after the first.", _optimizer_bars(settings, runs)),
        (
            f"Step time over {base.label}'s",
            "Medians of whole steps; the whisker is from the 20th to the 80th percentile.",
            _step_bars(settings, runs),
        ),
        (
            "Memory of the optimizer",
            "The most it held at once in its first step, its state included.",
            _memory_bars(runs),
        ),
    ]


def notes(settings: Settings, runs: list[Record]) -> list[str]:
    """How the figures were taken."""
    base = baseline(settings, runs).label
    said = [
        f"Every method from the same weights, the same fresh adapters and the same batches (seed {settings.seed}), one "
        f"after the other in one process. One seed: a difference in loss that another seed could turn round decides "
        "nothing, and methods may want other learning rates (--method NAME:lr=…).",
        "Step time: median over forward, backward, gradient clipping and optimizer update; data loading, evaluation, "
        "statistics, checkpoints and logging are outside, and so is the first step, which allocates. The methods share "
        f"all but the optimizer, so what a step takes longer than {base}'s beyond the optimizer's own time is what "
        "else the machine did meanwhile: the overhead, the optimizer's time less that of "
        f"{base} over the median step of {base}, is the figure to quote.",
        "Optimizer time: mean over the steps after the first, so that what a method does every few steps counts.",
        "Optimizer memory: tensors that were made and alive at once during the optimizer's first step (scratch inside "
        "a single operation is not seen), and its state afterwards.",
        "Norms, ratio, rank: of the adapters, by lora_fast.metrics.adapter_stats. The mean over adapters is the "
        "geometric one for the ratio, arithmetic for the rest.",
    ]
    if any(planned.method.adapters for planned in settings.runs):
        said.append(
            "nb-lora and sing-lora have fresh adapters of another kind; their a and b are what the trained parameters "
            "make of them. Their work in the forward and the backward pass is in the step's time, not the optimizer's."
        )
    if any(run.change_erank is not None for run in runs):
        said.append(
            "scalora merges into the frozen weights: its norms, rank and erank are of the adapter alone; erank with "
            "merges is of all that training changed, W + s·b·a − W₀ (for the other methods, ΔW), at the end."
        )
    said += [f"{run.label}: {run.diverged}." for run in runs if run.diverged]
    layers = dict.fromkeys(run.layers for run in runs)
    return [*said, *(f"Layers: {text}." for text in layers)]


MARKERS, SHAPES = 5, "os^Dv*PXh"  # in a curve, about
HOLLOW = {"markersize": 7, "fillstyle": "none", "markevery": 1}


def _colours(runs: list[Record]) -> dict[str, str]:
    return colours(run.label for run in runs)


def _over_steps(name: str, runs: list[Record], curve: Callable, y: str, zero=False, log=False, **look) -> str:
    """Each curve has its own shape of marker, at other steps than the others': curves that agree hide each other, but
    not the markers."""
    series = []
    for i, (run, colour) in enumerate(zip(runs, _colours(runs).values(), strict=True)):
        steps, values = map(list, curve(run))
        between = max(len(runs), len(steps) // MARKERS)
        own = {"linewidth": 1.5, "marker": SHAPES[i % len(SHAPES)], "markersize": 5}
        own["markevery"] = (i * between // len(runs), between)
        series.append(Series(run.label, colour, steps, values, own | look))
    return lines(name, series, "steps done", y, zero=zero, log=log)


def _adapter(name: str, runs: list[Record], figure: str, y: str, **axis) -> str:
    return _over_steps(name, runs, lambda run: run.curve(f"adapter/{figure}_mean"), y, **axis)


def _difference(run: Record, base: Record) -> tuple[range, list[float]]:
    differences = [a - b for a, b in zip(run.losses, base.losses, strict=False)]  # one may have diverged
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
    return bars("optimizer", values, f"ms a step (less {baseline(settings, runs).label}'s)")


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
