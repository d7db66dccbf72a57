"""What a checkpoint needs of a model beside its adapter's files, so that training goes on to the same bits: running
statistics and other buffers, and the trained parameters of parts around the model that is adapted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..checks import CheckpointError
from ..layers.find import key_name, peft_layers
from . import io, peft_state
from .peft_format import CONFIG

FILE = "beside_adapter.safetensors"


def adapted_part(model: nn.Module) -> nn.Module:
    """Returns the part of which the model's own ``save_pretrained`` writes the adapter: transformers' model in one of
    sentence-transformers with PEFT's layers, otherwise the model itself."""
    inner = getattr(model, "transformers_model", None)
    if isinstance(inner, nn.Module) and peft_state.own_configs(inner) is not None:
        return inner if len(peft_layers(inner)) == len(peft_layers(model)) else model
    return model


def adapter_folder(model: nn.Module, path: str | os.PathLike, adapter: str | None = None) -> Path:
    """Returns the folder in a checkpoint in which the model's own ``save_pretrained`` writes an adapter, by default the
    active one: PEFT's has one for each adapter that is not called "default"."""
    part = adapted_part(model)
    if not _is_peft_model(part):
        return Path(path)
    adapter = adapter or peft_state.find(part).name
    return Path(path) if adapter == "default" else Path(path, adapter)


def load_other_adapters(model: nn.Module, path: str | os.PathLike) -> None:
    """Loads the adapters of a checkpoint of a PeftModel that are not active, as Trainer does."""
    part: Any = adapted_part(model)
    if not _is_peft_model(part):
        return
    from peft import load_peft_weights, set_peft_model_state_dict

    for adapter in peft_state.find(part).others:
        folder = adapter_folder(model, path, adapter)
        if Path(folder, CONFIG).is_file():
            set_peft_model_state_dict(part, load_peft_weights(str(folder), device="cpu"), adapter_name=adapter)


def _is_peft_model(model: nn.Module) -> bool:
    if not peft_layers(model):
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def collect(model: nn.Module) -> dict[str, Tensor]:
    """Returns name → tensor, on the CPU, of what the file has. Integers that are no counters, as packed weights, never
    change.

    Raises:
        CheckpointError: a sharded tensor, or one without data.
    """
    part = {id(parameter) for parameter in adapted_part(model).parameters()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in part}
    kept = set(model.state_dict())
    buffers = {n: b for n, b in model.named_buffers() if n in kept and (b.is_floating_point() or b.numel() == 1)}
    return {key_name(name): io.to_host(key_name(name), tensor) for name, tensor in (trained | buffers).items()}


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the file, or removes an old one where there is nothing to write.

    Raises:
        CheckpointError: as ``collect``, or a path that cannot be written.
    """
    tensors = collect(model)
    io.write(path, {FILE: (lambda file: safetensors.torch.save_file(tensors, file)) if tensors else None})


def load(model: nn.Module, path: str | os.PathLike) -> None:
    """Copies the tensors of the file, if there is one, into the model.

    Raises:
        CheckpointError: the file cannot be read or does not fit the model, which is then unchanged.
    """
    file = Path(path, FILE)
    saved = io.read_tensors(file)[0] if file.exists() else {}
    tensors = {key_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, value in saved.items():
        if name not in tensors or tensors[name].shape != value.shape:
            got = "no such tensor" if name not in tensors else f"shape {tuple(tensors[name].shape)}"
            raise CheckpointError(f"key {name} in {FILE}", f"a tensor of the model of {tuple(value.shape)}", got)
        io.check_destination(name, tensors[name])
    with torch.no_grad():
        for name, value in saved.items():
            tensors[name].copy_(value)
