"""The report's contents for one run, or for both engines side by side."""

from __future__ import annotations

import statistics

from ..inputs.settings import Settings
from ..output.palette import colours
from ..output.plots import Bar, Series, bars, lines
from ..output.tables import Cell, Table
from .record import Record


def comparison(settings: Settings, runs: list[Record]) -> dict[str, object] | None:
    """Returns the differences of losses and the ratios of speed and memory between the engines; None for one run."""
    if len(runs) < 2:
        return None
    fused, eager = runs
    return {
        "max_loss_difference": _max_difference(fused.losses, eager.losses),
        "max_held_out_difference": _max_difference(*([loss for _, loss in run.held_out] for run in runs)),
        "step_time_ratio": eager.step_time()["median"] / fused.step_time()["median"],
        "saved_bytes_ratio": eager.saved_bytes / fused.saved_bytes,
        "ran_first": fused.label,
    }


def _max_difference(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def headline(settings: Settings, runs: list[Record]) -> str:
    """Returns the one line below the title."""
    loss = f"Held-out loss {runs[0].held_out[0][1]:.3f} → {runs[0].held_out[-1][1]:.3f}"
    compared = comparison(settings, runs)
    if compared is None:
        return loss
    difference, ratio = compared["max_loss_difference"], compared["step_time_ratio"]
    return f"{loss} · loss curves differ by at most {difference:.1g} · step time, eager over fused: {ratio:.2f}"


def tables(settings: Settings, runs: list[Record]) -> list[Table]:
    """Returns one table, with a row for each figure, a column for each run, and a column that compares them."""
    compared = comparison(settings, runs)
    times = [run.step_time() for run in runs]
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
        ("optimizer's part, mean", [f"{1e3 * run.optimizer_time():.1f} ms" for run in runs], ""),
        ("tokens per second", pace, ""),
        ("kept for backward", kept, "eager / fused {saved_bytes_ratio:.3f}"),
        ("trained parameters", [f"{run.trained_parameters:,}" for run in runs], ""),
        ("frozen weights", [f"{run.weight_bytes / 2**20:.1f} MiB" for run in runs], ""),
    ]
    if runs[0].weight_format:
        rows.append(("if not quantised", [f"{run.plain_weight_bytes / 2**20:.1f} MiB" for run in runs], ""))
    if runs[0].bounds:
        used = [f"{run.last('adapter/bound_used_mean'):.1%}, {run.last('adapter/bound_used_max'):.1%}" for run in runs]
        rows.append(("bound used, mean and most", used, ""))
    if "GPU" in runs[0].memory_kind:
        rows.append(("peak GPU memory in a step", [f"{max(run.memory) / 2**20:.0f} MiB" for run in runs], ""))
    head = [Cell(""), *(Cell(label, colour) for label, colour in _colours(runs).items())]
    if compared is None:
        return [Table("", head, [[Cell(what), *map(Cell, values)] for what, values, _ in rows])]
    body = [[Cell(what), *map(Cell, values), Cell(note.format(**compared))] for what, values, note in rows]
    return [Table("", [*head, Cell("compared")], body)]


def figures(settings: Settings, runs: list[Record]) -> list[tuple[str, str, str]]:
    """Returns (heading, caption, drawing) of each figure."""
    both = len(runs) > 1
    drawings = [
        ("Loss", "Solid: training loss of each step. Dashed with dots: held-out loss.", _loss(runs, wide=both)),
        ("Step time", "Each dot is a step. The line is the median.", _step_time(runs)),
        ("Kept for backward", "What one forward pass stores for its backward pass.", _saved(runs)),
    ]
    if not share_a_process(runs):
        drawings.append(("Memory", f"MiB, {runs[0].memory_kind}.", _memory(runs)))
    if not both:
        norms = "Frobenius norms of a and b. The line is the mean over all adapters; the area spans all adapters."
        ranks = (
            "Number of singular values of ΔW = s·b·a above 0.005 (rank), and its stable rank ‖ΔW‖²_F / ‖ΔW‖²₂ (erank). "
            "The line is the mean over all adapters; the area spans all adapters."
        )
        norm_names, rank_names = ("norm_a", "norm_b"), ("rank", "erank")
        drawings.append(("Norms of the factors", norms, _adapter("norms", runs[0], norm_names, ("‖a‖", "‖b‖"))))
        drawings.append(("Rank of the update", ranks, _adapter("rank", runs[0], rank_names, rank_names)))
    return drawings


