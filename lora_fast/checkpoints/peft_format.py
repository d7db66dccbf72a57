"""Reads and writes PEFT's two files, ``adapter_config.json`` and ``adapter_model.safetensors``; knows no model.

A key is ``base_model.model.<module>.<rest>``. Reading also accepts keys that contain the name of PEFT's default
adapter, ``….lora_A.default.weight``, as PEFT does. Beside the two factors of each linear layer the file may contain
other tensors: DoRA's magnitudes (``….lora_magnitude_vector``), those of whole modules (``modules_to_save``), of
embeddings, of PEFT's other variants. What a model can do with them is decided in ``load_plan.py``.

Of an embedding X in ``modules_to_save`` the file has the trained values, ``X.weight``. If the vocabulary was resized,
PEFT adds the frozen original, ``X.original_module.weight``, and repeats the trained values as
``X.modules_to_save.weight`` (PEFT 0.18 also those of other adapters), which are not read.

Where training has changed frozen weights, the same two files represent the changes in forms that PEFT reads by itself:

    a weight      key ``….base_layer.weight``, which PEFT loads into the base model (as it does for embeddings); beside
                  it the terms that were kept of it, if any (``….terms_A.weight``, which PEFT ignores)
    terms alone   further ranks of the adapter: lora_A [a; terms_a], lora_B [b, terms_b / scaling]

The tensors' metadata, under ``changed_base``, maps each changed layer to its mark: the rank and alpha of the adapter
itself where the file has further ranks, otherwise nothing. Under ``quantized_base`` the metadata maps each layer whose
frozen weight was quantised to the weight's format; it is there if any was.
"""

from __future__ import annotations

import json
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
from . import io, peft_config
from .peft_config import CONFIG

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"  # in keys, after the module's name
ROLE = re.compile(r"(.+)\.(lora_A|lora_B|base_layer|terms_A|terms_B)\.weight")
ADAPTED = re.compile(r"(.+)\.(?:lora_A\.weight|lora_embedding_A)")  # one key of each adapted layer
ORIGINAL, REPEATED = ".original_module.", ".modules_to_save."  # in keys of embeddings that are trained whole
DEFAULT_NAME = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")
CHANGED, QUANTIZED = "changed_base", "quantized_base"  # in the tensors' metadata


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
    """The contents of PEFT's two files, checked against each other.

    Attributes:
        config: the JSON object, with PEFT's defaults.
        pairs: module name → lora_A (r, d_in), lora_B (d_out, r); those of a convolution have more dimensions.
        base_weights: module name → the frozen weight, unchanged by merges, which the file has where PEFT adapts the
            embeddings.
        magnitudes: module name → DoRA's magnitudes (d_out,) of a layer with such a pair.
        others: key without the prefix → any other tensor.
        changes: module name → how training changed the frozen weight.
        quantized: module name → format of the frozen weight that the adapter was trained over; None where the file does
            not tell, as PEFT's own files and those over plain weights.
    """

    config: dict
    quantized: dict[str, str] | None = None
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    _own_settings: dict[str, dict] = field(default_factory=dict)  # of layers that have further ranks in the file

    def settings(self, name: str) -> dict:
        """Returns r, alpha, dropout and use_rslora of one layer, or of a parameter that ``target_parameters`` names."""
        return self._own_settings.get(name) or peft_config.settings(self.config, name)

    def scaling(self, name: str) -> float:
        """Returns alpha / r of one layer, or alpha / √r with use_rslora."""
        return peft_config.scaling(self.settings(name))

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors but those of changed weights, by their keys without the prefix."""
        pairs = {f"{name}.lora_{'AB'[i]}.weight": pair[i] for name, pair in self.pairs.items() for i in range(2)}
        magnitudes = {f"{name}.{MAGNITUDE}": tensor for name, tensor in self.magnitudes.items()}
        weights = {f"{name}.base_layer.weight": weight for name, weight in self.base_weights.items()}
        return pairs | magnitudes | weights | self.others

    def targets(self, name: str) -> bool:
        """Returns whether the file's adapter belongs on a module of this name."""
        named = name in self.pairs or peft_config.names_targets(self.config)
        return named and peft_config.is_target(self.config, name)


