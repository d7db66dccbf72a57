"""lora-fast profile: its options and its help. measurement.py measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...checks import ArgumentError
from ..inputs import quantization
from ..inputs.settings import Settings, absolute
from ..output import run_folder
from ..output.terminal import Display, exit_codes

FIGURES, PAGE = "profile.json", "profile.html"
SIZES = {"cuda": (4, 2048), "cpu": (2, 256)}  # default batch and tokens
STEPS = 5

_MODEL = "A folder or hub id of a causal language model; smollm2 is SmolLM2-135M from its package."
_TARGETS = "all-linear, or the names of the layers to adapt, such as q_proj,v_proj."
_TARGET_PARAMETERS = "Parameters of experts to adapt too, such as experts.gate_up_proj,experts.down_proj."
_BATCH = "Blocks in one forward pass; by default 4 on a GPU and 2 on a CPU."
_SEQ_LEN = "Tokens in a block; by default 2048 on a GPU and 256 on a CPU, or the model's maximum if that is less."
_DTYPE = "Dtype of the frozen weights: auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16."
_QUANTIZE = (
    f"Store the frozen weights in fewer bits: {', '.join(quantization.FORMATS)}, which lora-fast finetune --help "
    "explains. PEFT eager then has PEFT's QLoRA layers."
)
_COMPILE = "Whether to measure PEFT's model under torch.compile too, which takes about a minute."
_OUTPUT = "A new folder for the results; by default the next number in runs/."


def profile(
    model: Annotated[str, typer.Option(help=_MODEL)] = Settings.model,
    rank: Annotated[int, typer.Option(help="Rank of the adapters, 1 to 256.")] = Settings.rank,
    dropout: Annotated[float, typer.Option(help="Dropout probability of an adapter's inputs.")] = Settings.dropout,
    targets: Annotated[str, typer.Option(help=_TARGETS)] = Settings.targets,
    target_parameters: Annotated[str | None, typer.Option(help=_TARGET_PARAMETERS, metavar="NAMES")] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Profile DoRA in place of LoRA.")] = Settings.dora,
    batch: Annotated[int | None, typer.Option(help=_BATCH)] = None,
    seq_len: Annotated[int | None, typer.Option(help=_SEQ_LEN)] = None,
    dtype: Annotated[str, typer.Option(help=_DTYPE, metavar="NAME")] = Settings.dtype,
    quantize: Annotated[str | None, typer.Option(help=_QUANTIZE, metavar="FORMAT")] = None,
    steps: Annotated[int, typer.Option(help="Number of counted steps of each engine.")] = STEPS,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help=_COMPILE)] = True,
    output: Annotated[Path | None, typer.Option(help=_OUTPUT)] = None,
) -> None:
    """Measure what fusing would bring for a model, on this machine.

    Runs training steps of the frozen model, of PEFT eager, of PEFT compiled and of PEFT fused, in turns. Writes
    profile.html, profile.json and a Chrome trace of each engine into a folder, and on a GPU memory snapshots. The page
    shows the time of each part of a step, memory, gradient errors against float64, the fused layers and why others are
    not fused, and each layer shape by itself against the device's own ceilings. The verdict states whether there is a
    gain. Not yet run on a GPU.

    **Examples**

    - `lora-fast profile`

        profiles the packaged model in two to three minutes on two quiet CPU cores, without a network

    - `lora-fast profile --model Qwen/Qwen3-0.6B --rank 32 --dropout 0.05 --batch 8 --seq-len 1024`

        profiles your own model with your settings

    - `lora-fast profile --quantize nf4`

        profiles QLoRA: adapters over weights of 4 bits

    - `lora-fast profile --no-compile --steps 20`

        takes more steps for steadier figures, without the compiler
    """
    display = Display()
    with exit_codes(display):
        settings = Settings(
            model=absolute(model),
            rank=rank,
            dropout=dropout,
            targets=targets,
            target_parameters=target_parameters,
            dora=dora,
            dtype=dtype,
            quantize=quantize,
            steps=steps,
            batch=Settings.batch if batch is None else batch,
            seq_len=Settings.seq_len if seq_len is None else seq_len,
        ).check()
        given = {name for name, size in (("batch", batch), ("seq_len", seq_len)) if size is not None}
        run(settings, given, compiled, output or run_folder.fresh("profile", model), display)


def run(settings: Settings, given: set[str], compiled: bool, folder: Path, display: Display) -> None:
    """Measures, writes the files and prints the tables.

    Args:
        given: the options among batch and seq_len that the user has set; the others follow from the device.

    Raises:
        ArgumentError: an option does not fit the model or the machine.
    """
    from dataclasses import replace

    from ..inputs import models

    quantization.check_installed(settings.quantize)
    source = models.locate(settings.model)
    run_folder.check_free(folder)
    slow = models.needs_conversion(settings.model)
    with display.working("Converting the packaged model, once (about 20 s)" if slow else "Loading libraries"):
        import torch

        models.quieten()  # before the next line imports peft, and with it the libraries of quantised weights
        from . import measurement, report

        source = models.cached(settings.model, source)
        config = models.load_config(source, settings.quantize)
        dtype = models.choose_dtype(settings.dtype)
    longest = getattr(config, "max_position_embeddings", None) or 2**31
    batch, seq_len = SIZES["cuda" if torch.cuda.is_available() else "cpu"]
    settings = replace(
        settings,
        batch=settings.batch if "batch" in given else batch,
        seq_len=settings.seq_len if "seq_len" in given else min(seq_len, longest),
    )
    if settings.seq_len > longest:
        raise ArgumentError("--seq-len", f"at most the model's {longest} positions", settings.seq_len)
    settings = replace(settings, dtype=str(dtype).removeprefix("torch."))
    quantized = f" over {settings.quantize} weights" if settings.quantize else ""
    display.note(
        f"{Path(settings.model).name}, {settings.dtype}{quantized}: {settings.steps} steps of {settings.batch} × "
        f"{settings.seq_len} tokens, rank {settings.rank}, the engines in turns"
    )
    result = measurement.measure(settings, source, dtype, compiled, folder, display)
    run_folder.write_json(folder / FIGURES, result.as_dict())
    run_folder.write_text(folder / PAGE, report.html(result, f"Profile of {Path(settings.model).name}"))
    for table in report.tables(result):
        display.show(table)
        display.note("")
    display.note(result.fused_layers_text() + (f"; PEFT compiled skipped: {result.skipped}" if result.skipped else ""))
    display.note(result.verdict(), style="bold")
    display.note(result.machine, style="dim")
    display.note(f"\npage      {folder / PAGE}\nfigures   {folder / FIGURES}\ntraces    {folder}/trace-*.json.gz")
    if torch.cuda.is_available():
        display.note(f"memory    {folder}/memory-*.pickle")
