"""The order of things in a call of finetune: check everything, prepare the model, train each run, write the report."""

from __future__ import annotations

import gc
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...checks import ArgumentError
from ...measure.machine import environment
from ..inputs import data, models, quantization
from ..inputs.settings import Run, Settings
from ..output import run_folder
from ..output.terminal import Display, Interrupted
from . import report
from .record import Diverged, Record

if TYPE_CHECKING:
    from .training import RunContext


@dataclass(frozen=True)
class Outcome:
    """The result of a finished call.

    Attributes:
        records: one record for each of ``settings.runs``, in their order.
        source: the folder or hub id that the base model was loaded from.
        prompt: the text that the samples continue.
    """

    settings: Settings
    folder: Path
    records: list[Record]
    source: str
    prompt: str


def run(settings: Settings, output: Path | None, resume: bool, display: Display) -> Outcome:
    """Trains all runs and writes the files into the folder ``output`` (by default a new one in runs/).

    Nothing is written, except for the cache of the packaged model, before model, data, options and output are known to
    fit together.

    Raises:
        ArgumentError: model, data, options and output do not fit together.
        Interrupted: Ctrl-C was pressed.
        Diverged: the loss of the only run is no longer a finite number.
    """
    quantization.check_installed(settings.quantize)
    source = models.locate(settings.model)
    text_path = data.locate(settings.data)
    text = data.read(text_path)
    folder = output or run_folder.fresh(settings.model, settings.data)
    if not resume:
        run_folder.check_free(folder)
    context = _context(settings, source, text_path, text, display)
    if resume:
        run_folder.check_same_data(folder, context.data.fingerprint)
    try:
        with context.stop:
            records = [_run(context, planned, folder) for planned in settings.runs]
    except KeyboardInterrupt:
        started = (folder / run_folder.RUN).exists()
        raise Interrupted(_resume_command(folder) if started else None) from None
    report.write(folder, settings, records, environment(), context.prompt)
    return Outcome(settings, folder, records, context.source, context.prompt)


def _context(settings: Settings, source: str, text_path: Path, text: str, display: Display) -> RunContext:
    """Loads what all runs share, and checks the parts against each other."""
    slow = models.needs_conversion(settings.model)
    with display.working("Converting the packaged model, once (about 20 s)" if slow else "Loading libraries"):
        models.quieten()
        from . import training  # imports torch, transformers and peft: seconds, in which the spinner turns

        source = models.cached(settings.model, source)
        config, tokenizer = models.load_config(source, settings.quantize), models.load_tokenizer(source)
    longest = getattr(config, "max_position_embeddings", None) or 2**31
    if settings.seq_len > longest:
        raise ArgumentError("--seq-len", f"at most the model's {longest} positions", settings.seq_len)
    dtype = models.choose_dtype(settings.dtype)
    with display.working("Tokenizing the text"):
        tokens = data.blocks(data.documents(text_path, text, tokenizer), tokenizer, settings.seq_len)
    prompt = settings.prompt or _default_prompt(settings, tokens, tokenizer)
    room = longest - training.SAMPLE_TOKENS
    if len(tokenizer(prompt)["input_ids"]) > room:
        raise ArgumentError("--prompt", f"at most {room} tokens, to leave room for a sample", "more")
    stop = training.StopRequest(display)
    context = training.RunContext(settings, source, dtype, tokenizer, tokens, prompt, display, stop)
    quantized = f" over {settings.quantize} weights" if settings.quantize else ""
    display.note(
        f"{Path(settings.model).name} on {Path(settings.data).name}: {context.total} steps, rank {settings.rank}"
        f"{quantized}; {len(tokens.train):,} blocks of {settings.seq_len} tokens to train on, "
        f"{len(tokens.held_out)} held out"
    )
    return context


def _run(context: RunContext, run: Run, folder: Path) -> Record:
    """Trains one run, unless it had finished before an interruption, and returns its record."""
    from . import training

    runs, place = context.settings.runs, folder / run.folder
    if len(runs) > 1 and (place / run_folder.RECORD).exists():
        return Record(**run_folder.read_json(place / run_folder.RECORD))
    gc.collect()  # frees the previous run's model, whose hooks and modules refer to each other in circles
    with context.display.working("Loading the model"):
        model, layers = training.prepare(context, run)
    position = f" ({runs.index(run) + 1} of {len(runs)})" if len(runs) > 1 else ""
    context.display.note(f"{run.label}{position}: {layers}", style="bold")
    if not (folder / run_folder.RUN).exists():
        run_folder.start(folder, context.settings, context.data.fingerprint)
    try:
        record = training.train(context, run, model, layers, place)
    except Diverged as error:
        if not context.settings.compares_methods:
            raise
        record = error.record  # the other methods can still be compared
        record.diverged = str(error)
        context.display.note(f"  {record.diverged}; the comparison continues without this run", style="red")
    if len(runs) > 1:  # marks the run as finished, for a later --resume
        run_folder.write_json(place / run_folder.RECORD, record.as_dict())
        if context.stop.requested and run != runs[-1]:
            raise KeyboardInterrupt
    return record


def _default_prompt(settings: Settings, tokens: data.TokenData, tokenizer) -> str:
    if settings.data == data.PACKAGED:
        return data.PACKAGED_PROMPT
    return tokenizer.decode(tokens.held_out.ids[0, :12], skip_special_tokens=True).strip()


def _resume_command(folder: Path) -> str:
    return f"lora-fast finetune --output {shlex.quote(str(folder))} --resume"