def read(path: str | os.PathLike) -> Adapter:
    """Returns the adapter in a folder.

    Raises:
        CheckpointError: a folder or file that does not exist, is not JSON or safetensors, or is truncated; a setting
            that PEFT would not take; a key that is missing or there twice; a shape or dtype that does not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise CheckpointError("path", f"a folder with {CONFIG} and {WEIGHTS}", f"{str(folder)!r}: {got}")
    config = peft_config.parse(io.read_bytes(folder / CONFIG))
    if (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        expected = f"{WEIGHTS} in the folder"
        got = f"only {PICKLE}, a pickle, which is not read; convert it: safetensors.torch.save_file(torch.load("
        raise CheckpointError("path", expected, f"{got}{PICKLE!r}, weights_only=True), {WEIGHTS!r})")
    return parse(config, *io.read_tensors(folder / WEIGHTS))


def parse(config: dict, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Adapter:
    """Returns the adapter that a config, tensors by key and their metadata describe.

    Raises:
        CheckpointError: as ``read``.
    """
    marks, adapter = _read_marks(metadata), Adapter(config, _read_formats(metadata))
    roles: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _without_prefix(tensors).items():
        if REPEATED in key:
            continue
        if match := ROLE.fullmatch(key):
            roles.setdefault(match[1], {})[match[2]] = tensor
        else:
            adapter.others[key] = tensor
    for name, layer in roles.items():
        _add_layer(adapter, name, layer, marks.pop(name, None))
        if name in adapter.pairs and (key := f"{name}.{MAGNITUDE}") in adapter.others:
            adapter.magnitudes[name] = adapter.others.pop(key)
    for note, others in ((CHANGED, marks.keys()), (QUANTIZED, (adapter.quantized or {}).keys() - adapter.pairs.keys())):
        if others:
            raise CheckpointError(f"{note} in {WEIGHTS}", "layers of the file", ", ".join(sorted(others)))
    return adapter


def add_changes_(
    config: dict, tensors: dict[str, Tensor], changes: dict[str, Change], formats: dict[str, str]
) -> dict[str, str]:
    """Adds changes of frozen weights to an adapter's config and tensors, in place. Returns the tensors' metadata.

    Args:
        formats: module name → format of the frozen weight, of those that are quantised.
    """
    notes = {CHANGED: _add_changes_(config, tensors, changes), QUANTIZED: formats}
    return {"format": "pt"} | {key: json.dumps(note) for key, note in notes.items() if note}


def writers(config: dict, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Callable[[Path], object]]:
    """Returns the functions that write the two files (``io.write``), by file name."""
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


def _add_changes_(config: dict, tensors: dict[str, Tensor], changes: dict[str, Change]) -> dict[str, dict]:
    """Adds the changes. Returns the marks for the metadata, by module name: the layer's own rank and alpha where it
    gets further ranks, otherwise nothing."""
    names = [match[1] for key in tensors if (match := ADAPTED.fullmatch(key.removeprefix(PREFIX)))] if changes else []
    settings = {name: peft_config.settings(config, name) for name in names}
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
        scaling = peft_config.scaling(settings[name])
        tensors[key("lora_B")] = torch.cat([b, (term_b / scaling).to(b.dtype)], 1)
        tensors[key("lora_A")] = torch.cat([a, term_a.to(a.dtype)])
        ranks[name] += len(term_a)
        # The scale alpha / r has to stay the same at the larger rank.
        alphas[name] = peft_config.alpha_of(scaling, ranks[name], settings[name]["use_rslora"])
    if any(marks.values()):
        peft_config.set_ranks(config, ranks, alphas)
    return marks


def _read_marks(metadata: dict[str, str]) -> dict[str, dict]:
    """Returns the marks of changed layers in the metadata, by module name (``_add_changes_``)."""
    expected = "module names with an r and a lora_alpha, or nothing, for each"
    try:
        marks = json.loads(metadata.get(CHANGED, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{CHANGED} in {WEIGHTS}", expected, f"{error}") from error
    key_sets: tuple[set[str], ...] = (set(), {"r", "lora_alpha"})
    if not isinstance(marks, dict) or not all(isinstance(x, dict) and x.keys() in key_sets for x in marks.values()):
        raise CheckpointError(f"{CHANGED} in {WEIGHTS}", expected, checks.shown(marks))
    return marks


def _read_formats(metadata: dict[str, str]) -> dict[str, str] | None:
    """Returns the formats of quantised frozen weights in the metadata, by module name; None if there are none."""
    if QUANTIZED not in metadata:
        return None
    try:
        formats = json.loads(metadata[QUANTIZED])
    except ValueError as error:
        raise CheckpointError(f"{QUANTIZED} in {WEIGHTS}", "a format for each module name", f"{error}") from error
    if not isinstance(formats, dict) or not all(isinstance(name, str) for name in formats.values()):
        raise CheckpointError(f"{QUANTIZED} in {WEIGHTS}", "a format for each module name", checks.shown(formats))
    return formats


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors by key without PEFT's prefix and the name of its default adapter."""
    short: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        if not key.startswith(PREFIX):
            raise CheckpointError(f"key {key}", f"{PREFIX}<module>.lora_A.weight or .lora_B.weight", "an extra key")
        name = DEFAULT_NAME.sub(r"\1", key.removeprefix(PREFIX))
        if name in short:
            raise CheckpointError(
                f"key {PREFIX}{name}", "once in the file", "once with the adapter's name, once without"
            )
        short[name] = tensor
    if not short:
        raise CheckpointError(WEIGHTS, "at least one pair of keys lora_A, lora_B", "none")
    return short


