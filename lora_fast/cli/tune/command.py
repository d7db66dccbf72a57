"""lora-fast tune: its options, and the order of things. The search is in search.py, the file in kernels/tuned.py."""

from __future__ import annotations

from typing import Annotated

import typer

from ...checks import ArgumentError
from ..inputs.settings import Settings, absolute
from ..output.tables import Cell, Table
from ..output.terminal import Display, exit_codes

_MODEL = "A folder or hub id of a causal language model: its configuration is read, not its weights."
_TARGETS = "all-linear, or the names of the layers to adapt: q_proj,v_proj."
_SHOW = "Show what has been measured so far, and where it is kept; measure nothing."
_CLEAR = "Forget everything that was measured; measure nothing."


def tune(
    model: Annotated[str, typer.Option(help=_MODEL)] = Settings.model,
    rank: Annotated[int, typer.Option(help="Rank of the adapters, 1 to 256.")] = Settings.rank,
    dropout: Annotated[float, typer.Option(help="Share of an adapter's inputs dropped.")] = Settings.dropout,
    targets: Annotated[str, typer.Option(help=_TARGETS)] = Settings.targets,
    batch: Annotated[int, typer.Option(help="Blocks in one forward pass.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens in a block.")] = 2048,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.", metavar="NAME")] = Settings.dtype,
    show: Annotated[bool, typer.Option("--show", help=_SHOW)] = False,
    clear: Annotated[bool, typer.Option("--clear", help=_CLEAR)] = False,
) -> None:
    """Measure which kernels are fastest for a model on this GPU, and remember it.

    For every layer shape of the model: which GEMM (the fused one, cuBLAS and a kernel that adds the adapter's part, or
    on sm_90 the warp-specialised "gluon") and which tiles. The choices are kept in a file of the user's cache, by
    device, dtype and shape; from then on every program that uses lora_fast on this GPU takes them. Without it the
    defaults run, which are the same on every machine of its kind. Takes minutes, most of them for compiling; each shape
    is kept as soon as it is done. Results differ from the defaults' in their last bits only: a candidate that gives
    anything else is dropped. Not yet run on a GPU: no gain is promised.

    **Examples**

    - `lora-fast tune --model meta-llama/Llama-3.1-8B --rank 16 --batch 4 --seq-len 2048`

        measure, for batches of 8,192 tokens (or any number from 4,097 to 8,192)

    - `lora-fast tune --show`

        what is known

    - `lora-fast tune --clear`

        back to the defaults
    """
    display = Display()
    with exit_codes(display):
        if show:
            _show(display)
        elif clear:
            _clear(display)
        else:
            asked = {"rank": rank, "dropout": dropout, "targets": targets, "batch": batch, "seq_len": seq_len}
            run(Settings(model=absolute(model), dtype=dtype, **asked), display)


def run(settings: Settings, display: Display) -> None:
    """Measure, and write the file after each shape.

    Raises:
        ArgumentError: no GPU, options that do not fit, or a damaged file.
    """
    device = _gpu()
    settings.check()
    from ...kernels import tuned
    from ..inputs import models
    from ..output.progress import bar
    from . import search

    known = _read()
    dtype = models.choose_dtype(settings.dtype)
    source = models.cached(settings.model, models.locate(settings.model))
    tokens = settings.batch * settings.seq_len
    shapes = [
        search.Shape(tokens, d_in, d_out, settings.rank, settings.dropout, dtype)
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
            doing = lambda key: progress.doing(f"{key.op} {_shape(key)}")
            outcomes = search.search_all(shapes, device, table, search.time_on_gpu, doing, keep)
    except KeyboardInterrupt:
        display.note(f"Interrupted: {finished} of {len(shapes)} shapes are kept in {tuned.path()}.")
        raise typer.Exit(130) from None
    display.show(results(outcomes))
    display.note(f"\nkept in    {tuned.path()}")


def layer_shapes(source: str, targets: str | list[str]) -> list[tuple[int, int]]:
    """Distinct (d_in, d_out) of the linear layers that the targets name; no weights are loaded.

    Raises:
        ArgumentError: no such layers.
    """
    import torch
    import transformers

    from ... import LoRAConfig, inject_
    from ...layers.lora import LoRALinear
    from ..inputs import models

    models.quieten()
    config = models.load_config(source)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    inject_(model, LoRAConfig(r=1, alpha=1, target_modules=targets))
    layers = (module for module in model.modules() if isinstance(module, LoRALinear))
    return list(dict.fromkeys((module.in_features, module.out_features) for module in layers))


def results(outcomes: list) -> Table:
    """What was measured, op by op."""
    head = ["op", "shape", "default", "best", "gain", "choice", "tried"]
    rows = []
    for one in outcomes:
        gain = f"{one.default / one.best:.2f}" if one.choice else ""
        micro = [f"{1e6 * seconds:.1f} µs" for seconds in (one.default, one.best)]
        tried = f"{one.tried}" + (f", {one.failed} unfit" if one.failed else "")
        words = [one.key.op, _shape(one.key), *micro, gain, _choice(one.choice) or "the default", tried]
        rows.append([Cell(word) for word in words])
    return Table("", [Cell(text) for text in head], rows, short=[0, 1, 2, 3, 5])


def _shape(key) -> str:
    return "→".join(str(size) for size in (key.d_in, key.d_out) if size)


def _choice(table: dict) -> str:
    return " ".join(choice if isinstance(choice, str) else "×".join(map(str, choice)) for choice in table.values())


def _gpu():
    """The current CUDA device."""
    import torch

    from ...backend import interpreting

    if not torch.cuda.is_available():
        got = "none (the defaults need no tuning; --show and --clear work anywhere)"
        raise ArgumentError("lora-fast tune", "a CUDA GPU to measure on", got)
    if interpreting():
        raise ArgumentError("lora-fast tune", "compiled kernels", "TRITON_INTERPRET in the environment: unset it")
    return torch.device("cuda", torch.cuda.current_device())


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

    display.note(f"Removed {tuned.path()}" if tuned.clear() else f"Nothing to remove: no {tuned.path()}")
