"""Presents a profile: tables for the terminal and the page, plots, and notes on how the figures were measured."""

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
    for label, engine in result.engines.items():
        parts = [_ms(spread.median) for spread in (engine.forward, engine.backward, engine.optimizer)]
        parts[2] = "" if label == BASE else parts[2]
        spread = f"{_ms(engine.step.p20)}–{_ms(engine.step.p80)}"
        ratio = "" if label == FUSED else f"{engine.over_fused.median:.2f}"
        words = (*parts, _ms(engine.step.median), spread, f"{engine.tokens_per_second:,.0f}", ratio)
        rows.append([_named(label), *map(Cell, words)])
    return Table("", [Cell(text) for text in head], rows)


def _memory(result: Result) -> Table:
    head = ["memory and error", "kept for backward", "peak in a step", "largest gradient error"]
    rows = []
    for label, engine in result.engines.items():
        peak = "not counted" if engine.peak is None else f"{engine.peak / 2**20:,.1f} MiB"
        error = f"{result.worst_error(label):.2g}" if label in (EAGER, FUSED) else ""
        rows.append([_named(label), Cell(f"{engine.saved / 2**20:,.1f} MiB"), Cell(peak), Cell(error)])
    return Table("", [Cell(text) for text in head], rows)


def _layers(result: Result) -> Table:
    labels = (BASE, EAGER, FUSED)
    head = ["one layer, ms", "count", *labels, "eager over fused", "share of roofline", "error, eager · fused"]
    rows = []
    for layer in result.layers:
        times = [_ms(layer.seconds[label].median) for label in labels]
        ratio = layer.seconds[EAGER].median / layer.seconds[FUSED].median
        share = " · ".join(f"{100 * layer.share[label]:.0f}" for label in labels) + " %"
        error = " · ".join(f"{layer.error[label]:.1e}" for label in (EAGER, FUSED))
        words = (f"{layer.d_in}→{layer.d_out}", str(layer.count), *times, f"{ratio:.2f}", share, error)
        rows.append([Cell(word) for word in words])
    return Table("", [Cell(text) for text in head], rows, short=[0, 1, 2, 3, 4, 5, 6])


def figures(result: Result) -> list[tuple[str, str, str]]:
    """Returns (heading, caption, SVG) of each plot."""
    engines = result.engines.items()
    step = [_bar(label, label, engine.step) for label, engine in engines]
    parts = [
        _bar(label, f"{part}, {label}", getattr(engine, part))
        for part in PARTS
        for label, engine in engines
        if not (part == "optimizer" and label == BASE)
    ]
    kept = [
        Bar(label, COLOURS[label], engine.saved / 2**20, f"{engine.saved / 2**20:,.1f} MiB")
        for label, engine in engines
    ]
    per_layer = [
        _bar(label, f"{layer.d_in}→{layer.d_out}, {label}", layer.seconds[label])
        for layer in result.layers
        for label in (BASE, EAGER, FUSED)
    ]
    return [
        ("A training step", "Median; the line spans p20 to p80.", bars("step", step, "ms")),
        ("Kept for backward", "Memory that one forward pass stores for its backward pass.", bars("kept", kept, "MiB")),
        ("Parts of a step", "Median; the line spans p20 to p80.", bars("parts", parts, "ms")),
        (
            "Layers",
            "Forward + backward of one layer of each shape, measured by itself.",
            bars("layers", per_layer, "ms"),
        ),
        ("Step by step", "Each dot is a step; load from other programs shows as outliers.", _by_round(result)),
    ]


def notes(result: Result) -> list[str]:
    """Returns notes on how the figures were measured."""
    size = f"{result.settings['batch']} × {result.settings['seq_len']} random tokens"
    texts = [
        f"A step is the forward and backward pass over {size} and the optimizer's update, always with the same batch. "
        f"The engines take turns step by step ({result.settings['steps']} counted steps each, after one that is not "
        "counted) and share every weight. “Over fused” is the median of the ratios of steps in the same round.",
        "“base” is the frozen model without adapters, with gradients down to its embeddings. “PEFT eager” and “PEFT "
        "compiled” are PEFT's layers with torch's fused AdamW, the latter with each repeated block under "
        "torch.compile. “fused” is the same PEFT model after lora_fast.fuse_, with LoRAAdamW. 16-bit weights run under "
        "autocast, as in transformers' Trainer.",
        "The peak contains the engine's own model, its optimizer state, and the most that a step allocates besides. "
        "“Kept for backward” counts the distinct tensors that a forward pass stores, logits and loss included, weights "
        "excluded.",
        "The gradient error is the largest relative L2 error of dx, da and db against PEFT's eager layer in float64, "
        "over the dequantised weight where the weight is quantised, "
        f"for one layer of each shape, on at most {CHECKED_TOKENS} tokens of its inputs and gradients in the model, "
        "without dropout. lora_B is random here, since a fresh one is zero.",
        "The share of the roofline (base · eager · fused) is the least time for the layer's operations and bytes, each "
        f"operand once, at this device's own ceilings, over the median of {ROUNDS} rounds. The ceilings are "
        f"{result.ceilings.operations / 1e12:.3g} TFLOP/s in a square GEMM and "
        f"{result.ceilings.bandwidth / 1e9:.3g} GB/s in a copy, read plus written. Operands that stay in caches can "
        "give more than 100 %; a GPU's L2 cache is overwritten before each run.",
        f"Conditions: {result.machine}.",
    ]
    if result.skipped:
        texts.append(f"{COMPILED} is missing: {result.skipped}.")
    return texts


def html(result: Result, title: str) -> str:
    """Returns a self-contained page: styles and drawings are embedded."""
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
    for label, engine in result.engines.items():
        milliseconds = [1e3 * value for value in engine.times.step]
        series.append(Series(label, COLOURS[label], range(1, len(milliseconds) + 1), milliseconds, dots))
    return lines("rounds", series, "step", "ms", wide=True, zero=True)


def _bar(label: str, name: str, spread: Spread) -> Bar:
    span = 1e3 * spread.p20, 1e3 * spread.p80
    return Bar(name, COLOURS[label], 1e3 * spread.median, f"{_ms(spread.median)} ms", span)


def _named(label: str) -> Cell:
    return Cell(label, COLOURS[label])


def _ms(seconds: float) -> str:
    """Formats seconds as ms with three significant digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
