"""Adapters in PEFT's format, both ways: PEFT reads what is saved here, and what PEFT saves loads here, bit for bit.

An adapter whose training changed the frozen weights (ScaLoRA) is saved with what they have become: layers/merge_log.py
has what is known of them, peft_format.py how the files say it.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import checks
from ..checks import CheckpointError
from ..layers.find import ADAPTER_LAYERS, peft_layers
from ..layers.lora import LoRALinear
from ..surgery import inject, targets
from ..surgery.change_report import Report
from . import base_weights, io, peft_format
from . import sidecar as free_files
from .peft_format import CONFIG, PREFIX, WEIGHTS, Adapter, check_tensor
from .sidecar import SIDECAR, FreeLayer

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of inner modules


def save_adapter(model: nn.Module, path: str | os.PathLike, *, exact: bool = False) -> Report:
    """Write the model's adapter into a folder, as PEFT does: ``adapter_config.json``, ``adapter_model.safetensors``.

    Takes the adapters of our layers, or the active adapter of a PeftModel. Different ranks or scales of layers become
    PEFT's rank_pattern and alpha_pattern. NB-LoRA's and SingLoRA's adapters are saved as the plain ones they equal (all
    but alpha / r in lora_B), with what they train themselves in a file beside, for ``load_adapter``. Each file is
    replaced atomically and synced to disk.

    Where training has merged into frozen weights (ScaLoRA), the adapter fits no other base, so what they have become is
    saved in the same files, and the report says so. It follows what ScaLoRA kept:

    - whole weights: every bit, and as large as they are. PEFT restores them by itself; vLLM refuses the file and
      llama.cpp's converter leaves them out, so give those the merged model.
    - the terms that were merged, as further ranks of the adapter: PEFT, and a server that admits the rank, read a plain
      adapter of a larger rank. A 16-bit weight comes back only to its rounding (stochastic rounding is not repeated).

    ``load_adapter`` puts either back into the weights. PEFT does not save them again: to train on and save, load with
    ``load_adapter``. Whoever wants no adapter at all: ``merge_`` and the model's own ``state_dict``, or, with PEFT,
    ``merge_and_unload().save_pretrained``; both contain the changed weights.

    Args:
        exact: for checkpoints: whole weights also where terms were kept, and those terms beside them, so that training
            goes on to the same bits after ``load_adapter``. In a subclass of transformers' Trainer, ``_save(output_dir,
            state_dict)`` calls this after ``super()``'s: the two files take the place of PEFT's;
            ``_load_from_checkpoint(folder, model)`` calls ``load_adapter`` and not ``super()``'s.

    Returns:
        The layers saved.

    Raises:
        CheckpointError: no adapter, more than one active adapter, adapters without data (meta device) or sharded, a
            changed weight that the adapter has no layer on, that PEFT has merged, or that is one parameter of many
            experts (``load_adapter`` reads no such adapter), or a path that cannot be written.
            An adapter that was in the folder is then still whole.
    """
    model, sidecar = _unwrap(model), None
    if peft_layers(model):
        layers = _active_layers(model)[1]
        config, tensors = _peft_files(model)
    elif layers := _our_layers(model):
        tensors = {}
        for name, layer in layers.items():
            for factor in ("lora_A", "lora_B"):
                tensors[f"{PREFIX}{name}.{factor}.weight"] = io.to_host(f"{name}.{factor}", getattr(layer, factor))
        config = _config(model, layers)
        factors = lambda name: [tensors[f"{PREFIX}{name}.{factor}.weight"] for factor in ("lora_A", "lora_B")]
        sidecar = free_files.writer(layers, {name: tuple(factors(name)) for name in layers})
    else:
        raise CheckpointError("model", "LoRA layers (lf.inject_, or PEFT)", f"{type(model).__name__} without any")
    changes = base_weights.collect(model, layers, exact)
    report = Report("saved", dict.fromkeys(layers, os.fspath(path)), note=base_weights.note(changes, "saved"))
    peft_format.write(path, config, tensors, changes, {SIDECAR: sidecar})
    return report


def load_adapter(model: nn.Module, path: str | os.PathLike) -> Report:
    """Read an adapter folder written by ``save_adapter`` or PEFT into the model, in place.

    A model with our layers, or a PEFT model (its active adapter), has to have the file's layers, ranks and scales; its
    parameters keep their identity. A plain model first gets the file's layers, as by ``inject_``.
    ``NBLoRALinear`` and ``SingLoRALinear`` layers get their own parameters back bit for bit where the folder has them,
    for the same settings (norm and bound; alpha and ramp). Of a plain adapter, ``NBLoRALinear`` layers get those that
    equal it, if it is within their bound.
    Frozen weights that the adapter's training had changed are restored: whole ones bit for bit, terms by adding them to
    the model's weights, which have to be the unchanged ones. Everything is checked before the model is touched.

    Returns:
        The layers loaded; its note says which frozen weights were restored.

    Raises:
        CheckpointError: files that cannot be read, are damaged, use PEFT features beyond plain LoRA, or do not fit the
            model: a missing or extra key, a shape, a scale, a dtype that would lose bits, a bound, a base weight that
            training has changed already, or that other modules share. The model is then unchanged.
    """
    model, adapter = _unwrap(model), peft_format.read(path)
    theirs, ours = peft_layers(model), _our_layers(model)
    if theirs:
        _load(model, adapter, _peft_slots(model), {})
    else:
        sidecar = free_files.read(path, adapter.pairs)
        if ours:
            _load(model, adapter, _slots(ours), _free(ours, adapter, sidecar))
        else:
            _inject(model, adapter, sidecar)
    shapes = {name: f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}" for name, (a, b) in adapter.pairs.items()}
    return Report("loaded", shapes, note=base_weights.note(adapter.changes, "restored"))


@dataclass
class _Slot:
    """Where one layer's pair goes: its adapter's parameters, scaling, and the layer itself."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    layer: nn.Module