def notes(settings: Settings, runs: list[Record]) -> list[str]:
    """Returns sentences on how the figures were measured."""
    sentences = [
        "The step time covers forward, backward, gradient clipping and the optimizer's update. It excludes data "
        "loading, evaluation, statistics, checkpoints, logging, and the first step, which allocates.",
        "The held-out loss is the mean over blocks of text that are never trained on. The last training loss is the "
        "mean of the last ten steps, whose texts differ; the largest difference is taken over all steps.",
        "Kept for backward are the bytes of all distinct tensors that one micro-batch's forward pass stores for its "
        "backward pass. The model's weights are not counted; the output logits, which both engines store, are.",
    ]
    if len(runs) > 1:
        first, second = (run.label for run in runs)
        sentences.append(
            f"Both runs used the same seed and one process: {first} ran first, then {second}. The times include "
            "whatever else the machine did; a wide span from p20 to p80 shows such disturbances."
        )
    if share_a_process(runs):
        sentences.append("The process's size is in metrics.json only, since the second run's includes the first run's.")
    sentences += filter(None, [runs[0].weights_note()])
    return [*sentences, *(f"Layers of the {run.label} run: {run.layers}." for run in runs)]


def share_a_process(runs: list[Record]) -> bool:
    """Returns whether the memory figures are sizes of one process that all runs share, and thus not comparable."""
    return len(runs) > 1 and "GPU" not in runs[0].memory_kind


def _colours(runs: list[Record]) -> dict[str, str]:
    return colours(run.label for run in runs)


def _loss(runs: list[Record], wide: bool) -> str:
    """Draws the loss curves. The second run's lines are broad and pale, so that both are visible where they agree."""
    series = []
    for i, (run, colour) in enumerate(zip(runs, _colours(runs).values(), strict=True)):
        look = {"linewidth": 1.6, "zorder": 3} if i == 0 else {"linewidth": 5, "alpha": 0.45, "zorder": 2}
        dashed = {**look, "linestyle": "--", "marker": "o", "markersize": 5 if i == 0 else 10}
        series.append(Series(f"{run.label}, training", colour, range(len(run.losses)), run.losses, look))
        steps, losses = zip(*run.held_out, strict=True)
        series.append(Series(f"{run.label}, held out", colour, steps, losses, dashed))
    return lines("loss", series, "steps done", "loss (nats per token)", wide=wide)


def _step_time(runs: list[Record]) -> str:
    series = []
    for run, colour in zip(runs, _colours(runs).values(), strict=True):
        count, median = len(run.seconds), run.step_time()["median"]
        dots = {"linestyle": "", "marker": ".", "markersize": 6}
        series.append(Series(run.label, colour, range(1, count + 1), run.seconds, dots))
        label = f"{run.label}, median {median:.3g} s"
        series.append(Series(label, colour, (0.5, count + 0.5), (median, median), {"linewidth": 1.2}))
    return lines("time", series, "step", "seconds", zero=True)


def _saved(runs: list[Record]) -> str:
    sizes = [run.saved_bytes / 2**20 for run in runs]
    named = zip(_colours(runs).items(), sizes, strict=True)
    return bars("saved", [Bar(label, colour, size, f"{size:.1f} MiB") for (label, colour), size in named], "MiB")


def _memory(runs: list[Record]) -> str:
    series = [
        Series(run.label, colour, range(1, len(run.memory) + 1), [size / 2**20 for size in run.memory])
        for run, colour in zip(runs, _colours(runs).values(), strict=True)
    ]
    return lines("memory", series, "step", "MiB", zero=True)


def _adapter(name: str, run: Record, figures: tuple[str, str], labels: tuple[str, str]) -> str:
    """Draws two figures of the adapters of one run, with their range over the layers."""
    series = []
    for (label, colour), figure in zip(colours(labels).items(), figures, strict=True):
        low, high = (run.curve(f"adapter/{figure}_{end}")[1] for end in ("min", "max"))
        series.append(Series(label, colour, *run.curve(f"adapter/{figure}_mean"), band=(low, high)))
    return lines(name, series, "steps done", "", zero=True)
