"""The sidecar of a norm-bounded adapter, ``free_parameters.safetensors``: what its plain LoRA files cannot tell.

It holds each layer's free parameters, bit for bit, and in its metadata the layers' norms and bounds and a digest of the
adapter's factors, so that a sidecar is not taken for that of another adapter. PEFT passes over the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from . import checks, files
from .checks import CheckpointError
from .factors import FREE
from .nb_linear import NORMS, NBLoRALinear

SIDECAR = "free_parameters.safetensors"
SETTINGS = ("norm", "bound", "learn_scale")
Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass
class FreeLayer:
    """One layer of a sidecar: settings of NBLoRALinear (norm, bound, learn_scale), and free_a, free_b, free_scale."""

    settings: dict
    tensors: list[Tensor]


def writer(layers: dict[str, NBLoRALinear], pairs: Pairs) -> Callable[[Path], None] | None:
    """What writes the sidecar (``files.write``); None without a norm-bounded layer. ``pairs``: as the adapter's file
    has them."""
    if not layers:
        return None
    tensors = {
        f"{name}.{free}": files.to_host(f"{name}.{free}", getattr(x, free))
        for name, x in layers.items()
        for free in FREE
    }
    settings = {name: {key: getattr(layer, key) for key in SETTINGS} for name, layer in layers.items()}
    metadata = {"format": "pt", "layers": json.dumps(settings), "adapter": _digest(pairs, layers)}
    return lambda file: safetensors.torch.save_file(tensors, file, metadata)


def read(path: str | os.PathLike, pairs: Pairs) -> dict[str, FreeLayer]:
    """The norm-bounded layers of a folder whose adapter has these pairs; none without a sidecar.

    Raises:
        CheckpointError: a sidecar that is damaged, or belongs to another adapter.
    """
    file = Path(path) / SIDECAR
    if not file.exists():
        return {}
    tensors, metadata = files.read_tensors(file)
    found = {}
    try:
        for name, settings in json.loads(metadata["layers"]).items():
            found[name] = FreeLayer(_settings(settings), [tensors.pop(f"{name}.{free}") for free in FREE])
        digest = metadata["adapter"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(SIDECAR, "free parameters and settings of each layer", repr(error)) from error
    if tensors or not found.keys() <= pairs.keys() or digest != _digest(pairs, found):
        raise CheckpointError(SIDECAR, "the sidecar of the adapter beside it", "one of another adapter")
    for name, layer in found.items():
        (r, d_in), d_out = pairs[name][0].shape, pairs[name][1].shape[0]
        for free, tensor, shape in zip(FREE, layer.tensors, ((r, d_in), (d_out, r), (r,)), strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype not in checks.FLOATS:
                raise CheckpointError(f"key {name}.{free}", f"shape {shape}", f"{tensor.dtype} {tuple(tensor.shape)}")
    return found


def _settings(noted: dict) -> dict:
    """Checked."""
    checks.choice(noted["norm"], "norm", tuple(NORMS))
    checks.positive(noted["bound"], "bound")
    checks.flag(noted["learn_scale"], "learn_scale")
    return {key: noted[key] for key in SETTINGS}


def _digest(pairs: Pairs, names) -> str:
    """SHA-256 of the named layers' factors."""
    found = hashlib.sha256()
    for name in sorted(names):
        for tensor in pairs[name]:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