_Values = tuple[nn.Module, Sequence[Tensor]]  # a layer, and what the tensors that its SAVED_STATE names get


def _load(model: nn.Module, adapter: Adapter, slots: dict[str, _Slot], free: dict[str, _Values]) -> None:
    """Check everything against the slots, then copy; ``free`` is checked."""
    _check_names(slots.keys() | free.keys(), adapter)
    layers = {name: slot.layer for name, slot in slots.items()} | {name: layer for name, (layer, _) in free.items()}
    base_weights.check(model, layers, adapter)
    for name, slot in slots.items():
        a, b = adapter.pairs[name]
        check_tensor(f"{name}.lora_A", a, tuple(slot.lora_A.shape), slot.lora_A.dtype)
        check_tensor(f"{name}.lora_B", b, tuple(slot.lora_B.shape), slot.lora_B.dtype)
        if not math.isclose(slot.scaling, adapter.scaling(name), rel_tol=1e-9):
            expected = f"scale {slot.scaling:g}, as in the model (a plain model takes the file's)"
            raise CheckpointError(f"lora_alpha of {name}", expected, f"{adapter.scaling(name):g}")
    with torch.no_grad():
        for name, slot in slots.items():
            slot.lora_A.copy_(adapter.pairs[name][0])
            slot.lora_B.copy_(adapter.pairs[name][1])
    for layer, values in free.values():
        layer.load_free_(*values)
    base_weights.restore_(layers, adapter)


def _free(layers: dict[str, nn.Module], adapter: Adapter, sidecar: dict[str, FreeLayer]) -> dict[str, _Values]:
    """What each layer with tensors of its own gets: the sidecar's, or those that it has for the plain adapter."""
    free = {}
    for name, layer in layers.items():
        if not layer.SAVED_STATE or name not in adapter.pairs:
            continue  # _load names all that are missing
        if name in sidecar:
            _check_free(name, layer, sidecar[name])
            free[name] = layer, sidecar[name].tensors
            continue
        a, b = adapter.pairs[name]
        check_tensor(f"{name}.lora_A", a, (a.shape[0], layer.in_features), torch.float64)
        check_tensor(f"{name}.lora_B", b, (layer.out_features, a.shape[0]), torch.float64)
        try:
            free[name] = layer, layer.free_parameters_for(a, b, adapter.scaling(name))
        except checks.ArgumentError as error:
            raise CheckpointError(f"adapter of {name}", error.expected, error.got) from error
    return free


def _check_free(name: str, layer: nn.Module, saved: FreeLayer) -> None:
    in_model = {"kind": free_files.kind_of(layer).__name__} | {key: getattr(layer, key) for key in layer.INIT_ARGUMENTS}
    in_file = {"kind": saved.kind.__name__} | saved.settings
    for key, value in in_model.items():
        if in_file[key] != value:
            expected = f"{value!r}, as in the model (a plain model takes the file's)"
            raise CheckpointError(f"{key} of {name}", expected, repr(in_file[key]))
    for free, tensor in zip(layer.SAVED_STATE, saved.tensors, strict=True):
        own = getattr(layer, free)
        if tensor.shape != own.shape or torch.promote_types(tensor.dtype, own.dtype) != own.dtype:
            expected = f"{own.dtype} of shape {tuple(own.shape)}, or a dtype that it holds without loss"
            raise CheckpointError(f"key {name}.{free}", expected, f"{tensor.dtype} {tuple(tensor.shape)}")


