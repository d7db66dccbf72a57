"""The options of ``lora-fast tune`` and the order of its steps. search.py measures; kernels/tuned.py keeps the
result."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from ...checks import ArgumentError
from ..inputs.settings import Settings, absolute
from ..output.tables import Cell, Table
from ..output.terminal import Display, exit_codes

_MODEL = "A folder or hub id of a causal language model. Only its configuration is read, not its weights."
_TARGETS = "all-linear, or the names of the layers to adapt, such as q_proj,v_proj."
_FOUR_BIT = "Also measure 4-bit weights: bitsandbytes' product against the fused one. Needs bitsandbytes."
_SHOW = "Show the choices so far and the file that keeps them. Measures nothing."
_CLEAR = "Delete all choices. Measures nothing."


def tune(
    model: Annotated[str, typer.Option(help=_MODEL)] = Settings.model,
    rank: Annotated[int, typer.Option(help="Rank of the adapters, 1 to 256.")] = Settings.rank,
    dropout: Annotated[
        float, typer.Option(help="Probability that an input of an adapter is dropped.")
    ] = Settings.dropout,
    targets: Annotated[str, typer.Option(help=_TARGETS)] = Settings.targets,
    batch: Annotated[int, typer.Option(help="Number of blocks in one forward pass.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Number of tokens in a block.")] = 2048,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.", metavar="NAME")] = Settings.dtype,
    four_bit: Annotated[bool, typer.Option("--four-bit", help=_FOUR_BIT)] = False,
    show: Annotated[bool, typer.Option("--show", help=_SHOW)] = False,
    clear: Annotated[bool, typer.Option("--clear", help=_CLEAR)] = False,
) -> None:
    """Measure which kernels are fastest for a model on this GPU, and keep the choices.

    For every layer shape of the model it chooses the GEMM (the fused one, cuBLAS and a kernel that adds the adapter's
    part, or on sm_90 the warp-specialised "gluon") and the tiles. The choices are kept in the user's cache folder, by
    device, dtype and shape, and every program that uses lora_fast on this GPU follows them. Without choices the
    defaults run, which are the same on all GPUs of a kind.

    Takes minutes, mostly to compile. Each shape is kept as soon as it is done. The results of a layer change in their
    last bits only, since candidates with other results are dropped. This command has not been run on a GPU yet, so its
    gain is unknown.

    **Examples**

    - `lora-fast tune --model meta-llama/Llama-3.1-8B --rank 16 --batch 4 --seq-len 2048`

        measures for batches of 8,192 tokens; the choices hold for 4,097 to 8,192 tokens

    - `lora-fast tune --show`

        shows the choices so far

    - `lora-fast tune --clear`

        returns to the defaults
    """
    display = Display()
    with exit_codes(display):
        if show:
            _show(display)
        elif clear:
            _clear(display)
        else:
            settings = Settings(
                model=absolute(model),
                rank=rank,
                dropout=dropout,
                targets=targets,
                batch=batch,
                seq_len=seq_len,
                dtype=dtype,
            )
            run(settings, display, four_bit)


def run(settings: Settings, display: Display, four_bit: bool = False) -> None:
    """Measures every layer shape of the model, and writes the file after each of them.

    Raises:
        ArgumentError: there is no GPU, an option is out of range, bitsandbytes is missing for ``four_bit``, or the file
            is damaged.
    """
    device = _gpu()
    settings.check()
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ArgumentError("--four-bit", "an environment with bitsandbytes", "none: pip install bitsandbytes")
    from ...kernels import tuned
    from ..inputs import models
    from ..output.progress import bar
    from . import search

    known = _read()
    dtype = models.choose_dtype(settings.dtype)
    source = models.cached(settings.model, models.locate(settings.model))
    tokens = settings.batch * settings.seq_len
    shapes = [
        search.Shape(tokens, d_in, d_out, settings.rank, settings.dropout, dtype, four_bit)
        for d_in, d_out in layer_shapes(source, settings.target_modules)
    ]
    table = known.setdefault(tuned.device_name(device), {})
    display.note(f"{len(shapes)} layer shapes on {tuned.device_name(device)}")
    finished = 0

    def keep() -> None:
        nonlocal finished
        tuned.write(known)
        finished += 1
        progress.advance()

    try:
        with bar(display, len(shapes)) as progress:
            outcomes = search.search_all(
                shapes,
                device,
                table,
                search.time_on_gpu,
                before_case=lambda key: progress.doing(f"{key.op} {_shape(key)}"),
                after_shape=keep,
            )
    except KeyboardInterrupt:
        display.note(f"Interrupted: {finished} of {len(shapes)} shapes are kept in {tuned.path()}.")
        raise typer.Exit(130) from None
    display.show(results(outcomes))
    display.note(f"\nkept in    {tuned.path()}")


def layer_shapes(source: str, targets: str | list[str]) -> list[tuple[int, int]]:
    """Returns the distinct (d_in, d_out) of the linear layers that the targets name. Loads no weights.

    Raises:
        ArgumentError: the targets match no layer.
    """
    import torch
    import transformers

    from ... import LoRAConfig, inject_
    from ...layers.lora import LoRALinear
    from ..inputs import models

    models.quieten()
    config = models.load_config(source)
    with torch.device("meta"):  # shapes without data
        model = transformers.AutoModelForCausalLM.from_config(config)
    inject_(model, LoRAConfig(r=1, alpha=1, target_modules=targets))
    layers = (module for module in model.modules() if isinstance(module, LoRALinear))
    return list(dict.fromkeys((module.in_features, module.out_features) for module in layers))


def results(outcomes: list) -> Table:
    """Returns the table of outcomes, one row for each op and shape."""
    head = ["op", "shape", "default", "best", "gain", "choice", "tried"]
    rows = []
    for outcome in outcomes:
        gain = f"{outcome.default / outcome.best:.2f}" if outcome.choice else ""
        times = [f"{1e6 * seconds:.1f} µs" for seconds in (outcome.default, outcome.best)]
        tried = f"{outcome.tried}" + (f", {outcome.failed} unfit" if outcome.failed else "")
        choice = _choice(outcome.choice) or "the default"
        rows.append([Cell(text) for text in (outcome.key.op, _shape(outcome.key), *times, gain, choice, tried)])
    return Table("", [Cell(text) for text in head], rows, short=[0, 1, 2, 3, 5])


def _shape(key) -> str:
    return "→".join(str(size) for size in (key.d_in, key.d_out) if size)


def _choice(table: dict) -> str:
    return " ".join(choice if isinstance(choice, str) else "×".join(map(str, choice)) for choice in table.values())


def _gpu():
    """Returns the current CUDA device, or raises ArgumentError or BackendError if kernels cannot be timed on it."""
    import torch

    from ... import platforms
    from ...backend import interpreting

    if not torch.cuda.is_available():
        got = "none (the defaults need no tuning; --show and --clear work anywhere)"
        raise ArgumentError("lora-fast tune", "a CUDA GPU to measure on", got)
    if interpreting():
        raise ArgumentError("lora-fast tune", "compiled kernels", "TRITON_INTERPRET in the environment: unset it")
    device = torch.device("cuda", torch.cuda.current_device())
    platforms.require("lora-fast tune", platforms.obstacle(device))
    return device


def _read() -> dict:
    from ...kernels import tuned

    try:
        return tuned.read()
    except ValueError as error:
        raise ArgumentError("lora-fast tune", "a file that it wrote itself, or --clear to start anew", error) from None


def _show(display: Display) -> None:
    from ...kernels import tuned

    known = _read()
    head = [Cell(text) for text in ("op", "dtype", "tokens up to", "shape", "r", "choice")]
    for device, table in known.items():
        rows = []
        for key, choice in sorted(table.items()):
            words = [key.op, key.dtype, f"{key.tokens:,}", _shape(key), str(key.r), _choice({key: choice})]
            rows.append([Cell(word) for word in words])
        display.show(Table(device, head, rows))
    display.note(f"kept in    {tuned.path()}" if known else f"Nothing measured yet: {tuned.path()} does not exist.")


def _clear(display: Display) -> None:
    from ...kernels import tuned

    display.note(f"Removed {tuned.path()}." if tuned.clear() else f"Nothing to remove: {tuned.path()} does not exist.")
