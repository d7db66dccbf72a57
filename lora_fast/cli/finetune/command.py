"""The options and the help of ``lora-fast finetune``. pipeline.py does the work."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from ...layers.nb_lora import NORMS
from ..inputs import quantization
from ..inputs.method_options import METHODS, overview, with_bounds
from ..inputs.settings import DEFAULT_STEPS, Settings, absolute
from ..output import run_folder
from ..output.terminal import Display, exit_codes
from . import next_steps, pipeline

_BY_DEFAULT = Settings()  # the defaults of the options below
_DEFAULT_METHODS = list(_BY_DEFAULT.method)  # typer takes and passes lists


def _option(panel: str, text: str, *names: str, **more):
    return typer.Option(*names, rich_help_panel=panel, help=text, **more)


_DATA = (
    'A text file, or a .jsonl file whose lines are {"text": …}, {"prompt": …, "completion": …} (only the completion is '
    'trained) or {"messages": …} (formatted by the chat template of the model). kjv is the King James text, which is '
    "installed as a package."
)
_MODEL = "A folder or hub id of a causal language model. smollm2 is SmolLM2-135M, which is installed as a package."
_ALPHA = "The adapters are scaled by alpha / rank. nb-lora uses its bound instead."
_TARGETS = "all-linear, or the names of the layers to adapt, such as q_proj,v_proj."
_TARGET_PARAMETERS = (
    "Parameters of a mixture's experts to adapt beside --targets, such as experts.gate_up_proj,experts.down_proj. Each "
    "expert gets an adapter."
)
_DORA = "Train DoRA: a magnitude for each row of W + ΔW, whose direction LoRA trains."
_STEPS = f"Number of optimizer steps. The default is {DEFAULT_STEPS}, unless --epochs is given."
_PROMPT = "The text that the samples before and after training continue. The default is the start of the held-out text."
_OUTPUT = "A new folder for the results. The default is the next free number in runs/."
_SAVE_EVERY = "Number of steps between checkpoints. The default is a quarter of the run."
_DTYPE = "auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16."
_QUANTIZE = (
    "Store the frozen weights of linear layers in fewer bits and train adapters over them (QLoRA). The formats are "
    f"{quantization.choices()}. The output layer is not quantised. 4-bit layers compute in --dtype. A model whose "
    "files are quantised already is loaded as it is, without this option."
)
_RESUME = "Continue the interrupted run in --output exactly where it stopped, with its settings."
_METHOD = (
    f"The method that trains the adapters: {', '.join(METHODS)}. Options follow a colon, as in ilora:lam=0.1,lr=5e-4. "
    "All methods and options are listed below."
)
_ENGINE = "fused runs each adapted layer as one operation; eager runs PEFT's own layers."
_COMPARE = (
    "Run each given --method from the same seed, and overlay the curves. A single method is run on both engines. "
    "nb-lora and sing-lora, which PEFT does not have, are compared with lora instead."
)
_NORM = (
    "The norm that is bounded. The default is nuclear, the sum of the singular values; spectral is the largest of them."
)
_BOUND = "The bound on the norm of each layer's ΔW. The default is rank (nuclear), √rank (frobenius) or 1 (spectral)."
_BOUND_RATIO = (
    "The bound as a share of the norm of each layer's weight, instead of --bound: 0.1 allows a change by a tenth."
)
_BOUNDED = "Bounds (--method nb-lora)"
EPILOG = overview()


def finetune(
    context: typer.Context,
    model: Annotated[str, _option("Model and text", _MODEL)] = _BY_DEFAULT.model,
    data: Annotated[str, _option("Model and text", _DATA)] = _BY_DEFAULT.data,
    seq_len: Annotated[int, _option("Model and text", "Number of tokens in a block of text.")] = _BY_DEFAULT.seq_len,
    prompt: Annotated[str | None, _option("Model and text", _PROMPT)] = None,
    rank: Annotated[
        int, _option("Adapter", "Rank of the adapters, 1 to 256. A higher rank can learn more.")
    ] = _BY_DEFAULT.rank,
    alpha: Annotated[float, _option("Adapter", _ALPHA)] = _BY_DEFAULT.alpha,
    dropout: Annotated[
        float, _option("Adapter", "Probability that an input of an adapter is dropped.")
    ] = _BY_DEFAULT.dropout,
    targets: Annotated[str, _option("Adapter", _TARGETS)] = _BY_DEFAULT.targets,
    target_parameters: Annotated[str | None, _option("Adapter", _TARGET_PARAMETERS, metavar="NAMES")] = None,
    dora: Annotated[bool, _option("Adapter", _DORA, "--dora")] = _BY_DEFAULT.dora,
    steps: Annotated[int | None, _option("Training", _STEPS)] = None,
    epochs: Annotated[int | None, _option("Training", "Number of passes over the text, instead of --steps.")] = None,
    lr: Annotated[
        float,
        _option(
            "Training", "Learning rate after the warm-up, from which it falls linearly to 0.", "--lr", "--learning-rate"
        ),
    ] = _BY_DEFAULT.lr,
    batch: Annotated[int, _option("Training", "Number of blocks in one forward pass.")] = _BY_DEFAULT.batch,
    accumulation: Annotated[
        int, _option("Training", "Number of forward passes in one optimizer step.")
    ] = _BY_DEFAULT.accumulation,
    dtype: Annotated[str, _option("Training", _DTYPE, metavar="NAME")] = _BY_DEFAULT.dtype,
    quantize: Annotated[str | None, _option("Training", _QUANTIZE, metavar="FORMAT")] = None,
    seed: Annotated[
        int, _option("Training", "Determines the initial adapters and the order of the blocks.")
    ] = _BY_DEFAULT.seed,
    method: Annotated[list[str], _option("Method", _METHOD, metavar="NAME[:KEY=VALUE,…]")] = _DEFAULT_METHODS,
    engine: Annotated[str, _option("Method", _ENGINE, metavar="fused|eager")] = _BY_DEFAULT.engine,
    compare: Annotated[bool, _option("Method", _COMPARE, "--compare")] = False,
    norm: Annotated[str | None, _option(_BOUNDED, _NORM, metavar="|".join(NORMS))] = None,
    bound: Annotated[float | None, _option(_BOUNDED, _BOUND)] = None,
    bound_ratio: Annotated[float | None, _option(_BOUNDED, _BOUND_RATIO)] = None,
    output: Annotated[Path | None, _option("Results", _OUTPUT)] = None,
    save_every: Annotated[int | None, _option("Results", _SAVE_EVERY)] = None,
    resume: Annotated[bool, _option("Results", _RESUME, "--resume")] = False,
) -> None:
    """Fine-tune a causal language model on a text, with LoRA.

    The model is frozen, and a small adapter is trained beside each of its linear layers. The results are written into a
    folder: the adapter (in PEFT's format, which peft, transformers and vLLM load), metrics.json, report.html with
    plots, and checkpoints. A part of the text is held out; the loss on it measures what was learnt and not just
    memorised. Ctrl-C stops after the current step and prints the command that continues the run.

    **Examples**

    - `lora-fast finetune`

        trains a small model on a text; both are installed as packages. Takes about two minutes on two CPU cores

    - `lora-fast finetune --compare --steps 20`

        runs both engines: their loss curves must agree, their step times may differ

    - `lora-fast finetune --model Qwen/Qwen3-0.6B --data notes.txt --epochs 2 --rank 32 --alpha 64`

        uses your own model, text and adapter size

    - `lora-fast finetune --quantize nf4 --compare`

        trains over weights of 4 bits (QLoRA), by PEFT's layers and by ours

    - `lora-fast finetune --method ilora:lam=0.1`

        trains the same adapters by another method

    - `lora-fast finetune --compare --method lora --method ilora --method balora:every=5 --method lora:lr=2e-3`

        runs several methods from the same start, to choose one for this model and text

    - `lora-fast finetune --compare --method nb-lora --norm spectral --bound 0.5`

        bounds the change of every weight, and compares with plain LoRA

    - `lora-fast finetune --output runs/smollm2-kjv-1 --resume`

        continues after Ctrl-C or a crash, with the same result as an uninterrupted run
    """
    display = Display()
    with exit_codes(display):
        values = {field.name: context.params[field.name] for field in fields(Settings)}
        values |= {"model": absolute(model), "data": absolute(data)}
        values |= {"method": with_bounds(tuple(method), norm, bound, bound_ratio)}
        if resume:  # only typed options must agree with the saved settings; defaults need not
            typed = {name: value for name, value in values.items() if _is_typed(context, name)}
            settings = run_folder.saved_settings(output, typed)
        else:
            settings = Settings(**values).check()
        next_steps.show(display, pipeline.run(settings, output, resume, display))


def _is_typed(context: typer.Context, name: str) -> bool:
    """Returns whether an option was typed, rather than left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