def _inject(model: nn.Module, adapter: Adapter, sidecar: dict[str, FreeLayer]) -> None:
    """A plain model: the layers of the files take the place of its linear layers."""
    inject.check_plain(model)
    names = {_clean(name): name for name, _ in model.named_modules() if name}
    _check_names({name for name in names if name in adapter.pairs or adapter.targets(name)}, adapter)
    layers, linears = {}, {}
    for name, (a, b) in adapter.pairs.items():
        linear = linears[name] = model.get_submodule(names[name])
        reason = targets.unsupported(linear, model.get_submodule(names[name].rpartition(".")[0]))
        if reason is not None or not adapter.targets(name):
            got = reason or "not among them"
            raise CheckpointError(f"keys of {name}", "a torch.nn.Linear among the config's target_modules", got)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        check_tensor(f"{name}.lora_A", a, (a.shape[0], linear.in_features), dtype)
        check_tensor(f"{name}.lora_B", b, (linear.out_features, a.shape[0]), dtype)
        kind, settings = LoRALinear, adapter.settings(name)
        if name in sidecar:
            kind = sidecar[name].kind
            settings = {"r": settings["r"], "dropout": settings["dropout"], **sidecar[name].settings}
        layers[names[name]] = kind, settings
    base_weights.check(model, linears, adapter)
    inject.replace_(model, layers)
    ours = _our_layers(model)
    _load(model, adapter, _slots(ours), _free(ours, adapter, sidecar))


def _check_names(expected: set[str], adapter: Adapter) -> None:
    missing, extra = sorted(expected - set(adapter.pairs)), sorted(set(adapter.pairs) - expected)
    for names, got in ((missing, "missing"), (extra, "an extra key: the model has no such layer")):
        if names:
            more = f" and those of {len(names) - 1} more layers" if len(names) > 1 else ""
            key = f"keys {PREFIX}{names[0]}.lora_A.weight and .lora_B.weight{more}"
            raise CheckpointError(key, f"one pair for each of the model's {len(expected)} layers", got)


def _slots(layers: dict[str, nn.Module]) -> dict[str, _Slot]:
    """Of those that are LoRALinear."""
    slots = {}
    for name, layer in layers.items():
        _check_unmerged(name, layer)
        if isinstance(layer, LoRALinear):
            slots[name] = _Slot(layer.lora_A, layer.lora_B, layer.scaling, layer)
    return slots


def _check_unmerged(name: str, layer: nn.Module) -> None:
    if layer.merged:
        raise CheckpointError("model", "unmerged layers (lf.unmerge_)", f"{name} merged")


def _our_layers(model: nn.Module) -> dict[str, nn.Module]:
    if isinstance(model, ADAPTER_LAYERS):
        expected = "a module that contains adapter layers (their names become the keys)"
        raise CheckpointError("model", expected, f"a single {type(model).__name__}")
    return {_clean(name): module for name, module in model.named_modules() if isinstance(module, ADAPTER_LAYERS)}


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and data parallelism's wrappers."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return _unwrap(model.module)
    return _unwrap(model._orig_mod) if hasattr(model, "_orig_mod") else model


def _clean(name: str) -> str:
    """A module's name without the wrappers that only some runs have."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _config(model: nn.Module, layers: dict[str, nn.Module]) -> dict:
    """PEFT's config of these layers: the first one's rank and alpha, and patterns for those that differ."""
    use_rslora = all(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _alpha(layer, use_rslora) for name, layer in layers.items()}
    modules = [_clean(name) for name, _ in model.named_modules()]
    ambiguous = any(name not in layers and targets.matches(list(layers), name) for name in modules)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "lora_dropout": next(iter(layers.values())).dropout_p,
        "target_modules": "|".join(map(re.escape, layers)) if ambiguous else sorted(layers),
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    peft_format.set_ranks(config, ranks, alphas)
    return config


def _alpha(layer: nn.Module, use_rslora: bool) -> float:
    """The alpha that gives the layer's scaling, also where the scaling was edited; whole numbers as int, as PEFT."""
    unit = math.sqrt(layer.r) if use_rslora else layer.r
    alpha = layer.alpha if layer.alpha / unit == layer.scaling else layer.scaling * unit
    return int(alpha) if float(alpha).is_integer() else alpha


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


def _peft_files(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors as PEFT saves them."""
    from peft import PeftModel

    adapter, _ = _active_layers(model)
    if not isinstance(model, PeftModel):
        raise CheckpointError("model", "a PeftModel or LoRALinear layers", f"PEFT layers in a {type(model).__name__}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[adapter])
        saved = Path(folder) if adapter == "default" else Path(folder) / adapter
        config = json.loads((saved / CONFIG).read_bytes())
        tensors = safetensors.torch.load((saved / WEIGHTS).read_bytes())
    return config, {_clean(key): tensor for key, tensor in tensors.items()}


def _peft_slots(model: nn.Module) -> dict[str, _Slot]:
    adapter, layers = _active_layers(model)
    slots = {}
    for name, layer in layers.items():
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        if adapter in layer.lora_variant or b.bias is not None:
            raise CheckpointError("model", "a plain LoRA adapter", f"{name} with a variant or a bias on lora_B")
        _check_unmerged(name, layer)
        slots[name] = _Slot(a.weight, b.weight, layer.scaling[adapter], layer)
    return slots
