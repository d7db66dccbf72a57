"""Reads and writes PEFT's two files, ``adapter_config.json`` and ``adapter_model.safetensors``; knows no model.

Reading accepts exactly two factors per layer, with the rank of the config, and raises ``CheckpointError`` for the rest.

Where training has changed frozen weights, the same two files represent the changes in forms that PEFT reads by itself:

    a weight      key ``….base_layer.weight``, which PEFT loads into the base model (as it does for embeddings); beside
                  it the terms that were kept of it, if any (``….terms_A.weight``, which PEFT ignores)
    terms alone   further ranks of the adapter: lora_A [a; terms_a], lora_B [b, terms_b / scaling]

The tensors' metadata, under ``changed_base``, maps each changed layer to its mark: the rank and alpha of the adapter
itself where the file has further ranks, otherwise nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .. import checks
from ..checks import CheckpointError
from ..layers.merge_log import Term
from ..surgery import targets
from . import io

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(.+)\.(lora_A|lora_B|base_layer|terms_A|terms_B)\.weight")
CHANGED = "changed_base"  # in the tensors' metadata
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base weights
UNSUPPORTED = (  # PEFT settings under which the file is not one plain adapter per linear layer
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
class Change:
    """The difference of a frozen weight from the base model's. At least one of the attributes is set.

    Attributes:
        weight: the whole changed weight, (d_out, d_in).
        term: the sum of what was added to the weight, as b (d_out, k) and a (k, d_in). Beside a whole weight, which
            then already contains it, the term is only kept for further training.
    """

    weight: Tensor | None
    term: Term | None


@dataclass
class Adapter:
    """The checked contents of PEFT's two files.

    Attributes:
        config: the JSON object.
        pairs: module name → lora_A (r, d_in), lora_B (d_out, r).
        base_weights: module name → the unchanged frozen weight (d_out, d_in), which PEFT adds to the file where it
            adapts the embeddings.
        changes: module name → how training changed the frozen weight.
    """

    config: dict
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    _own_settings: dict[str, dict] = field(default_factory=dict)  # of layers that have further ranks in the file

    def settings(self, name: str) -> dict:
        """Returns r, alpha, dropout and use_rslora of one layer, the arguments of ``LoRALinear.from_linear``."""
        return self._own_settings.get(name) or _settings(self.config, name)

    def scaling(self, name: str) -> float:
        """Returns alpha / r of one layer, or alpha / √r with use_rslora."""
        return _scaling(self.settings(name))

    def targets(self, name: str) -> bool:
        """Returns whether PEFT would put an adapter of this config on the module."""
        excluded = self.config.get("exclude_modules")
        if excluded and targets.matches(excluded, name):
            return False
        if self.config["target_modules"] == targets.ALL_LINEAR:
            return name in self.pairs
        return targets.matches(self.config["target_modules"], name)


def read(path: str | os.PathLike) -> Adapter:
    """Returns the adapter in a folder.

    Raises:
        CheckpointError: a folder or file that does not exist, is not JSON or safetensors, or is truncated; a setting
            that is not supported; a key that is unknown, missing or there twice; a shape or dtype that does not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise CheckpointError("path", f"a folder with {CONFIG} and {WEIGHTS}", f"{str(folder)!r}: {got}")
    config = _read_config(io.read_bytes(folder / CONFIG))
    tensors, metadata = io.read_tensors(folder / WEIGHTS)
    marks, adapter = _read_marks(metadata), Adapter(config)
    for name, layer in _layers(tensors).items():
        _add_layer(adapter, name, layer, marks.pop(name, None))
    if marks:
        raise CheckpointError(f"{CHANGED} in {WEIGHTS}", "layers of the file", ", ".join(sorted(marks)))
    return adapter


