"""Reads and writes a whole adapter folder: PEFT's two files, and the sidecar where layers need one."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import Tensor

from .. import checks
from . import io, peft_format, sidecar
from .peft_format import PREFIX, Adapter
from .sidecar import FreeLayer


@dataclass
class Contents:
    """The contents of a folder that is written.

    Attributes:
        config: the JSON object of ``adapter_config.json``.
        tensors: key → tensor of ``adapter_model.safetensors``.
        metadata: of these tensors.
        free: module name → the sidecar's entry of a layer that trains free parameters in place of a and b.
    """

    config: dict
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    free: dict[str, FreeLayer]


def write(path: str | os.PathLike, contents: Contents) -> None:
    """Writes the folder, each file atomically. An old sidecar that the adapter does not need is removed.

    Raises:
        CheckpointError: the folder or a file in it cannot be written; the files that were there are unchanged.
    """
    path = checks.path(path)
    factor = lambda name, role: contents.tensors[f"{PREFIX}{name}.{role}.weight"]
    pairs = {name: (factor(name, "lora_A"), factor(name, "lora_B")) for name in contents.free}
    writers = peft_format.writers(contents.config, contents.tensors, contents.metadata)
    io.write(path, {**writers, sidecar.SIDECAR: sidecar.writer(contents.free, pairs)})


def read(path: str | os.PathLike, with_sidecar: bool) -> tuple[Adapter, dict[str, FreeLayer]]:
    """Returns the adapter in a folder and the sidecar's entries by layer name; these are empty if ``with_sidecar`` is
    false or there is no sidecar. Adapter and sidecar are checked against each other, not against a model.

    Raises:
        CheckpointError: a file cannot be read, is damaged, or does not fit the others.
    """
    adapter = peft_format.read(checks.path(path))
    return adapter, sidecar.read(path, adapter.pairs) if with_sidecar else {}
