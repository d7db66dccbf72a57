"""Reads and writes the sidecar of an adapter, ``free_parameters.safetensors``: the parameters of layers that train
others than two factors, which their plain LoRA files do not contain.

The file holds each such layer's tensors (its class's ``SAVED_STATE``) bit for bit. Its metadata has the layers' classes
and settings (``INIT_ARGUMENTS``), and a digest of the adapter's factors by which a sidecar that belongs to another
adapter is recognised. PEFT ignores the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .. import checks
from ..checks import CheckpointError
from ..layers.base import AdapterLinear
from ..layers.find import ADAPTER_LAYERS
from . import io

SIDECAR = "free_parameters.safetensors"
KINDS: dict[str, type[AdapterLinear]] = {kind.__name__: kind for kind in ADAPTER_LAYERS if kind.SAVED_STATE}
Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass
class FreeLayer:
    """The entry of a layer in a sidecar.

    Attributes:
        kind: its class.
        settings: the arguments of its constructor besides sizes, r and dropout.
        tensors: the values of its ``SAVED_STATE``, in that order.
    """

    kind: type[AdapterLinear]
    settings: dict
    tensors: list[Tensor]


def kind_of(layer: AdapterLinear) -> type[AdapterLinear]:
    """Returns the class in ``KINDS`` that the layer is an instance of."""
    return next(kind for kind in KINDS.values() if isinstance(layer, kind))


def collect(layers: dict[str, AdapterLinear]) -> dict[str, FreeLayer]:
    """Returns the sidecar's entry of each layer that needs one, by name."""
    free = {}
    for name, layer in layers.items():
        if layer.SAVED_STATE:
            tensors = [io.to_host(f"{name}.{role}", getattr(layer, role)) for role in layer.SAVED_STATE]
            free[name] = FreeLayer(kind_of(layer), {key: getattr(layer, key) for key in layer.INIT_ARGUMENTS}, tensors)
    return free


def writer(free: dict[str, FreeLayer], pairs: Pairs) -> Callable[[Path], None] | None:
    """Returns the function that writes the sidecar (``io.write``); None where no layer needs one.

    Args:
        pairs: name → lora_A and lora_B as in the adapter's file.
    """
    if not free:
        return None
    tensors = {
        f"{name}.{role}": tensor
        for name, layer in free.items()
        for role, tensor in zip(layer.kind.SAVED_STATE, layer.tensors, strict=True)
    }
    layers = {name: {"kind": layer.kind.__name__, **layer.settings} for name, layer in free.items()}
    metadata = {"format": "pt", "layers": json.dumps(layers), "adapter": _digest(pairs, free)}
    return lambda file: safetensors.torch.save_file(tensors, file, metadata)


def read(path: str | os.PathLike, pairs: Pairs) -> dict[str, FreeLayer]:
    """Returns the layers in a folder's sidecar by name; none if there is no sidecar.

    Args:
        pairs: name → lora_A and lora_B of the adapter in the folder.

    Raises:
        CheckpointError: the sidecar is damaged, or belongs to another adapter.
    """
    file = Path(path) / SIDECAR
    if not file.exists():
        return {}
    tensors, metadata = io.read_tensors(file)
    free = {}
    try:
        for name, entry in json.loads(metadata["layers"]).items():
            kind = KINDS[entry["kind"]]
            settings = {key: entry[key] for key in kind.INIT_ARGUMENTS}
            free[name] = FreeLayer(kind, settings, [tensors.pop(f"{name}.{role}") for role in kind.SAVED_STATE])
        digest = metadata["adapter"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(SIDECAR, "the class, settings and tensors of each layer", checks.shown(error)) from error
    if tensors or not free.keys() <= pairs.keys() or digest != _digest(pairs, free):
        raise CheckpointError(SIDECAR, "the sidecar of the adapter beside it", "one of another adapter")
    for name, layer in free.items():
        _check(name, layer, *pairs[name])
    return free


def _check(name: str, layer: FreeLayer, a: Tensor, b: Tensor) -> None:
    """Raises CheckpointError unless a layer with these factors takes the settings and has such tensors."""
    (r, d_in), d_out = a.shape, len(b)
    try:
        like = layer.kind(d_in, d_out, r=r, device="meta", **layer.settings)
    except checks.ArgumentError as error:
        raise CheckpointError(f"{error.argument} of {name} in {SIDECAR}", error.expected, error.got) from error
    for role, tensor in zip(layer.kind.SAVED_STATE, layer.tensors, strict=True):
        shape, dtype = getattr(like, role).shape, getattr(like, role).dtype
        # The factors have the widest dtype of the layer's floating-point tensors.
        check_tensor(f"{name}.{role}", tensor, shape, a.dtype if dtype.is_floating_point else dtype)


def check_tensor(key: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raises CheckpointError unless a tensor of this shape and dtype holds the sidecar's tensor without loss."""
    if tensor.shape != shape or torch.promote_types(tensor.dtype, dtype) != dtype:
        expected = f"{dtype} of shape {tuple(shape)}, or a dtype that it holds without loss"
        raise CheckpointError(f"key {key}", expected, f"{tensor.dtype} {tuple(tensor.shape)}")


def _digest(pairs: Pairs, names: Iterable[str]) -> str:
    """Returns the SHA-256 of the named layers' factors, their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(names):
        for tensor in pairs[name]:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()
