"""PEFT's adapter folder on disk: ``adapter_config.json`` and ``adapter_model.safetensors``. Nothing here knows a model.

Reading trusts nothing: what is not exactly two factors per layer, as the config says, is a ``CheckpointError``.

Where training has changed frozen weights, the same two files say so, in ways that PEFT reads right by itself:

    a weight      key ``….base_layer.weight``, which PEFT loads into the base model (its own way with embeddings); the
                  terms that were kept of it, if any, beside it (``….terms_A.weight``, which PEFT passes over)
    terms alone   further ranks of the adapter: lora_A [a; terms_a], lora_B [b, terms_b / scaling]

and the tensors' metadata, under ``changed_base``, names the layers and the rank and alpha that the adapter itself has.
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
class Change:
    """How a frozen weight differs from the base model's: at least one of the two.

    Attributes:
        weight: all of it, (d_out, d_in).
        term: what was added to it, b (d_out, k) and a (k, d_in); beside a weight, which counts, only what was kept.
    """

    weight: Tensor | None
    term: Term | None


@dataclass
class Adapter:
    """What a folder holds, checked.

    Attributes:
        config: the JSON object.
        pairs: module name → lora_A (r, d_in), lora_B (d_out, r).
        base_weights: module name → the frozen weight (d_out, d_in), which PEFT adds where it adapts the embeddings.
        changes: module name → how training changed the frozen weight.
    """

    config: dict
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    _own: dict[str, dict] = field(default_factory=dict)  # settings of those with further ranks in the file

    def settings(self, name: str) -> dict:
        """r, alpha, dropout and use_rslora of one layer: arguments of ``LoRALinear.from_linear``."""
        return self._own.get(name) or _settings(self.config, name)

    def scaling(self, name: str) -> float:
        return _scaling(self.settings(name))

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
    config = _read_config(io.read_bytes(folder / CONFIG))
    tensors, metadata = io.read_tensors(folder / WEIGHTS)
    noted, adapter = _read_noted(metadata), Adapter(config)
    for name, layer in _layers(tensors).items():
        _add_layer(adapter, name, layer, noted.pop(name, None))
    if noted:
        raise CheckpointError(f"{CHANGED} in {WEIGHTS}", "layers of the file", ", ".join(sorted(noted)))
    return adapter


def write(
    path: str | os.PathLike,
    config: dict,
    tensors: dict[str, Tensor],
    changes: dict[str, Change],
    beside: dict[str, Callable[[Path], object] | None],
) -> None:
    """Write the folder's two files and those ``beside`` them (as ``files.write``), each atomically. ``config`` and
    ``tensors``: an adapter, as PEFT has it; changes go into both, in place.

    Raises:
        CheckpointError: the folder or a file in it cannot be written; what was there before still is.
    """
    noted = _put(config, tensors, changes)
    metadata = {"format": "pt"} | ({CHANGED: json.dumps(noted)} if noted else {})
    text = json.dumps(config, indent=2)  # the order of patterns counts
    writers = {
        WEIGHTS: lambda file: safetensors.torch.save_file(tensors, file, metadata),
        CONFIG: lambda file: file.write_text(text, encoding="utf-8"),
    }
    io.write(path, writers | beside)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises CheckpointError unless a parameter of this shape and dtype holds the file's tensor without loss. ``name``:
    of its key, without PEFT's prefix and ``.weight``."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"key {PREFIX}{name}.weight", f"shape {shape}", tuple(tensor.shape))
    if torch.promote_types(tensor.dtype, dtype) != dtype:
        expected = f"a dtype that the model's {dtype} parameter holds without loss"
        raise CheckpointError(f"key {PREFIX}{name}.weight", expected, tensor.dtype)


def set_ranks(config: dict, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """Give a config these ranks and alphas, module name → value: those of the first, and patterns where any differ."""
    first = next(iter(ranks))
    longest_first = sorted(ranks, key=len, reverse=True)  # PEFT takes the first pattern that matches a name's end
    config |= {"r": ranks[first], "lora_alpha": alphas[first]}
    for field_name, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        differ = len(set(values.values())) > 1
        config[field_name] = {re.escape(name): values[name] for name in longest_first} if differ else {}


def _put(config: dict, tensors: dict[str, Tensor], changes: dict[str, Change]) -> dict[str, dict]:
    """Changes into an adapter's config and tensors, in place. Returns what the metadata says of them: module name →
    rank and alpha of its own where it gets further ranks, else nothing."""
    if not changes:
        return {}
    own = {match[1]: _settings(config, match[1]) for match in map(KEY.fullmatch, tensors) if match}
    ranks, alphas = ({name: layer[field] for name, layer in own.items()} for field in ("r", "alpha"))
    noted: dict[str, dict] = {}
    for name, change in changes.items():
        key = f"{PREFIX}{name}.{{}}.weight".format
        if change.weight is not None:
            noted[name] = {}
            tensors[key("base_layer")] = change.weight
            if change.term is not None:
                tensors[key("terms_B")], tensors[key("terms_A")] = change.term
            continue
        noted[name] = {"r": ranks[name], "lora_alpha": alphas[name]}
        tensors.pop(key("base_layer"), None)  # PEFT's, of an output embedding: changed, it would count twice
        (more_b, more_a), b, a = change.term, tensors[key("lora_B")], tensors[key("lora_A")]
        scaling = _scaling(own[name])
        tensors[key("lora_B")] = torch.cat([b, (more_b / scaling).to(b.dtype)], 1)
        tensors[key("lora_A")] = torch.cat([a, more_a.to(a.dtype)])
        ranks[name] += len(more_a)
        alpha = scaling * (math.sqrt(ranks[name]) if own[name]["use_rslora"] else ranks[name])
        alphas[name] = int(alpha) if alpha.is_integer() else alpha
    if any(noted.values()):
        set_ranks(config, ranks, alphas)
    return noted


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


def _scaling(settings: dict) -> float:
    return settings["alpha"] / (math.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"])


def _read_noted(metadata: dict[str, str]) -> dict[str, dict]:
    """Module name → what the metadata says of its changed weight (``_put``)."""
    expected = "module names with an r and a lora_alpha, or nothing, for each"
    try:
        noted = json.loads(metadata.get(CHANGED, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{CHANGED} in {WEIGHTS}", expected, f"{error}") from error
    names = ({}.keys(), {"r": 0, "lora_alpha": 0}.keys())
    if not isinstance(noted, dict) or not all(isinstance(x, dict) and x.keys() in names for x in noted.values()):
        raise CheckpointError(f"{CHANGED} in {WEIGHTS}", expected, repr(noted))
    return noted


def _layers(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module name → its tensors by role, of known roles and dtypes, both factors among them."""
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
    for role in roles:
        if role not in layer:
            raise CheckpointError(f"key {PREFIX}{name}.{role}.weight", "in the file", "missing")


