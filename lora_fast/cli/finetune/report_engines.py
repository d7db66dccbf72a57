"""What the report says of one run, or of both engines side by side."""

from __future__ import annotations

import statistics

from ..inputs.settings import Settings
from ..output.palette import colours
from ..output.plots import Bar, Series, bars, lines
from ..output.tables import Cell, Table
from .record import Record


def comparison(settings: Settings, runs: list[Record]) -> dict[str, object] | None:
    """How far the engines are apart, in their losses and in their speed."""
    if len(runs) < 2:
        return None
    fused, eager = runs
    return {
        "max_loss_difference": _furthest(fused.losses, eager.losses),
        "max_held_out_difference": _furthest(*([loss for _, loss in run.held_out] for run in runs)),
        "step_time_ratio": eager.step_time()["median"] / fused.step_time()["median"],
        "saved_bytes_ratio": eager.saved_bytes / fused.saved_bytes,
        "ran_first": fused.label,
    }


def _furthest(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def headline(settings: Settings, runs: list[Record]) -> str:
    compared = comparison(settings, runs)
    said = f"Held-out loss {runs[0].held_out[0][1]:.3f} → {runs[0].held_out[-1][1]:.3f}"
    if compared is None:
        return said
    apart, ratio = compared["max_loss_difference"], compared["step_time_ratio"]
    return f"{said} · loss curves apart by at most {apart:.1g} · step time, eager over fused: {ratio:.2f}"


def tables(settings: Settings, runs: list[Record]) -> list[Table]:
    """A row for each figure, a column for each run, and the comparison."""
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
        ("of it the optimizer", [f"{1e3 * run.optimizer_time():.1f} ms" for run in runs], ""),
        ("tokens per second", pace, ""),
        ("kept for backward", kept, "eager / fused {saved_bytes_ratio:.3f}"),
        ("trained parameters", [f"{run.trained_parameters:,}" for run in runs], ""),
    ]
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
    """Heading, caption, drawing."""
    both = len(runs) > 1
    drawn = [
        ("Loss", "Solid: training loss of each step. Dashed, with dots: held-out loss.", _loss(runs, wide=both)),
        ("Step time", "One dot a step; the line is the median.", _step_time(runs)),
        ("Kept for backward", "What one forward pass stores until its backward pass.", _saved(runs)),
    ]
    if not share_a_process(runs):
        drawn.append(("Memory", f"MiB, {runs[0].memory_kind}.", _memory(runs)))
    if not both:
        norms = "‖a‖ and ‖b‖, Frobenius: the mean over all adapters, and the lowest to the highest."
        ranks = "Of ΔW = s·b·a: singular values above 0.005; stable rank ‖ΔW‖²_F / ‖ΔW‖²₂. Mean, lowest to highest."
        drawn.append(("Norms of the factors", norms, _adapter("norms", runs[0], ("norm_a", "norm_b"), ("‖a‖", "‖b‖"))))
        drawn.append(("Rank of the update", ranks, _adapter("rank", runs[0], ("rank", "erank"), ("rank", "erank"))))
    return drawn


def notes(settings: Settings, runs: list[Record]) -> list[str]:
    """How the figures were taken."""
    said = [
        "Step time: forward, backward, gradient clipping and optimizer update; data loading, evaluation, statistics, "
        "checkpoints and logging are outside, and so is the first step, which allocates. The optimizer's part: mean.",
        "Held-out loss: mean over blocks of text that are never trained on. Training loss, last 10: mean of the last "
        "ten steps, each on other text; the largest difference is over all steps.",
        "Kept for backward: bytes of all distinct tensors that one micro-batch's forward pass stores for its backward "
        "pass, the model's own weights not counted; the output logits, the same for both engines, are in it.",
    ]
    if len(runs) > 1:
        first, second = (run.label for run in runs)
        said.append(
            f"Both from the same seed, one after the other in one process: {first} first, then {second}. What else the "
            "machine did meanwhile is in the times: a wide span from p20 to p80 shows it."
        )
    if share_a_process(runs):
        said.append("The process's size is in metrics.json only: in the second run it includes what the first left.")
    return [*said, *(f"Layers of the {run.label} run: {run.layers}." for run in runs)]


def share_a_process(runs: list[Record]) -> bool:
    """Whether the memory figures are sizes of one process of several runs: the second would carry the first."""
    return len(runs) > 1 and "GPU" not in runs[0].memory_kind


def _colours(runs: list[Record]) -> dict[str, str]:
    return colours(run.label for run in runs)


def _loss(runs: list[Record], wide: bool) -> str:
    """Where both engines agree, the second line would hide the first: it is broad and pale, the first one thin."""
    series = []
    for i, (run, colour) in enumerate(zip(runs, _colours(runs).values(), strict=True)):
        look = {"linewidth": 1.6, "zorder": 3} if i == 0 else {"linewidth": 5, "alpha": 0.45, "zorder": 2}
        dashed = {**look, "linestyle": "--", "marker": "o", "markersize": 5 if i == 0 else 10}
        series.append(Series(f"{run.label}, training", colour, range(len(run.losses)), run.losses, look))
        series.append(Series(f"{run.label}, held out", colour, *zip(*run.held_out, strict=True), dashed))
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
    """Two figures of the adapters of one run, with their spread over the layers."""
    series = []
    for (label, colour), figure in zip(colours(labels).items(), figures, strict=True):
        low, high = (run.curve(f"adapter/{figure}_{end}")[1] for end in ("min", "max"))
        series.append(Series(label, colour, *run.curve(f"adapter/{figure}_mean"), band=(low, high)))
    return lines(name, series, "steps done", "", zero=True)
