"""Adapters in PEFT's format, both ways: PEFT reads what is saved here, and what PEFT saves loads here, bit for bit."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from . import adapter_files, surgery, targets
from .adapter_files import CONFIG, PREFIX, WEIGHTS, Adapter
from .checks import CheckpointError
from .layers import peft_layers
from .linear import LoRALinear
from .report import Report

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of inner modules


def save_adapter(model: nn.Module, path: str | os.PathLike) -> Report:
    """Write the model's adapter into a folder, as PEFT does: ``adapter_config.json``, ``adapter_model.safetensors``.

    Takes the adapters of ``LoRALinear`` layers, or the active adapter of a PeftModel. Different ranks or scales of
    layers become PEFT's rank_pattern and alpha_pattern. Each file is replaced atomically and synced to disk.

    Returns:
        The layers saved.

    Raises:
        CheckpointError: no adapter, more than one active adapter, adapters without data (meta device) or sharded, or
            a path that cannot be written. An adapter that was in the folder is then still whole.
    """
    model = _unwrap(model)
    theirs, ours = peft_layers(model), _lora_linears(model)
    if theirs:
        files = _peft_files(model)
    elif ours:
        tensors = {}
        for name, layer in ours.items():
            for factor in ("lora_A", "lora_B"):
                tensors[f"{PREFIX}{name}.{factor}.weight"] = _data(f"{name}.{factor}", getattr(layer, factor))
        config = json.dumps(_config(model, ours), indent=2, sort_keys=True).encode()
        files = {WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}), CONFIG: config}
    else:
        raise CheckpointError("model", "LoRA layers (lf.inject_, or PEFT)", f"{type(model).__name__} without any")
    adapter_files.write(path, files)
    return Report("saved", dict.fromkeys(_active_layers(model)[1] if theirs else ours, os.fspath(path)))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> Report:
    """Read an adapter folder written by ``save_adapter`` or PEFT into the model, in place.

    A model with ``LoRALinear`` layers, or a PEFT model (its active adapter), has to have the file's layers, ranks and
    scales; its parameters keep their identity. A plain model first gets the file's layers, as by ``inject_``.
    Everything is checked before the model is touched.

    Returns:
        The layers loaded.

    Raises:
        CheckpointError: files that cannot be read, are damaged, use PEFT features beyond plain LoRA, or do not fit the
            model: a missing or extra key, a shape, a scale, a dtype that would lose bits. The model is then unchanged.
    """
    model, adapter = _unwrap(model), adapter_files.read(path)
    theirs, ours = peft_layers(model), _lora_linears(model)
    if theirs:
        _load(adapter, _peft_slots(model))
    elif ours:
        _load(adapter, {name: _slot(name, layer) for name, layer in ours.items()})
    else:
        _inject(model, adapter)
    shapes = {name: f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}" for name, (a, b) in adapter.pairs.items()}
    return Report("loaded", shapes)


@dataclass
class _Slot:
    """Where one layer's pair goes: its adapter's parameters, scaling, and frozen weight."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    weight: Tensor


def _load(adapter: Adapter, slots: dict[str, _Slot]) -> None:
    """Check everything against the slots, then copy."""
    _check_names(set(slots), adapter)
    for name, slot in slots.items():
        a, b = adapter.pairs[name]
        _check_tensor(f"{name}.lora_A", a, tuple(slot.lora_A.shape), slot.lora_A.dtype)
        _check_tensor(f"{name}.lora_B", b, tuple(slot.lora_B.shape), slot.lora_B.dtype)
        _check_base(name, slot.weight, adapter)
        if not math.isclose(slot.scaling, adapter.scaling(name), rel_tol=1e-9):
            expected = f"scale {slot.scaling:g}, as in the model (a plain model takes the file's)"
            raise CheckpointError(f"lora_alpha of {name}", expected, f"{adapter.scaling(name):g}")
    with torch.no_grad():
        for name, slot in slots.items():
            slot.lora_A.copy_(adapter.pairs[name][0])
            slot.lora_B.copy_(adapter.pairs[name][1])


def _inject(model: nn.Module, adapter: Adapter) -> None:
    """A plain model: the layers of the file take the place of its linear layers."""
    surgery.check_plain(model)
    names = {_clean(name): name for name, _ in model.named_modules() if name}
    _check_names({name for name in names if name in adapter.pairs or adapter.targets(name)}, adapter)
    settings = {}
    for name, (a, b) in adapter.pairs.items():
        linear = model.get_submodule(names[name])
        reason = targets.unsupported(linear, model.get_submodule(names[name].rpartition(".")[0]))
        if reason is not None or not adapter.targets(name):
            got = reason or "not among them"
            raise CheckpointError(f"keys of {name}", "a torch.nn.Linear among the config's target_modules", got)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        _check_tensor(f"{name}.lora_A", a, (a.shape[0], linear.in_features), dtype)
        _check_tensor(f"{name}.lora_B", b, (linear.out_features, a.shape[0]), dtype)
        _check_base(name, linear.weight, adapter)
        settings[names[name]] = adapter.settings(name)
    surgery.replace_(model, settings)
    layers = _lora_linears(model)
    _load(adapter, {name: _slot(name, layers[name]) for name in adapter.pairs})


