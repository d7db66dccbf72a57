"""Files that are whole: written atomically, and safetensors read without trust. Nothing here knows what is in them.

A crash while writing leaves the old file or the new one, on disk (fsync), never half of one.
"""

from __future__ import annotations

import filecmp
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checks import CheckpointError


def write(path: str | os.PathLike, writers: dict[str, Callable[[Path], object] | None]) -> None:
    """Write files into a folder (made if need be): each writer fills a file beside its target; they are synced to disk,
    then each is renamed over its target. A file that is there with the same bytes is not touched. A writer None removes
    the file.

    Raises:
        CheckpointError: the folder or a file in it cannot be written; what was there before still is.
    """
    folder, temporary = Path(path), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, writer in writers.items():
            target = folder / name
            if target.is_dir():
                raise IsADirectoryError(f"{target} is a folder")
            if writer is None:
                continue
            temporary[target] = folder / f".{name}.{uuid.uuid4().hex}"
            writer(temporary[target])
            _sync(temporary[target])
        for target, written in temporary.items():
            if not (target.exists() and filecmp.cmp(target, written, shallow=False)):
                os.replace(written, target)
        for name in writers.keys() - {target.name for target in temporary}:
            (folder / name).unlink(missing_ok=True)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # SafetensorError: its own name for a full disk
        raise CheckpointError("path", "a folder that can be written", f"{str(folder)!r}: {error}") from error
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def to_host(name: str, tensor: Tensor) -> Tensor:
    """A tensor as it goes into a file: on the CPU, contiguous, in memory of its own.

    Raises:
        CheckpointError: it has no data here (meta device, sharded), or is more than plain numbers (quantised).
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        got = f"{type(tensor).__name__} on {tensor.device}"
        raise CheckpointError(name, "a parameter with data, not sharded", got)
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError("path", f"a readable file {file.name} in the folder", str(error)) from error


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, mapped from the disk, and its metadata.

    safetensors itself lets the last of two equal keys win, so the header is read once more.
    """

    def refuse_duplicates(items: list[tuple[str, object]]) -> dict:
        seen = dict(items)
        if len(seen) < len(items):
            names = [name for name, _ in items]
            raise CheckpointError(f"key {max(names, key=names.count)}", "once in the file", "a duplicate")
        return seen

    try:
        tensors = safetensors.torch.load_file(file)
        with open(file, "rb") as opened:
            header = opened.read(int.from_bytes(opened.read(8), "little"))
        metadata = json.loads(header, object_pairs_hook=refuse_duplicates).get("__metadata__", {})
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError("path", f"a readable file {file.name} in the folder", str(error)) from error
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype torch does not have
        raise CheckpointError(file.name, "a whole safetensors file", f"{file.stat().st_size} bytes: {error}") from error
    return tensors, metadata
