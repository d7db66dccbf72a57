"""PEFT's adapter folder on disk: ``adapter_config.json`` and ``adapter_model.safetensors``. Nothing here knows a model.

Reading trusts nothing: what is not exactly two factors per layer, as the config says, is a ``CheckpointError``.
Writing is atomic per file: a crash leaves the old file or the new one, on disk (fsync), never half of one.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from . import checks, targets
from .checks import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(.+)\.(lora_A|lora_B|base_layer)\.weight")
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base weights
UNSUPPORTED = (  # settings of PEFT that make more, or other, than one plain adapter per linear layer
    "lora_bias",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
HARMLESS = ("use_rslora", "loftq_config", "corda_config", "eva_config", "lora_ga_config")


@dataclass
class Adapter:
    """What a folder holds, checked.

    Attributes:
        config: the JSON object.
        pairs: module name → lora_A (r, d_in), lora_B (d_out, r).
        base_weights: module name → the frozen weight (d_out, d_in), which PEFT adds where it adapts the embeddings.
    """

    config: dict
    pairs: dict[str, tuple[Tensor, Tensor]]
    base_weights: dict[str, Tensor]

    def settings(self, name: str) -> dict:
        """r, alpha, dropout and use_rslora of one layer: arguments of ``LoRALinear.from_linear``."""
        return _settings(self.config, name)

    def scaling(self, name: str) -> float:
        layer = self.settings(name)
        return layer["alpha"] / (math.sqrt(layer["r"]) if layer["use_rslora"] else layer["r"])

    def targets(self, name: str) -> bool:
        """Whether PEFT would put an adapter of this config on the module."""
        excluded = self.config.get("exclude_modules")
        if excluded and targets.matches(excluded, name):
            return False
        if self.config["target_modules"] == targets.ALL_LINEAR:
            return name in self.pairs
        return targets.matches(self.config["target_modules"], name)


def read(path: str | os.PathLike) -> Adapter:
    """The adapter in a folder.

    Raises:
        CheckpointError: no such folder or file, not JSON, not safetensors, truncated; an unsupported setting; a key
            that is unknown, missing or there twice; a shape or dtype that does not fit the config.
    """
    folder = Path(path)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise CheckpointError("path", f"a folder with {CONFIG} and {WEIGHTS}", f"{str(folder)!r}: {got}")
    config = _read_config(_read_bytes(folder / CONFIG))
    layers = _layers(_read_tensors(_read_bytes(folder / WEIGHTS)), config)
    pairs = {name: (layer["lora_A"], layer["lora_B"]) for name, layer in layers.items()}
    base_weights = {name: layer["base_layer"] for name, layer in layers.items() if "base_layer" in layer}
    return Adapter(config, pairs, base_weights)


def write(path: str | os.PathLike, files: dict[str, bytes]) -> None:
    """Write files into a folder (made if need be): all of them beside their targets first, synced to disk, then each
    renamed over its target. A file that is there with the same bytes is not touched.

    Raises:
        CheckpointError: the folder or a file in it cannot be written; what was there before still is.
    """
    folder, temporary = Path(path), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            target = folder / name
            if target.is_dir():
                raise IsADirectoryError(f"{target} is a folder")
            if not target.exists() or target.read_bytes() != data:
                temporary[target] = folder / f".{name}.{uuid.uuid4().hex}"
                with open(temporary[target], "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        for target, written in temporary.items():
            os.replace(written, target)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError("path", "a folder that can be written", f"{str(folder)!r}: {error}") from error
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError("path", f"a readable file {file.name} in the folder", str(error)) from error


def _read_config(data: bytes) -> dict:
    try:
        config = json.loads(data)
    except ValueError as error:  # not JSON, or not UTF-8
        raise CheckpointError(CONFIG, "a JSON object", f"{error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(CONFIG, "a JSON object", type(config).__name__)
    if config.get("peft_type") != "LORA":
        raise CheckpointError("peft_type", "'LORA'", repr(config.get("peft_type")))
    if config.get("bias", "none") != "none":
        raise CheckpointError("bias", "'none'", repr(config["bias"]))
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        expected = "an initialisation that leaves the base weights as they are"
        raise CheckpointError("init_lora_weights", expected, repr(config["init_lora_weights"]))
    for name, value in config.items():
        switch = name.startswith("use_") or name.endswith("_config")  # PEFT's spelling for a variant of LoRA
        if value and (name in UNSUPPORTED or (switch and name not in HARMLESS)):
            raise CheckpointError(name, "unset: lora_fast reads plain LoRA adapters", repr(value))
    try:
        targets.check(config.get("target_modules"))
        if config.get("exclude_modules"):
            targets.check(config["exclude_modules"])
    except checks.ArgumentError as error:
        raise CheckpointError(f"{error.argument} in {CONFIG}", error.expected, error.got) from error
    return config


def _settings(config: dict, name: str) -> dict:
    rank = _by_pattern(config, "rank_pattern", name, config.get("r"))
    alpha = _by_pattern(config, "alpha_pattern", name, config.get("lora_alpha"))
    try:
        return {
            "r": checks.rank(rank),
            "alpha": checks.positive(alpha, "lora_alpha"),
            "dropout": checks.probability(config.get("lora_dropout", 0.0), "lora_dropout"),
            "use_rslora": bool(config.get("use_rslora")),
        }
    except checks.ArgumentError as error:
        raise CheckpointError(f"{error.argument} in {CONFIG}", error.expected, error.got) from error


def _by_pattern(config: dict, field: str, name: str, default: object) -> object:
    """PEFT's rule: the first pattern that matches the name, or its end after a dot."""
    patterns = config.get(field) or {}
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
    except (AttributeError, re.error) as error:
        raise CheckpointError(field, "an object whose keys are regular expressions", repr(patterns)) from error


def _read_tensors(data: bytes) -> dict[str, Tensor]:
    """safetensors itself lets the last of two equal keys win, so the header is read once more."""

    def refuse_duplicates(items: list[tuple[str, object]]) -> dict:
        seen = dict(items)
        if len(seen) < len(items):
            names = [name for name, _ in items]
            raise CheckpointError(f"key {max(names, key=names.count)}", "once in the file", "a duplicate")
        return seen

    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        json.loads(data[8 : 8 + length], object_pairs_hook=refuse_duplicates)
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype torch does not have
        raise CheckpointError(WEIGHTS, "a whole safetensors file", f"{len(data)} bytes: {error}") from error
    return tensors


def _layers(tensors: dict[str, Tensor], config: dict) -> dict[str, dict[str, Tensor]]:
    """Module name → its tensors by role, checked: both factors, of the config's rank."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"key {key}", f"{PREFIX}<module>.lora_A.weight or .lora_B.weight", "an extra key")
        if tensor.dtype not in checks.FLOATS:
            raise CheckpointError(f"key {key}", "float16, bfloat16, float32 or float64", tensor.dtype)
        layers.setdefault(match[1], {})[match[2]] = tensor
    for name, layer in layers.items():
        r = _settings(config, name)["r"]
        for factor, dim in (("lora_A", 0), ("lora_B", 1)):
            key = f"key {PREFIX}{name}.{factor}.weight"
            if factor not in layer:
                raise CheckpointError(key, "in the file", "missing")
            if layer[factor].dim() != 2 or layer[factor].shape[dim] != r:
                expected, got = f"a matrix with the rank, {r}, in dimension {dim}", tuple(layer[factor].shape)
                raise CheckpointError(key, expected, got)
    if not layers:
        raise CheckpointError(WEIGHTS, "at least one pair of keys lora_A, lora_B", "none")
    return layers