def _check_names(expected: set[str], adapter: Adapter) -> None:
    missing, extra = sorted(expected - set(adapter.pairs)), sorted(set(adapter.pairs) - expected)
    for names, got in ((missing, "missing"), (extra, "an extra key: the model has no such layer")):
        if names:
            more = f" and those of {len(names) - 1} more layers" if len(names) > 1 else ""
            key = f"keys {PREFIX}{names[0]}.lora_A.weight and .lora_B.weight{more}"
            raise CheckpointError(key, f"one pair for each of the model's {len(expected)} layers", got)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"key {PREFIX}{name}.weight", f"shape {shape}", tuple(tensor.shape))
    if torch.promote_types(tensor.dtype, dtype) != dtype:
        expected = f"a dtype that the model's {dtype} adapter holds without loss"
        raise CheckpointError(f"key {PREFIX}{name}.weight", expected, tensor.dtype)


def _check_base(name: str, weight: Tensor, adapter: Adapter) -> None:
    saved = adapter.base_weights.get(name)
    if saved is not None and not torch.equal(saved, weight.detach().to("cpu", saved.dtype)):
        expected = "the model's own frozen weight"
        raise CheckpointError(f"key {PREFIX}{name}.base_layer.weight", expected, "other values or another shape")


def _slot(name: str, layer: LoRALinear) -> _Slot:
    _check_unmerged(name, layer)
    return _Slot(layer.lora_A, layer.lora_B, layer.scaling, layer.weight)


def _check_unmerged(name: str, layer: nn.Module) -> None:
    if layer.merged:
        raise CheckpointError("model", "unmerged layers (lf.unmerge_)", f"{name} merged")


def _lora_linears(model: nn.Module) -> dict[str, LoRALinear]:
    if isinstance(model, LoRALinear):
        expected = "a module that contains LoRALinear layers (their names become the keys)"
        raise CheckpointError("model", expected, "a single LoRALinear")
    return {_clean(name): module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and data parallelism's wrappers."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return _unwrap(model.module)
    return _unwrap(model._orig_mod) if hasattr(model, "_orig_mod") else model


def _clean(name: str) -> str:
    """A module's name without the wrappers that only some runs have."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _data(name: str, parameter: Tensor) -> Tensor:
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        got = f"{type(parameter).__name__} on {parameter.device}"
        raise CheckpointError(name, "a parameter with data, not sharded", got)
    return parameter.detach().cpu().clone(memory_format=torch.contiguous_format)


def _config(model: nn.Module, layers: dict[str, LoRALinear]) -> dict:
    """PEFT's config of these layers: the first one's rank and alpha, and patterns for those that differ."""
    use_rslora = all(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _alpha(layer, use_rslora) for name, layer in layers.items()}
    first = next(iter(layers))
    longest_first = sorted(layers, key=len, reverse=True)  # PEFT takes the first pattern that matches a name's end
    modules = [_clean(name) for name, _ in model.named_modules()]
    ambiguous = any(name not in layers and targets.matches(list(layers), name) for name in modules)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "lora_dropout": layers[first].dropout_p,
        "target_modules": "|".join(map(re.escape, layers)) if ambiguous else sorted(layers),
        "rank_pattern": _pattern({name: ranks[name] for name in longest_first}),
        "alpha_pattern": _pattern({name: alphas[name] for name in longest_first}),
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _alpha(layer: LoRALinear, use_rslora: bool) -> float:
    """The alpha that gives the layer's scaling, also where the scaling was edited; whole numbers as int, as PEFT."""
    unit = math.sqrt(layer.r) if use_rslora else layer.r
    alpha = layer.alpha if layer.alpha / unit == layer.scaling else layer.scaling * unit
    return int(alpha) if float(alpha).is_integer() else alpha


def _pattern(values: dict[str, float]) -> dict[str, float]:
    return {re.escape(name): value for name, value in values.items()} if len(set(values.values())) > 1 else {}


def _active_layers(model: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """The active adapter of a PEFT model, and its LoRA layers by their names in the base model."""
    from peft import PeftModel

    layers = peft_layers(model)
    active = {adapter for layer in layers.values() for adapter in layer.active_adapters}
    if len(active) != 1:
        raise CheckpointError("model", "one active adapter", ", ".join(sorted(active)) or "none")
    adapter = active.pop()
    prefix = PREFIX if isinstance(model, PeftModel) else ""
    holding = {name: layer for name, layer in layers.items() if adapter in getattr(layer, "lora_A", ())}
    return adapter, {_clean(name).removeprefix(prefix): layer for name, layer in holding.items()}


def _peft_files(model: nn.Module) -> dict[str, bytes]:
    from peft import PeftModel

    adapter, _ = _active_layers(model)
    if not isinstance(model, PeftModel):
        raise CheckpointError("model", "a PeftModel or LoRALinear layers", f"PEFT layers in a {type(model).__name__}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[adapter])
        saved = Path(folder) if adapter == "default" else Path(folder) / adapter
        config, tensors = (saved / CONFIG).read_bytes(), safetensors.torch.load((saved / WEIGHTS).read_bytes())
    tensors = {_clean(key): tensor for key, tensor in tensors.items()}
    return {WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}), CONFIG: config}


def _peft_slots(model: nn.Module) -> dict[str, _Slot]:
    adapter, layers = _active_layers(model)
    slots = {}
    for name, layer in layers.items():
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        if adapter in layer.lora_variant or b.bias is not None:
            raise CheckpointError("model", "a plain LoRA adapter", f"{name} with a variant or a bias on lora_B")
        _check_unmerged(name, layer)
        slots[name] = _Slot(a.weight, b.weight, layer.scaling[adapter], layer.get_base_layer().weight)
    return slots