def _add_layer(adapter: Adapter, name: str, layer: dict[str, Tensor], noted: dict | None) -> None:
    """Check one layer's tensors against the config and put them into the adapter."""
    if noted:
        own = adapter.config | noted | {"rank_pattern": {}, "alpha_pattern": {}}
        adapter._own[name] = _settings(own, name)
    r, a, b = adapter.settings(name)["r"], layer["lora_A"], layer["lora_B"]
    rank = _by_pattern(adapter.config, "rank_pattern", name, adapter.config.get("r")) if noted else r
    for factor, tensor, dim in (("lora_A", a, 0), ("lora_B", b, 1)):
        if tensor.shape[dim] != rank or rank < r:
            further = f" (at least {r}, its own)" if noted else ""
            expected = f"a matrix with the rank, {rank}{further}, in dimension {dim}"
            raise CheckpointError(f"key {PREFIX}{name}.{factor}.weight", expected, tuple(tensor.shape))
    if noted:
        adapter.changes[name] = Change(None, (b[:, r:] * adapter.scaling(name), a[r:]))
    elif noted is not None:
        _require(name, layer, "base_layer")
        adapter.changes[name] = Change(layer["base_layer"], _kept_term(name, layer))
    elif "base_layer" in layer:
        adapter.base_weights[name] = layer["base_layer"]
    adapter.pairs[name] = a[:r], b[:, :r]


def _kept_term(name: str, layer: dict[str, Tensor]) -> Term | None:
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