def writers(
    config: dict, tensors: dict[str, Tensor], changes: dict[str, Change]
) -> dict[str, Callable[[Path], object]]:
    """Returns the functions that write the two files (``io.write``), by file name.

    Args:
        config, tensors: an adapter as PEFT represents it; the changes are added to both in place.
    """
    marks = _add_changes_(config, tensors, changes)
    metadata = {"format": "pt"} | ({CHANGED: json.dumps(marks)} if marks else {})
    text = json.dumps(config, indent=2)  # keys not sorted: PEFT takes the first pattern that matches
    return {
        WEIGHTS: lambda file: safetensors.torch.save_file(tensors, file, metadata),
        CONFIG: lambda file: file.write_text(text, encoding="utf-8"),
    }


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises CheckpointError unless a parameter of this shape and dtype holds the file's tensor without loss.

    Args:
        name: the tensor's key without PEFT's prefix and ``.weight``.
    """
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"key {PREFIX}{name}.weight", f"shape {shape}", tuple(tensor.shape))
    if torch.promote_types(tensor.dtype, dtype) != dtype:
        expected = f"a dtype that the model's {dtype} parameter holds without loss"
        raise CheckpointError(f"key {PREFIX}{name}.weight", expected, tensor.dtype)


def set_ranks(config: dict, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """Sets the ranks and alphas of a config, given by module name: the first layer's, and patterns if any differ."""
    first = next(iter(ranks))
    longest_first = sorted(ranks, key=len, reverse=True)  # PEFT takes the first pattern that matches a name's end
    config |= {"r": ranks[first], "lora_alpha": alphas[first]}
    for field_name, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        differ = len(set(values.values())) > 1
        config[field_name] = {re.escape(name): values[name] for name in longest_first} if differ else {}


def _add_changes_(config: dict, tensors: dict[str, Tensor], changes: dict[str, Change]) -> dict[str, dict]:
    """Adds changes to an adapter's config and tensors, in place. Returns the marks for the metadata, by module name:
    the layer's own rank and alpha where it gets further ranks, otherwise nothing."""
    if not changes:
        return {}
    settings = {match[1]: _settings(config, match[1]) for match in map(KEY.fullmatch, tensors) if match}
    ranks, alphas = ({name: layer[key] for name, layer in settings.items()} for key in ("r", "alpha"))
    marks: dict[str, dict] = {}
    for name, change in changes.items():
        key = f"{PREFIX}{name}.{{}}.weight".format
        if change.weight is not None:
            marks[name] = {}
            tensors[key("base_layer")] = change.weight
            if change.term is not None:
                tensors[key("terms_B")], tensors[key("terms_A")] = change.term
            continue
        assert change.term is not None, f"{name}: a change without a weight has a term"
        marks[name] = {"r": ranks[name], "lora_alpha": alphas[name]}
        # PEFT saves an output embedding's weight too. It contains the terms, which would then count twice.
        tensors.pop(key("base_layer"), None)
        (term_b, term_a), b, a = change.term, tensors[key("lora_B")], tensors[key("lora_A")]
        scaling = _scaling(settings[name])
        tensors[key("lora_B")] = torch.cat([b, (term_b / scaling).to(b.dtype)], 1)
        tensors[key("lora_A")] = torch.cat([a, term_a.to(a.dtype)])
        ranks[name] += len(term_a)
        # The scale alpha / r has to stay the same at the larger rank.
        alpha = scaling * (math.sqrt(ranks[name]) if settings[name]["use_rslora"] else ranks[name])
        alphas[name] = int(alpha) if alpha.is_integer() else alpha
    if any(marks.values()):
        set_ranks(config, ranks, alphas)
    return marks


def _read_config(data: bytes) -> dict:
    """Returns the config of a plain LoRA adapter; raises CheckpointError for any other."""
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
        switch = name.startswith("use_") or name.endswith("_config")  # how PEFT spells a variant of LoRA
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
    """Returns r, alpha, dropout and use_rslora that the config gives a module."""
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


def _by_pattern(config: dict, setting: str, name: str, default: object) -> object:
    """Returns the value of the first pattern that matches the name, or its end after a dot, as PEFT does."""
    patterns = config.get(setting) or {}
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
    except (AttributeError, re.error) as error:
        raise CheckpointError(setting, "an object whose keys are regular expressions", repr(patterns)) from error