def _require(name: str, layer: dict[str, Tensor], *roles: str) -> None:
    """Raises CheckpointError for a role that the layer has no tensor of."""
    for role in roles:
        if role not in layer:
            raise CheckpointError(f"key {PREFIX}{name}.{role}.weight", "in the file", "missing")


def _add_layer(adapter: Adapter, name: str, layer: dict[str, Tensor], mark: dict | None) -> None:
    """Checks one layer's tensors against the config and adds them to the adapter. ``mark``: None if the layer's weight
    has not changed."""
    if mark is None and layer.keys() == {"base_layer"}:  # of an embedding, whose factors have other keys
        adapter.base_weights[name] = layer["base_layer"]
        return
    _require(name, layer, "lora_A", "lora_B")
    a, b = layer["lora_A"], layer["lora_B"]
    for role, tensor in layer.items():
        key = f"key {PREFIX}{name}.{role}.weight"
        if tensor.dtype not in checks.FLOATS:
            raise CheckpointError(key, "float16, bfloat16, float32 or float64", tensor.dtype)
        if tensor.dim() < 2:
            raise CheckpointError(key, "a matrix", tuple(tensor.shape))
    r = _check_rank(adapter, name, a, b, mark)
    if mark:
        adapter.changes[name] = Change(None, (b[:, r:] * adapter.scaling(name), a[r:]))
        a, b = a[:r], b[:, :r]
    elif mark is not None:
        _require(name, layer, "base_layer")
        adapter.changes[name] = Change(layer["base_layer"], _kept_term(name, layer))
    elif "base_layer" in layer:
        adapter.base_weights[name] = layer["base_layer"]
    adapter.pairs[name] = a, b


def _check_rank(adapter: Adapter, name: str, a: Tensor, b: Tensor, mark: dict | None) -> int:
    """Returns the rank of a layer's adapter; raises CheckpointError if the tensors have another one. Those of experts
    contain more than one product."""
    if mark:
        marked = adapter.config | mark | {"rank_pattern": {}, "alpha_pattern": {}}
        adapter._own_settings[name] = peft_config.settings(marked, name)
    r, rank = adapter.settings(name)["r"], peft_config.settings(adapter.config, name)["r"]
    for factor, tensor, dim in (("lora_A", a, 0), ("lora_B", b, 1)):
        if (tensor.shape[dim] != rank or rank < r) and not adapter.config.get("target_parameters"):
            further = f" (at least {r}, its own)" if mark else ""
            expected = f"a matrix with the rank, {rank}{further}, in dimension {dim}"
            raise CheckpointError(f"key {PREFIX}{name}.{factor}.weight", expected, tuple(tensor.shape))
    return r


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
