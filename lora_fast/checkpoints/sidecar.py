"""The sidecar of layers that train other parameters than two factors, ``free_parameters.safetensors``: what their plain
LoRA files cannot tell.

It holds each such layer's own tensors (its class's ``SAVED_STATE``), bit for bit, and in its metadata the layers'
classes and settings (``INIT_ARGUMENTS``) and a digest of the adapter's factors, so that a sidecar is not taken for that
of another adapter. PEFT passes over the file.
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
from torch import Tensor, nn

from .. import checks
from ..checks import CheckpointError
from ..layers.find import ADAPTER_LAYERS
from . import io

SIDECAR = "free_parameters.safetensors"
KINDS = {kind.__name__: kind for kind in ADAPTER_LAYERS if kind.SAVED_STATE}
Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass
class FreeLayer:
    """One layer of a sidecar: its class, the settings that its constructor takes besides sizes, r and dropout, and the
    tensors that the class's ``SAVED_STATE`` names."""

    kind: type[nn.Module]
    settings: dict
    tensors: list[Tensor]


def writer(layers: dict[str, nn.Module], pairs: Pairs) -> Callable[[Path], None] | None:
    """What writes the sidecar of these layers (``files.write``); None where no layer needs one. ``pairs``: as the
    adapter's file has them."""
    free = {name: layer for name, layer in layers.items() if layer.SAVED_STATE}
    if not free:
        return None
    tensors, noted = {}, {}
    for name, layer in free.items():
        keys = {f"{name}.{own}": getattr(layer, own) for own in layer.SAVED_STATE}
        tensors |= {key: io.to_host(key, tensor) for key, tensor in keys.items()}
        noted[name] = {"kind": kind_of(layer).__name__, **{key: getattr(layer, key) for key in layer.INIT_ARGUMENTS}}
    metadata = {"format": "pt", "layers": json.dumps(noted), "adapter": _digest(pairs, free)}
    return lambda file: safetensors.torch.save_file(tensors, file, metadata)


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """Which of ``KINDS`` the layer is; a subclass of one is that one."""
    return next(kind for kind in KINDS.values() if isinstance(layer, kind))


def read(path: str | os.PathLike, pairs: Pairs) -> dict[str, FreeLayer]:
    """The layers in the sidecar of a folder whose adapter has these pairs; none without a sidecar.

    Raises:
        CheckpointError: a sidecar that is damaged, or belongs to another adapter.
    """
    file = Path(path) / SIDECAR
    if not file.exists():
        return {}
    tensors, metadata = io.read_tensors(file)
    found = {}
    try:
        for name, noted in json.loads(metadata["layers"]).items():
            kind = KINDS[noted["kind"]]
            settings = {key: noted[key] for key in kind.INIT_ARGUMENTS}
            found[name] = FreeLayer(kind, settings, [tensors.pop(f"{name}.{own}") for own in kind.SAVED_STATE])
        digest = metadata["adapter"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(SIDECAR, "the class, settings and tensors of each layer", repr(error)) from error
    if tensors or not found.keys() <= pairs.keys() or digest != _digest(pairs, found):
        raise CheckpointError(SIDECAR, "the sidecar of the adapter beside it", "one of another adapter")
    for name, layer in found.items():
        _check(name, layer, *pairs[name])
    return found


def _check(name: str, layer: FreeLayer, a: Tensor, b: Tensor) -> None:
    """Raises CheckpointError unless a layer with these factors takes the settings and has such tensors."""
    (r, d_in), d_out = a.shape, len(b)
    try:
        like = layer.kind(d_in, d_out, r=r, device="meta", **layer.settings)
    except checks.ArgumentError as error:
        raise CheckpointError(f"{error.argument} of {name} in {SIDECAR}", error.expected, error.got) from error
    for own, tensor in zip(layer.kind.SAVED_STATE, layer.tensors, strict=True):
        shape, dtype = getattr(like, own).shape, getattr(like, own).dtype
        dtype = a.dtype if dtype.is_floating_point else dtype  # the factors have the widest of the layer's
        if tensor.shape != shape or torch.promote_types(tensor.dtype, dtype) != dtype:
            expected = f"{dtype} of shape {tuple(shape)}, or a dtype that it holds without loss"
            raise CheckpointError(f"key {name}.{own}", expected, f"{tensor.dtype} {tuple(tensor.shape)}")


def _digest(pairs: Pairs, names: Iterable[str]) -> str:
    """SHA-256 of the named layers' factors."""
    found = hashlib.sha256()
    for name in sorted(names):
        for tensor in pairs[name]:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