def _scaling(settings: dict) -> float:
    return settings["alpha"] / (math.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"])


def _read_marks(metadata: dict[str, str]) -> dict[str, dict]:
    """Returns the marks of changed layers in the metadata, by module name (``_add_changes_``)."""
    expected = "module names with an r and a lora_alpha, or nothing, for each"
    try:
        marks = json.loads(metadata.get(CHANGED, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{CHANGED} in {WEIGHTS}", expected, f"{error}") from error
    key_sets: tuple[set[str], ...] = (set(), {"r", "lora_alpha"})
    if not isinstance(marks, dict) or not all(isinstance(x, dict) and x.keys() in key_sets for x in marks.values()):
        raise CheckpointError(f"{CHANGED} in {WEIGHTS}", expected, repr(marks))
    return marks


def _layers(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns module name → its tensors by role; raises CheckpointError for unknown keys and dtypes, and for a layer
    without both factors."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"key {key}", f"{PREFIX}<module>.lora_A.weight or .lora_B.weight", "an extra key")
        if tensor.dtype not in checks.FLOATS:
            raise CheckpointError(f"key {key}", "float16, bfloat16, float32 or float64", tensor.dtype)
        if tensor.dim() != 2:
            raise CheckpointError(f"key {key}", "a matrix", tuple(tensor.shape))
        layers.setdefault(match[1], {})[match[2]] = tensor
    if not layers:
        raise CheckpointError(WEIGHTS, "at least one pair of keys lora_A, lora_B", "none")
    for name, layer in layers.items():
        _require(name, layer, "lora_A", "lora_B")
    return layers


def _require(name: str, layer: dict[str, Tensor], *roles: str) -> None:
    """Raises CheckpointError for a role that the layer has no tensor of."""
    for role in roles:
        if role not in layer:
            raise CheckpointError(f"key {PREFIX}{name}.{role}.weight", "in the file", "missing")


def _add_layer(adapter: Adapter, name: str, layer: dict[str, Tensor], mark: dict | None) -> None:
    """Checks one layer's tensors against the config and adds them to the adapter. ``mark``: None if the layer's weight
    has not changed."""
    if mark:
        config = adapter.config | mark | {"rank_pattern": {}, "alpha_pattern": {}}
        adapter._own_settings[name] = _settings(config, name)
    r, a, b = adapter.settings(name)["r"], layer["lora_A"], layer["lora_B"]
    rank = _by_pattern(adapter.config, "rank_pattern", name, adapter.config.get("r")) if mark else r
    for factor, tensor, dim in (("lora_A", a, 0), ("lora_B", b, 1)):
        if tensor.shape[dim] != rank or rank < r:
            further = f" (at least {r}, its own)" if mark else ""
            expected = f"a matrix with the rank, {rank}{further}, in dimension {dim}"
            raise CheckpointError(f"key {PREFIX}{name}.{factor}.weight", expected, tuple(tensor.shape))
    if mark:
        adapter.changes[name] = Change(None, (b[:, r:] * adapter.scaling(name), a[r:]))
    elif mark is not None:
        _require(name, layer, "base_layer")
        adapter.changes[name] = Change(layer["base_layer"], _kept_term(name, layer))
    elif "base_layer" in layer:
        adapter.base_weights[name] = layer["base_layer"]
    adapter.pairs[name] = a[:r], b[:, :r]


def _kept_term(name: str, layer: dict[str, Tensor]) -> Term | None:
    """Returns the term that the file has beside a whole weight, if any."""
    if not layer.keys() & {"terms_A", "terms_B"}:
        return None
    _require(name, layer, "terms_A", "terms_B")
    a, b = layer["terms_A"], layer["terms_B"]
    (d_out, _), (_, d_in) = layer["lora_B"].shape, layer["lora_A"].shape
    if a.shape[1] != d_in or tuple(b.shape) != (d_out, len(a)):
        expected = f"shapes (k, {d_in}) of terms_A, ({d_out}, k) of terms_B"
        raise CheckpointError(
            f"keys {PREFIX}{name}.terms_A.weight and .terms_B.weight", expected, f"{tuple(a.shape)}, {tuple(b.shape)}"
        )
    return b, a
