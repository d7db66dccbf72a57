"""lora-fast finetune: its options and its help. What happens then is in pipeline.py."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from ...layers.nb_lora import NORMS
from ..inputs.method_options import METHODS, overview, with_bounds
from ..inputs.settings import DEFAULT_STEPS, Settings, absolute
from ..output import run_folder
from ..output.terminal import Display, exit_codes

_BY_DEFAULT = Settings()


def _option(panel: str, text: str, *names: str, **more):
    return typer.Option(*names, rich_help_panel=panel, help=text, **more)


_DATA = (
    'A text file, or a .jsonl with {"text": …} a line; {"prompt": …, "completion": …}, of which the completion is '
    'trained; or {"messages": …}, through the chat template of the model. kjv: the King James text, from its package.'
)
_MODEL = "A folder or hub id of a causal language model. smollm2: SmolLM2-135M, from its package."
_ALPHA = "Scale: an adapter counts alpha / rank; nb-lora has its bound instead."
_TARGETS = "all-linear, or the names of the layers to adapt: q_proj,v_proj."
_STEPS = f"Optimizer steps: {DEFAULT_STEPS}, unless --epochs is given."
_PROMPT = "What the sample continues, before and after: if not given, the start of the held-out text."
_OUTPUT = "A new folder for the results: if not given, the next number in runs/."
_SAVE_EVERY = "Steps between checkpoints: if not given, a quarter of the run."
_DTYPE = "auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16."
_RESUME = "Continue the interrupted run in --output exactly where it stopped, with its settings."
_METHOD = f"How the adapters are trained: {', '.join(METHODS)}. With options: ilora:lam=0.1,lr=5e-4. Listed below."
_ENGINE = "fused: one operation a layer. eager: PEFT's layers as they are."
_COMPARE = (
    "From the same seed, run each --method given, and overlay the curves. With one: on both engines; nb-lora and "
    "sing-lora, which PEFT does not have, beside lora."
)
_NORM = "Which norm is bounded: nuclear, the sum of the singular values, if not given; spectral: the largest of them."
_BOUND = "On the norm of each layer's change ΔW: if not given, rank (nuclear), √rank (frobenius) or 1 (spectral)."
_BOUND_RATIO = "Instead of --bound, a multiple of the norm of each layer's own weight: 0.1 lets it change by a tenth."
_BOUNDED = "Bounds (--method nb-lora)"
EPILOG = overview()


def finetune(
    context: typer.Context,
    model: Annotated[str, _option("Model and text", _MODEL)] = _BY_DEFAULT.model,
    data: Annotated[str, _option("Model and text", _DATA)] = _BY_DEFAULT.data,
    seq_len: Annotated[int, _option("Model and text", "Tokens in a block of text.")] = _BY_DEFAULT.seq_len,
    prompt: Annotated[str | None, _option("Model and text", _PROMPT)] = None,
    rank: Annotated[int, _option("Adapter", "Rank of the adapters, 1 to 256: more can learn more.")] = _BY_DEFAULT.rank,
    alpha: Annotated[float, _option("Adapter", _ALPHA)] = _BY_DEFAULT.alpha,
    dropout: Annotated[float, _option("Adapter", "Share of an adapter's inputs dropped.")] = _BY_DEFAULT.dropout,
    targets: Annotated[str, _option("Adapter", _TARGETS)] = _BY_DEFAULT.targets,
    steps: Annotated[int | None, _option("Training", _STEPS)] = None,
    epochs: Annotated[int | None, _option("Training", "Instead of steps: passes over the text.")] = None,
    lr: Annotated[float, _option("Training", "Highest learning rate.", "--lr", "--learning-rate")] = _BY_DEFAULT.lr,
    batch: Annotated[int, _option("Training", "Blocks in one forward pass.")] = _BY_DEFAULT.batch,
    accumulation: Annotated[int, _option("Training", "Forward passes in one step.")] = _BY_DEFAULT.accumulation,
    dtype: Annotated[str, _option("Training", _DTYPE, metavar="NAME")] = _BY_DEFAULT.dtype,
    seed: Annotated[int, _option("Training", "Decides the fresh adapters and the order.")] = _BY_DEFAULT.seed,
    method: Annotated[list[str], _option("Method", _METHOD, metavar="NAME[:KEY=VALUE,…]")] = _BY_DEFAULT.method,
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

    Freezes the model, trains a small adapter beside its linear layers, and writes into a folder: the adapter (in PEFT's
    format, which peft, transformers and vLLM load), metrics.json, report.html with plots, and checkpoints. A share of
    the text is held out: the loss on it tells what was learnt, not just remembered. Ctrl-C stops after the current
    step and says how to go on.

    **Examples**

    - `lora-fast finetune`

        a small model and a text from their packages: about three minutes on two CPU cores, no network

    - `lora-fast finetune --compare --steps 20`

        both engines: the loss curves must agree, the step times need not

    - `lora-fast finetune --model Qwen/Qwen3-0.6B --data notes.txt --epochs 2 --rank 32 --alpha 64`

        your own model, text and adapter

    - `lora-fast finetune --method ilora:lam=0.1`

        another method for the same adapters

    - `lora-fast finetune --compare --method lora --method ilora --method balora:every=5 --method lora:lr=2e-3`

        several, from the same start: which one to choose for this model and text

    - `lora-fast finetune --compare --method nb-lora --norm spectral --bound 0.5`

        a change of every weight that cannot exceed a bound, beside plain LoRA

    - `lora-fast finetune --output runs/smollm2-kjv-1 --resume`

        goes on after Ctrl-C or a crash, with the same result as without it
    """
    display = Display()
    with exit_codes(display):
        asked = {field.name: context.params[field.name] for field in fields(Settings)}
        asked |= {"model": absolute(model), "data": absolute(data)}
        asked |= {"method": with_bounds(tuple(method), norm, bound, bound_ratio)}
        if resume:
            typed = {n: v for n, v in asked.items() if context.get_parameter_source(n).name == "COMMANDLINE"}
            settings = run_folder.saved_settings(output, typed)
        else:
            settings = Settings(**asked).check()
        from . import pipeline

        pipeline.run(settings, output, resume, display)
