"""Saves a model's adapter to a folder in PEFT's format and loads one back, bit for bit in both directions.

Saving collects what the files contain, then writes it. Loading reads the files, plans every write with all checks, then
applies the plan. An adapter whose training changed the frozen weights (ScaLoRA) is saved together with the changes:
``layers/merge_log.py`` keeps them, ``peft_format.py`` defines how the files represent them.

NB-LoRA and SingLoRA layers train other parameters in place of a and b, from which they compute a and b. This package
calls them free parameters and stores them in a file of their own, the sidecar (``sidecar.py``).
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from ..checks import CheckpointError
from ..layers.base import AdapterLinear
from ..layers.find import ADAPTER_LAYERS, AdapterLayer, PeftLayer, key_name, peft_layers
from ..surgery import targets
from ..surgery.change_report import Report
from . import base_weights, folder, io, load_plan, peft_format, sidecar
from .peft_format import CONFIG, PREFIX, WEIGHTS


def save_adapter(model: nn.Module, path: str | os.PathLike, *, exact: bool = False) -> Report:
    """Writes the model's adapter into a folder in PEFT's format: ``adapter_config.json``,
    ``adapter_model.safetensors``.

    The adapter is that of our layers, or the active one of a PeftModel. If ranks or scales differ between layers, the
    config gets a rank_pattern and an alpha_pattern. NB-LoRA's and SingLoRA's adapters are saved as the plain adapters
    that they equal at this step: the saved lora_B contains every factor of theirs but alpha / r, for example SingLoRA's
    warm-up. Their free parameters are saved in a third file, the sidecar, which ``load_adapter`` reads. Each file is
    replaced atomically and synced to disk.

    Where training has merged terms into frozen weights (ScaLoRA), the adapter fits no other base. The changes are then
    saved in the same files, in the form that ``ScaLoRA(keep=…)`` chose, and the report names them:

    - Whole weights, bit for bit, at their full size. PEFT restores them by itself. vLLM refuses such a file and
      llama.cpp's converter drops the weights, so give those programs the merged model.
    - The merged terms, as further ranks of the adapter. PEFT, and a server that allows the rank, read a plain adapter
      of a larger rank. A 16-bit weight is restored only up to rounding (stochastic rounding is not repeated).

    ``load_adapter`` restores both in the weights. PEFT does not save them again, so load with ``load_adapter`` to
    train further. To save a model without any adapter, use ``unload_`` or, with PEFT, ``merge_and_unload``, and the
    model's own ``state_dict`` or ``save_pretrained``; these contain the changed weights.

    Args:
        model: a model with our layers or a PeftModel, also compiled or under data parallelism.
        path: the folder, which is created if it does not exist.
        exact: whether whole weights are saved even where terms were kept, and the terms beside them. Training then
            continues to the same bits after ``load_adapter``, as a checkpoint needs. A subclass of transformers'
            Trainer needs two overrides (``lf.hf.ExactCheckpoints`` has both): ``_save(output_dir, state_dict)`` calls
            this function after ``super()._save``, whose two files it replaces; ``_load_from_checkpoint(folder, model)``
            calls ``load_adapter`` instead of ``super()``'s.

    Returns:
        The layers saved; the note of the report describes the changed weights.

    Raises:
        CheckpointError: no adapter; more than one active adapter; adapters without data (meta device) or sharded; a
            changed weight that the adapter has no layer on, that PEFT has merged, or that is one parameter of many
            experts (``load_adapter`` reads no such adapter); a path that cannot be written. An adapter that was in the
            folder is then unchanged.
    """
    layers, contents = _collect(_unwrap(model), exact)
    folder.write(path, contents)
    return Report("saved", dict.fromkeys(layers, os.fspath(path)), note=base_weights.note(contents.changes, "saved"))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> Report:
    """Loads an adapter folder that ``save_adapter`` or PEFT wrote into the model, in place.

    A model with our layers, or a PEFT model (its active adapter), must have the layers, ranks and scales of the files;
    its parameters keep their identity. In a plain model, the layers of the files first replace its linear layers, as
    ``inject_`` does. The free parameters of ``NBLoRALinear`` and ``SingLoRALinear`` layers are restored bit for bit
    from the sidecar, whose settings must be those of the layers (norm, bound and learn_scale; alpha and ramp_steps).
    If there is no sidecar, ``NBLoRALinear`` layers get the free parameters that give the same product as the plain
    adapter, which must be within their bound.

    Frozen weights that the adapter's training changed are restored: whole weights bit for bit, terms by adding them to
    the model's weights, which must be the unchanged ones. Everything is checked before the model is changed.

    Args:
        model: a model with our layers, a PEFT model, or a plain model; also compiled or under data parallelism.
        path: the folder.

    Returns:
        The layers loaded; the note of the report describes the frozen weights that were restored.

    Raises:
        CheckpointError: the files cannot be read, are damaged, use PEFT features beyond plain LoRA, or do not fit the
            model: a missing or extra key, a shape, a scale, a dtype that would lose bits, a bound, a sharded parameter,
            a base weight that training has changed already or that other modules share. The model is then unchanged.
    """
    model = _unwrap(model)
    with_peft = bool(peft_layers(model))  # PEFT's layers train a and b, so they need no sidecar
    adapter, free = folder.read(path, with_sidecar=not with_peft)
    if with_peft:
        active, layers = _active_layers(model)
        plan = load_plan.into_peft_layers(model, layers, active, adapter)
    elif layers := _our_layers(model):
        plan = load_plan.into_our_layers(model, layers, adapter, free)
    else:
        plan = load_plan.into_plain_model(model, adapter, free)
    plan.apply_(model)
    shapes = {name: f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}" for name, (a, b) in adapter.pairs.items()}
    return Report("loaded", shapes, note=base_weights.note(adapter.changes, "restored"))


def _unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside the wrappers of torch.compile and data parallelism."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return _unwrap(model.module)
    compiled = getattr(model, "_orig_mod", None)  # the attribute in which torch.compile keeps the model
    return model if compiled is None else _unwrap(compiled)


def _our_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """Returns bare name → layer, for the layers of this library."""
    if isinstance(model, ADAPTER_LAYERS):
        expected = "a module that contains adapter layers (their names become the keys)"
        raise CheckpointError("model", expected, f"a single {type(model).__name__}")
    return {key_name(name): module for name, module in model.named_modules() if isinstance(module, ADAPTER_LAYERS)}


def _active_layers(model: nn.Module) -> tuple[str, dict[str, PeftLayer]]:
    """Returns the active adapter of a PEFT model, and its LoRA layers by their bare names in the base model."""
    from peft import PeftModel

    layers = peft_layers(model)
    active = {adapter for layer in layers.values() for adapter in layer.active_adapters}
    if len(active) != 1:
        raise CheckpointError("model", "one active adapter", ", ".join(sorted(active)) or "none")
    adapter = active.pop()
    prefix = PREFIX if isinstance(model, PeftModel) else ""
    holding = {name: layer for name, layer in layers.items() if adapter in getattr(layer, "lora_A", ())}
    return adapter, {key_name(name).removeprefix(prefix): layer for name, layer in holding.items()}


def _collect(model: nn.Module, exact: bool) -> tuple[dict[str, AdapterLayer], folder.Contents]:
    """Returns the layers that are saved, by name, and the contents of the files."""
    if peft_layers(model):
        adapter, layers = _active_layers(model)
        (config, tensors), free = _peft_files(model, adapter), {}
    elif layers := _our_layers(model):
        config, tensors = _config(model, layers), {}
        for name, layer in layers.items():
            for factor in ("lora_A", "lora_B"):
                tensors[f"{PREFIX}{name}.{factor}.weight"] = io.to_host(f"{name}.{factor}", getattr(layer, factor))
        free = sidecar.collect(layers)
    else:
        raise CheckpointError("model", "LoRA layers (lf.inject_, or PEFT)", f"{type(model).__name__} without any")
    return layers, folder.Contents(config, tensors, base_weights.collect(model, layers, exact), free)


def _peft_files(model: nn.Module, adapter: str) -> tuple[dict, dict[str, Tensor]]:
    """Returns the config and the tensors that PEFT's own save_pretrained writes for an adapter."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise CheckpointError("model", "a PeftModel or LoRALinear layers", f"PEFT layers in a {type(model).__name__}")
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, selected_adapters=[adapter])
        saved = Path(temporary) if adapter == "default" else Path(temporary) / adapter
        config = json.loads((saved / CONFIG).read_bytes())
        tensors = safetensors.torch.load((saved / WEIGHTS).read_bytes())
    return config, {key_name(key): tensor for key, tensor in tensors.items()}


def _config(model: nn.Module, layers: dict[str, AdapterLinear]) -> dict:
    """Returns PEFT's config of these layers: the first one's rank and alpha, and patterns for those that differ."""
    use_rslora = all(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _alpha(layer, use_rslora) for name, layer in layers.items()}
    modules = [key_name(name) for name, _ in model.named_modules()]
    # A list of names would also select modules whose names end in one of them; a regular expression does not.
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


def _alpha(layer: AdapterLinear, use_rslora: bool) -> float:
    """Returns the alpha that gives the layer's scaling, also if its scaling was edited; an int if it is whole, as in
    PEFT's configs."""
    unit = math.sqrt(layer.r) if use_rslora else layer.r
    alpha = layer.alpha if layer.alpha / unit == layer.scaling else layer.scaling * unit
    return int(alpha) if float(alpha).is_integer() else alpha
