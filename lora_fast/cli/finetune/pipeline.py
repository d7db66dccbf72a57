"""The main job, in order: check everything, prepare the model, train it in each run, report."""

from __future__ import annotations

import gc
from pathlib import Path

from ...checks import ArgumentError
from ...measure.machine import environment
from ..inputs import data, models
from ..inputs.settings import Run, Settings
from ..output import run_folder
from ..output.terminal import Display, Diverged, Interrupted
from . import next_steps, report
from .record import Record


def run(settings: Settings, output: Path | None, resume: bool, display: Display) -> list[Record]:
    """The whole job, into the folder ``output``; the records of ``settings.runs``, in their order.

    Nothing is written (but the packaged model's cache) before model, data, options and output fit together.

    Raises:
        ArgumentError: something does not fit.
        Interrupted: by Ctrl-C.
        Diverged: the loss of a job's only method is not a finite number any more.
    """
    source = models.locate(settings.model)
    text_path = data.locate(settings.data)
    text = data.read(text_path)
    folder = output or run_folder.fresh(settings.model, settings.data)
    if not resume:
        run_folder.check_free(folder)
    job = _job(settings, source, text_path, text, display)
    if resume:
        run_folder.check_same_data(folder, job.data.fingerprint)
    try:
        with job.stop:
            records = [_run(job, planned, folder) for planned in settings.runs]
    except KeyboardInterrupt:
        raise Interrupted(folder if (folder / run_folder.RUN).exists() else None) from None
    report.write(folder, settings, records, environment(), job.prompt)
    next_steps.show_result(display, settings, records, folder, job.source, job.prompt)
    return records


def _job(settings: Settings, source: str, text_path: Path, text: str, display: Display):
    """Everything that the runs share, checked against each other."""
    slow = models.needs_conversion(settings.model)
    with display.working("Converting the packaged model, once (about 20 s)" if slow else "Loading libraries"):
        from . import training

        models.quieten()
        source = models.cached(settings.model, source)
        config, tokenizer = models.load_config(source), models.load_tokenizer(source)
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
    job = training.RunContext(settings, source, dtype, tokenizer, tokens, prompt, display, stop)
    display.note(
        f"{Path(settings.model).name} on {Path(settings.data).name}: {job.total} steps, rank {settings.rank}; "
        f"{len(tokens.train):,} blocks of {settings.seq_len} tokens to train on, {len(tokens.held_out)} held out"
    )
    return job


def _run(job, run: Run, folder: Path) -> Record:
    from . import training

    runs, place = job.settings.runs, folder / run.folder
    if len(runs) > 1 and (place / run_folder.RECORD).exists():  # finished before an interruption
        return Record(**run_folder.read_json(place / run_folder.RECORD))
    gc.collect()  # the model of the run before
    with job.display.working("Loading the model"):
        model, layers = training.prepare(job, run)
    of_how_many = f" ({runs.index(run) + 1} of {len(runs)})" if len(runs) > 1 else ""
    job.display.note(f"{run.label}{of_how_many}: {layers}", style="bold")
    if not (folder / run_folder.RUN).exists():
        run_folder.start(folder, job.settings, job.data.fingerprint)
    try:
        record = training.train(job, run, model, layers, place)
    except Diverged as error:
        if not job.settings.compares_methods:
            raise
        record = error.record  # the others still tell something
        record.diverged = str(error)
        job.display.note(f"  {record.diverged}; going on without it", style="red")
    if len(runs) > 1:
        run_folder.write_json(place / run_folder.RECORD, record.as_dict())
        if job.stop.asked and run != runs[-1]:
            raise KeyboardInterrupt
    return record


def _default_prompt(settings: Settings, tokens: data.TokenData, tokenizer) -> str:
    if settings.data == data.PACKAGED:
        return data.PACKAGED_PROMPT
    return tokenizer.decode(tokens.held_out.ids[0, :12], skip_special_tokens=True).strip()
