"""Writes the files of an adapter folder, and reads them without trusting them; knows nothing of their contents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checks import PLAIN, CheckpointError
from ..kernels import atomic_file
from ..layers.hooks import stored_tensor


def write(path: str | os.PathLike, writers: dict[str, Callable[[Path], object] | None]) -> None:
    """Writes files into a folder, file name → the function that fills it; None removes the file. All are written and
    synced to disk before the first one replaces its target atomically.

    Raises:
        CheckpointError: the folder or a file in it cannot be written; the files that were there are unchanged.
    """
    folder = Path(path)
    try:
        atomic_file.write_all({folder / name: writer for name, writer in writers.items()})
    except (OSError, SafetensorError) as error:  # SafetensorError: safetensors raises its own on a full disk
        raise CheckpointError("path", "a folder that can be written", f"{str(folder)!r}: {error}") from error


def to_host(name: str, tensor: Tensor) -> Tensor:
    """Returns a contiguous copy of the tensor on the CPU that shares memory with nothing else, as safetensors needs.

    Raises:
        CheckpointError: the tensor has no data here (meta device, sharded) or is a subclass (quantised).
    """
    if type(tensor) not in PLAIN or tensor.is_meta:
        got = f"{type(tensor).__name__} on {tensor.device}"
        raise CheckpointError(name, "a parameter with data, not sharded", got)
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def destination(name: str, module: nn.Module, attribute: str) -> Tensor:
    """Returns the tensor that a value is copied into to change a module's parameter or buffer.

    Raises:
        CheckpointError: it is sharded or of another subclass, or there is none: on the meta device, or on the disk.
    """
    return check_destination(name, stored_tensor(module, attribute, writable=True))


def check_destination(name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor; raises CheckpointError if no value can be copied into it, as in ``destination``."""
    if type(tensor) not in PLAIN:
        raise CheckpointError(name, "a plain parameter, not sharded", type(tensor).__name__)
    if tensor.is_meta:
        expected = "a parameter with data in memory (for a model on the meta device: model.to_empty(device=…) first)"
        raise CheckpointError(name, expected, "one on the meta device, or offloaded to the disk")
    return tensor


def read_bytes(file: Path) -> bytes:
    """Returns a file's bytes; raises CheckpointError if the file cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError("path", f"a readable file {file.name} in the folder", str(error)) from error


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file, mapped from the disk, and its metadata.

    Raises:
        CheckpointError: the file cannot be read, is no whole safetensors file, or contains a key twice.
    """

    def refuse_duplicates(items: list[tuple[str, object]]) -> dict:
        unique = dict(items)
        if len(unique) < len(items):
            names = [name for name, _ in items]
            raise CheckpointError(f"key {max(names, key=names.count)}", "once in the file", "a duplicate")
        return unique

    try:
        tensors = safetensors.torch.load_file(file)
        with open(file, "rb") as opened:  # load_file takes the last of two equal keys, so the header is parsed here too
            header = opened.read(int.from_bytes(opened.read(8), "little"))
        metadata = json.loads(header, object_pairs_hook=refuse_duplicates).get("__metadata__", {})
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError("path", f"a readable file {file.name} in the folder", str(error)) from error
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype torch does not have
        raise CheckpointError(file.name, "a whole safetensors file", f"{file.stat().st_size} bytes: {error}") from error
    return tensors, metadata
