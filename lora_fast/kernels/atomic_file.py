"""Writes files and folders atomically: after a crash each holds its old bytes or its new bytes, never a part of them.

A file is written under a temporary name in the folder of its target, synced to disk (fsync) and renamed over the
target. A rename within one folder is atomic; syncing the folder makes the rename itself durable.
"""

import filecmp
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

Writer = Callable[[Path], object]  # fills the file, or the folder, at the path that it gets


def write_text(target: Path, text: str) -> None:
    """Writes text as UTF-8."""
    write(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write(target: Path, writer: Writer) -> None:
    """Writes one file."""
    write_all({target: writer})


def write_all(writers: dict[Path, Writer | None]) -> None:
    """Writes files, making their folders; a writer of None removes its target. No target changes before every writer
    has succeeded, and a target that already holds the same bytes is not touched.

    Raises:
        OSError: a file or folder cannot be written. The temporary files are removed.
    """
    temporaries = {target: _temporary(target) for target, writer in writers.items() if writer is not None}
    folders = {target.parent for target in writers}
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for target, writer in writers.items():
            if target.is_dir():
                raise IsADirectoryError(f"{target} is a folder")
            if writer is not None:
                writer(temporaries[target])
                _sync(temporaries[target])
        for target, temporary in temporaries.items():
            if not (target.exists() and filecmp.cmp(target, temporary, shallow=False)):
                os.replace(temporary, target)
        for target in writers.keys() - temporaries.keys():
            target.unlink(missing_ok=True)
        for folder in folders:
            _sync(folder)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def write_folder(target: Path, writer: Writer) -> None:
    """Writes a folder of files. A folder that another process has put there meanwhile stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        writer(temporary)
        for file in temporary.iterdir():
            _sync(file)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
