"""The main job, in order: check everything, prepare the model, train it on each engine, report."""

from __future__ import annotations

import gc
from pathlib import Path

from ..checks import ArgumentError
from . import data, models, report, run_folder
from .display import Display, Interrupted
from .measure import Record, environment
from .settings import Settings


def run(settings: Settings, output: Path | None, resume: bool, display: Display) -> None:
    """Nothing is written (but the packaged model's cache) before model, data, options and output fit together.

    Raises:
        ArgumentError: something does not fit.
        Interrupted: by Ctrl-C.
        training.Diverged: the loss is not a finite number any more.
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
            runs = [_engine(job, engine, folder) for engine in settings.engines]
    except KeyboardInterrupt:
        raise Interrupted(folder if (folder / run_folder.RUN).exists() else None) from None
    report.write(folder, settings, runs, environment(), job.prompt)
    display.finished(settings, runs, folder, job.source, job.prompt)


def _job(settings: Settings, source: str, text_path: Path, text: str, display: Display):
    """Everything that both engines share, checked against each other."""
    slow = models.needs_conversion(settings.model)
    with display.working("Converting the packaged model, once (about 20 s)" if slow else "Loading libraries"):
        from . import training  # transformers and peft: seconds

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
    job = training.Job(settings, source, dtype, tokenizer, tokens, prompt, display, stop)
    display.note(
        f"{Path(settings.model).name} on {Path(settings.data).name}: {job.total} steps, rank {settings.rank}; "
        f"{len(tokens.train):,} blocks of {settings.seq_len} tokens to train on, {len(tokens.held_out)} held out"
    )
    return job


def _engine(job, engine: str, folder: Path) -> Record:
    from . import training

    place = folder / engine if job.settings.compare else folder
    if (place / run_folder.RECORD).exists():  # finished before an interruption
        return Record(**run_folder.read_json(place / run_folder.RECORD))
    gc.collect()  # the first engine's model, under --compare
    with job.display.working("Loading the model"):
        model, layers = training.prepare(job, engine)
    job.display.note(f"{engine}: {layers}", style="bold")
    if not (folder / run_folder.RUN).exists():
        run_folder.start(folder, job.settings, job.data.fingerprint)
    record = training.train(job, engine, model, layers, place)
    if job.settings.compare:
        run_folder.write_json(place / run_folder.RECORD, record.as_dict())
        if job.stop.asked and engine != job.settings.engines[-1]:
            raise KeyboardInterrupt
    return record


def _default_prompt(settings: Settings, tokens: data.TokenData, tokenizer) -> str:
    if settings.data == data.PACKAGED:
        return data.PACKAGED_PROMPT
    return tokenizer.decode(tokens.held_out.ids[0, :12], skip_special_tokens=True).strip()
