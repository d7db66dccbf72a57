"""What a profile shows: tables for the terminal and the page, plots, how the figures were taken."""

from __future__ import annotations

from ...measure.clock import Spread
from ..output import pages
from ..output.palette import colours
from ..output.plots import Bar, Series, bars, lines
from ..output.tables import Cell, Table
from .engines import BASE, COMPILED, EAGER, FUSED, LABELS
from .layer_times import CHECKED_TOKENS, ROUNDS
from .profile_result import Result
from .step_times import PARTS

COLOURS = colours(LABELS)


def tables(result: Result) -> list[Table]:
    return [_times(result), _memory(result), _layers(result)]


def _times(result: Result) -> Table:
    head = ["ms a step", *PARTS, "step", "p20–p80", "tokens/s", "over\nfused"]
    rows = []
    for label, one in result.engines.items():
        parts = [_ms(spread.median) for spread in (one.forward, one.backward, one.optimizer)]
        parts[2] = "" if label == BASE else parts[2]
        spread = f"{_ms(one.step.p20)}–{_ms(one.step.p80)}"
        ratio = "" if label == FUSED else f"{one.over_fused.median:.2f}"
        words = (*parts, _ms(one.step.median), spread, f"{one.tokens_per_second:,.0f}", ratio)
        rows.append([_named(label), *map(Cell, words)])
    return Table("", [Cell(text) for text in head], rows)


def _memory(result: Result) -> Table:
    head = ["memory and error", "kept for backward", "peak in a step", "largest gradient error"]
    rows = []
    for label, one in result.engines.items():
        peak = "not counted" if one.peak is None else f"{one.peak / 2**20:,.1f} MiB"
        error = f"{result.worst_error(label):.2g}" if label in (EAGER, FUSED) else ""
        rows.append([_named(label), Cell(f"{one.saved / 2**20:,.1f} MiB"), Cell(peak), Cell(error)])
    return Table("", [Cell(text) for text in head], rows)


def _layers(result: Result) -> Table:
    three = (BASE, EAGER, FUSED)
    head = ["one layer, ms", "count", *three, "eager over fused", "share of roofline", "error, eager · fused"]
    rows = []
    for layer in result.layers:
        times = [_ms(layer.seconds[label].median) for label in three]
        ratio = layer.seconds[EAGER].median / layer.seconds[FUSED].median
        share = " · ".join(f"{100 * layer.share[label]:.0f}" for label in three) + " %"
        error = " · ".join(f"{layer.error[label]:.1e}" for label in (EAGER, FUSED))
        words = (f"{layer.d_in}→{layer.d_out}", str(layer.count), *times, f"{ratio:.2f}", share, error)
        rows.append([Cell(word) for word in words])
    return Table("", [Cell(text) for text in head], rows, short=[0, 1, 2, 3, 4, 5, 6])


def figures(result: Result) -> list[tuple[str, str, str]]:
    """Heading, caption, drawing."""
    found = result.engines.items()
    step = [_bar(label, label, one.step) for label, one in found]
    parts = [
        _bar(label, f"{part}, {label}", getattr(one, part))
        for part in PARTS
        for label, one in found
        if not (part == "optimizer" and label == BASE)
    ]
    kept = [Bar(label, COLOURS[label], one.saved / 2**20, f"{one.saved / 2**20:,.1f} MiB") for label, one in found]
    per_layer = [
        _bar(label, f"{layer.d_in}→{layer.d_out}, {label}", layer.seconds[label])
        for layer in result.layers
        for label in (BASE, EAGER, FUSED)
    ]
    return [
        ("A training step", "Median; the line spans p20 to p80.", bars("step", step, "ms")),
        ("Kept for backward", "What one forward pass stores for its backward pass.", bars("kept", kept, "MiB")),
        ("Its parts", "Median; the line spans p20 to p80.", bars("parts", parts, "ms")),
        ("Layers", "Forward + backward of one layer of each shape, by itself.", bars("layers", per_layer, "ms")),
        ("Step by step", "One dot a step: what else the machine did shows here.", _by_round(result)),
    ]


def notes(result: Result) -> list[str]:
    """How the figures were taken."""
    size = f"{result.settings['batch']} × {result.settings['seq_len']} random tokens"
    said = [
        f"One step: forward and backward pass over {size}, and the optimizer's update; the same batch each time. The "
        f"engines take turns step by step ({result.settings['steps']} counted steps each, one before that not counted) "
        "and share every weight. Over fused: the median of the ratios of steps in the same round.",
        "base: the frozen model without adapters, gradients through to its embeddings. PEFT eager and PEFT compiled: "
        "PEFT's layers with torch's fused AdamW; compiled: each repeated block by torch.compile. fused: the same PEFT "
        "model after lora_fast.fuse_, with LoRAAdamW. 16-bit weights run under autocast, as in transformers' Trainer.",
        "Peak: the engine's own model and optimizer state, and the most that a step allocates besides. Kept for "
        "backward: distinct tensors that a forward pass stores, weights not counted; logits and loss are in it.",
        f"Gradient error: of one layer of each shape, on {CHECKED_TOKENS} tokens at most of the inputs and gradients "
        "that it met in the model, without dropout: the largest relative L2 error of dx, da and db against "
        "PEFT's eager layer in float64. lora_B is random here: a fresh one is zero.",
        f"Share of roofline (base · eager · fused): the least time for the layer's operations and bytes, each operand "
        f"once, at this device's own ceilings, over the median of {ROUNDS} rounds. Ceilings: "
        f"{result.ceilings.operations / 1e12:.3g} TFLOP/s in one square GEMM, {result.ceilings.bytes / 1e9:.3g} GB/s "
        "in one copy, read and written. What fits into caches can be above 100 %; a GPU's L2 cache is overwritten "
        "before each run.",
        f"Conditions: {result.machine}.",
    ]
    if result.skipped:
        said.append(f"{COMPILED}: left out, {result.skipped}.")
    return said


def html(result: Result, title: str) -> str:
    """One page that needs nothing else: styles and drawings are inside."""
    return pages.render(
        "profile/profile.html.jinja",
        title=title,
        result=result,
        tables=tables(result),
        figures=figures(result),
        notes=notes(result),
    )


def _by_round(result: Result) -> str:
    dots = {"linestyle": "", "marker": "o", "markersize": 5}
    series = []
    for label, one in result.engines.items():
        seconds = [1e3 * value for value in one.times.step]
        series.append(Series(label, COLOURS[label], range(1, len(seconds) + 1), seconds, dots))
    return lines("rounds", series, "step", "ms", wide=True, zero=True)


def _bar(label: str, name: str, spread: Spread) -> Bar:
    span = 1e3 * spread.p20, 1e3 * spread.p80
    return Bar(name, COLOURS[label], 1e3 * spread.median, f"{_ms(spread.median)} ms", span)


def _named(label: str) -> Cell:
    return Cell(label, COLOURS[label])


def _ms(seconds: float) -> str:
    """Three digits that matter."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
