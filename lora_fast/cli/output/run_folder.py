"""The folder of a run: its name, its files, and the checks before a run starts or resumes.

    run.json        the settings and the fingerprint of the data: the folder belongs to one run checkpoints/
    checkpoints of transformers' Trainer; each is complete once it has a record.json, which is written last adapter/
    the result, in PEFT's format metrics.json    all figures report.html     the same figures as tables and plots

With --compare each run has a sub-folder (fused/ and eager/, or one for each method) with its own checkpoints/ and
adapter/, and with a record.json once the run has finished.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from ...checks import ArgumentError
from ...kernels.atomic_file import write_text
from ..inputs.settings import Settings, option

RUN, RECORD, METRICS, REPORT = "run.json", "record.json", "metrics.json", "report.html"


def fresh(model: str, data: str) -> Path:
    """Returns ``runs/<model>-<data>-<n>`` with the first free number."""
    name = "-".join(re.sub(r"[^\w.]+", "-", Path(part).stem or part).strip("-.") for part in (model, data))
    n = 1
    while (folder := Path("runs") / f"{name}-{n}").exists():
        n += 1
    return folder


def check_free(folder: Path) -> None:
    """Checks that a new run can use the folder. Creates nothing.

    Raises:
        ArgumentError: ``folder`` is a file, is not empty, or cannot be written.
    """
    if (folder / RUN).exists():
        got = f"{str(folder)!r}, which already contains a run (continue it with --resume)"
        raise ArgumentError("--output", "a new or empty folder", got)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError("--output", "a folder", f"{str(folder)!r}, which is a file")
    if folder.exists() and any(folder.iterdir()):
        raise ArgumentError("--output", "a new or empty folder", f"{str(folder)!r}, which contains other files")
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):  # os.access does not know of read-only mounts and full disks
            pass
    except OSError as error:
        raise ArgumentError("--output", "a folder that can be written", f"{str(folder)!r}: {error.strerror}") from error


def start(folder: Path, settings: Settings, fingerprint: str) -> None:
    """Creates the folder and its run.json, which reserves it for this run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN, {"settings": settings.as_dict(), "data_fingerprint": fingerprint})
    except OSError as error:
        raise ArgumentError("--output", "a folder that can be written", f"{str(folder)!r}: {error.strerror}") from error


def saved_settings(folder: Path | None, given: dict[str, Any]) -> Settings:
    """Returns the settings of the run to resume. ``given`` contains the options typed this time, which must agree with
    the saved ones.

    Raises:
        ArgumentError: the folder has no run, the run has finished, or an option differs.
    """
    if folder is None or not (folder / RUN).is_file():
        got = "no --output" if folder is None else f"{str(folder)!r}, which contains none"
        raise ArgumentError("--resume", "--output with the folder of an interrupted run", got)
    if (folder / METRICS).exists():
        raise ArgumentError("--resume", "an interrupted run", f"{str(folder)!r}, which has finished")
    saved = Settings(**read_json(folder / RUN)["settings"])
    typed = dataclasses.replace(saved, **given)  # normalised as in a new run: nb-lora with --compare adds lora
    for name, value in given.items():
        if getattr(saved, name) != getattr(typed, name):
            expected = f"{getattr(saved, name)!r}, as in the run that is resumed"
            raise ArgumentError(option(name), expected, repr(value))
    return saved


def check_same_data(folder: Path, fingerprint: str) -> None:
    """Raises ArgumentError unless the run in the folder was started with the data of this fingerprint."""
    if read_json(folder / RUN)["data_fingerprint"] != fingerprint:
        got = "other tokens: the file or the tokenizer has changed"
        raise ArgumentError("--data", "the text that the run was started with, to resume it", got)


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint under ``folder``, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoints/checkpoint-*/{RECORD}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
