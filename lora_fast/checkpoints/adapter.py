"""Saves a model's adapter to a folder in PEFT's format and loads one back, bit for bit in both directions.

Saving collects what the files contain, checks it as loading would, then writes it. Loading reads the files, plans every
write with all checks, then applies the plan. An adapter whose training changed the frozen weights (ScaLoRA) is saved
together with the changes: ``layers/merge_log.py`` keeps them, ``peft_format.py`` defines how the files represent them.

NB-LoRA and SingLoRA layers train other parameters in place of a and b, from which they compute a and b. This package
calls them free parameters and stores them in a file of their own, the sidecar (``sidecar.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .. import checks
from ..checks import CheckpointError
from ..layers.base import AdapterLinear
from ..layers.dora_linear import DoRALinear
from ..layers.find import ADAPTER_LAYERS, key_name, peft_layers
from ..layers.hooks import is_offloaded, loaded
from ..surgery.change_report import Report
from . import (
    base_weights,
    folder,
    io,
    load_plan,
    peft_config,
    peft_format,
    peft_names,
    peft_plan,
    peft_state,
    quantization,
    sidecar,
    training_state,
    whole_modules,
)
from .folder import Contents
from .peft_format import MAGNITUDE, PREFIX, Change
from .sidecar import FreeLayer


def save_adapter(model: nn.Module, path: str | os.PathLike, *, exact: bool = False) -> Report:
    """Writes the model's adapter into a folder in PEFT's format: ``adapter_config.json``,
    ``adapter_model.safetensors``.

    The adapter is that of our layers, or the active one of PEFT's layers with everything that PEFT saves of it: in a
    PeftModel or without one, as after ``peft.inject_adapter_in_model`` or the ``add_adapter`` of transformers,
    diffusers and sentence-transformers. The names in the files are those in the model that is passed. If ranks or
    scales differ between layers, the config gets a rank_pattern and an alpha_pattern. NB-LoRA's and SingLoRA's
    adapters are saved as the plain adapters that they equal at this step: the saved lora_B contains every factor of
    theirs but alpha / r, for example SingLoRA's warm-up. Their free parameters are saved in a third file, the sidecar,
    which ``load_adapter`` reads. Each file is replaced atomically and synced to disk.

    Without a PeftModel the files also contain what else the pretrained model does not have: the head of a
    classification task, modules that were trained beside the adapters (as PEFT's ``modules_to_save``), and the
    embeddings of a vocabulary that was resized. With our layers the config has the model's task, so that PEFT's
    ``AutoPeftModelFor…`` opens the folder.

    A merged model is saved as if it were not merged. Of a model that accelerate has offloaded, the values in the CPU's
    memory or on the disk are saved. Beside the factors of a layer over a quantised weight, the file has the name of the
    weight's format, where PEFT does not look, and ``load_adapter`` compares it.

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
        model: a model with our layers or PEFT's, also compiled or under data parallelism.
        path: the folder, which is created if it does not exist.
        exact: whether whole weights are saved even where terms were kept, and the terms beside them. Training then
            continues to the same bits after ``load_adapter``, as a checkpoint needs. ``lf.hf.ExactCheckpoints`` does
            this in transformers' Trainer.

    Returns:
        The layers and modules saved; the note of the report describes the changed weights. Further names of a layer
        that the model holds several times are left: PEFT, which reads the files, puts an adapter under the first alone.

    Raises:
        CheckpointError: no adapter; adapters of PEFT beside ours; more than one active adapter; one without a config
            (``peft_config`` of the model or of a part), or with configs of several parts that differ in more than
            modules, ranks and scales; adapters without data (meta device) or sharded; a trained parameter that PEFT's
            files would not contain, or that is beside an adapter in one module; a changed weight that the adapter has
            no layer on, that PEFT has merged, or that is one parameter of many experts; a scale that is not finite; a
            path that cannot be written. What was in the folder is then unchanged.
    """
    model = _unwrap(model)
    names, contents, changes = _collect(model, exact)
    folder.write(path, contents)
    saved, note = dict.fromkeys(names, os.fspath(path)), base_weights.note(changes, "saved")
    return Report("saved", saved, _other_names(model), note)


def prepare_checkpoints(model: nn.Module, merges: bool) -> None:
    """Raises the CheckpointError, but for a path, that ``save_checkpoint`` would raise now or after training. If
    training changes frozen weights (``merges``), marks them, so that every checkpoint contains them."""
    model = _unwrap(model)
    training_state.collect(model)
    part = training_state.adapted_part(model)
    _collect(part, exact=True)
    if merges:
        layers = peft_state.find(part).layers if peft_layers(part) else _our_layers(part)
        base_weights.mark_changeable_(model, layers)


def save_checkpoint(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes into a checkpoint all that changes in training: ``save_adapter(…, exact=True)`` of the model that is
    adapted, where its own ``save_pretrained`` has written the active adapter, and a file with what is trained around it
    and with buffers.

    Raises:
        CheckpointError: as ``save_adapter``.
    """
    model = _unwrap(model)
    save_adapter(training_state.adapted_part(model), training_state.adapter_folder(model, path), exact=True)
    training_state.save(model, path)


def is_checkpoint(model: nn.Module, path: str | os.PathLike) -> bool:
    """Returns whether the folder contains what ``save_checkpoint`` writes."""
    return Path(training_state.adapter_folder(_unwrap(model), path), peft_format.CONFIG).is_file()


def load_checkpoint(model: nn.Module, path: str | os.PathLike) -> None:
    """Reads what ``save_checkpoint`` has written, and a PeftModel's other adapters, into the model.

    Raises:
        CheckpointError: as ``load_adapter``.
    """
    model = _unwrap(model)
    load_adapter(training_state.adapted_part(model), training_state.adapter_folder(model, path))
    training_state.load_other_adapters(model, path)
    training_state.load(model, path)


def load_adapter(model: nn.Module, path: str | os.PathLike, *, any_quantization: bool = False) -> Report:
    """Loads an adapter folder that ``save_adapter`` or PEFT wrote into the model, in place.

    A model with our layers, or with PEFT's (its active adapter), must have the layers, ranks and scales of the files;
    its parameters keep their identity. In a plain model, the layers of the files first replace its linear layers, as
    ``inject_`` does. A model with PEFT's layers, a PeftModel or not, loads every kind of LoRA adapter that it has
    itself (DoRA, biases, embeddings, experts, …). Models without PEFT's layers load plain adapters of linear layers,
    and put the values of PEFT's ``modules_to_save``, of heads and of resized embeddings into their own modules, rounded
    to the module's dtype, which the report then tells. Fields that the config does not have get PEFT's defaults.

    The free parameters of ``NBLoRALinear`` and ``SingLoRALinear`` layers are restored bit for bit
    from the sidecar, whose settings must be those of the layers (norm, bound and learn_scale; alpha and ramp_steps).
    If there is no sidecar, ``NBLoRALinear`` layers get the free parameters that give the same product as the plain
    adapter, which must be within their bound.

    Frozen weights that the adapter's training changed are restored: whole weights bit for bit, terms by adding them to
    the model's weights, which must be the unchanged ones. Everything is checked before the model is changed.

    Files that ``save_adapter`` wrote over quantised weights have each layer's format. A model whose weights are
    quantised otherwise is refused, because the adapter corrects the rounding of the weights that it was trained over.
    Over plain weights it is loaded with a warning: people do so to merge it, and the difference is that rounding alone.
    It is none after ``dequantize_`` of the model in which the adapter was trained.

    Args:
        model: a model with our layers, with PEFT's, or a plain model; also compiled or under data parallelism.
        path: the folder.
        any_quantization: load the adapter whatever its base was quantised to, without an error and without a warning.
            The report tells of the difference.

    Returns:
        The layers and modules loaded; the note of the report describes the frozen weights that were restored, and those
        that are quantised otherwise than in training.

    Raises:
        CheckpointError: the files cannot be read, are damaged, use PEFT features beyond what the model has, or do not
            fit it: a missing or extra key, a shape, a scale, a dtype in which an adapter would lose bits, a bound, a
            sharded parameter, one without data in memory (meta device, offloaded to the disk), a merged layer, a
            weight that training has changed already or that other modules share, or that is quantised to another format
            than in training. The model is then unchanged.
        ArgumentError: ``any_quantization`` is no bool.
    """
    checks.flag(any_quantization, "any_quantization")
    model = _unwrap(model)
    with_peft = bool(peft_layers(model))  # PEFT's layers train a and b, so they need no sidecar
    adapter, free = folder.read(path, with_sidecar=not with_peft)
    layers: Mapping[str, nn.Module]
    if with_peft:
        own = peft_state.find(model, writable=True)
        plan, layers = peft_plan.plan(own, adapter), own.layers
    elif layers := _our_layers(model):
        plan = load_plan.into_our_layers(model, layers, adapter, free)
    else:
        plan = load_plan.into_plain_model(model, adapter, free)
        modules = {key_name(name): module for name, module in model.named_modules()}
        layers = {name: module for name, module in modules.items() if name in adapter.pairs}
    otherwise = quantization.compare(adapter.quantized, layers, any_quantization)
    plan.apply_(model)
    shapes = {name: f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}" for name, (a, b) in adapter.pairs.items()}
    for name, restored in plan.others.items():
        shapes[name] = f"{shapes[name]}, {restored}" if name in shapes else restored
    notes = base_weights.note(adapter.changes, "restored"), otherwise
    return Report("loaded", shapes, note=". ".join(filter(None, notes)))


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


def _other_names(model: nn.Module) -> dict[str, str]:
    """Returns the further names of layers of ours that the model holds several times → the reason for the report."""
    first = {id(layer): name for name, layer in model.named_modules() if isinstance(layer, ADAPTER_LAYERS)}
    names = {name: first.get(id(module)) for name, module in model.named_modules(remove_duplicate=False)}
    return {
        name: f"{known} under another name, where PEFT will put no adapter"
        for name, known in names.items()
        if known not in (None, name)
    }


def _collect(model: nn.Module, exact: bool) -> tuple[list[str], Contents, dict[str, Change]]:
    """Returns the names of what is saved, the contents of the files, and the changes of frozen weights in them."""
    theirs, layers = peft_layers(model), _our_layers(model)
    if layers and theirs:
        got = f"both, as {next(iter(layers))} of lf.inject_ and {next(iter(theirs))} of PEFT"
        raise CheckpointError("model", "adapters of lf.inject_ alone or of PEFT alone", got)
    if theirs:
        return _collect_peft(model, exact)
    if not layers:
        raise CheckpointError("model", "LoRA layers (lf.inject_, or PEFT)", f"{type(model).__name__} without any")
    whole = whole_modules.to_save(model)
    tensors: dict[str, Tensor] = {}
    free: dict[str, FreeLayer] = {}
    for name, layer in layers.items():
        with loaded([layer] if is_offloaded(layer) else []):
            for factor in ("lora_A", "lora_B"):
                tensors[f"{name}.{factor}.weight"] = io.to_host(f"{name}.{factor}", getattr(layer, factor))
            if isinstance(layer, DoRALinear):
                tensors[f"{name}.{MAGNITUDE}"] = io.to_host(f"{name}.{MAGNITUDE}", layer.lora_magnitude_vector)
            free |= sidecar.collect({name: layer})
    beside = base_weights.unmerged(model, whole_modules.tensors(model, whole))
    tensors |= {key: io.to_host(key, tensor) for key, tensor in beside.items()}
    config, changes = (
        _config(model, layers, [key_name(name) for name in whole]),
        base_weights.collect(model, layers, exact),
    )
    contents = _contents(config, tensors, changes, free, quantization.formats(layers))
    load_plan.check_our_layers(layers, _parsed(contents))
    others = {key.rpartition(".")[0].removesuffix(".base_layer") for key in beside}
    return [*layers, *sorted(others - layers.keys())], contents, changes


def _collect_peft(model: nn.Module, exact: bool) -> tuple[list[str], Contents, dict[str, Change]]:
    """Does what ``_collect`` does for a model with PEFT's layers, whose files are those of PEFT's own
    save_pretrained."""
    adapter = peft_state.find(model)
    tensors = adapter.tensors(embeddings="auto")
    beside = whole_modules.beside_peft(adapter, tensors)
    tensors |= whole_modules.states(beside)
    peft_state.check_complete(adapter, tensors)
    tensors = {key: io.to_host(key, tensor) for key, tensor in base_weights.unmerged(model, tensors).items()}
    config, changes = peft_names.config(adapter, [*beside]), base_weights.collect(model, adapter.layers, exact)
    contents = _contents(config, tensors, changes, {}, quantization.formats(adapter.layers))
    parsed = _parsed(contents)
    peft_plan.plan_tensors(adapter, parsed)
    others = {key.rpartition(".")[0].partition(".lora_")[0].removesuffix(".base_layer") for key in parsed.tensors()}
    return [*adapter.layers, *sorted(others - adapter.layers.keys())], contents, changes


def _contents(
    config: dict,
    tensors: dict[str, Tensor],
    changes: dict[str, Change],
    free: dict[str, FreeLayer],
    formats: dict[str, str],
) -> Contents:
    """Returns the contents of the files, with the changes. ``tensors``: by their keys without the prefix."""
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
    metadata = peft_format.add_changes_(config, tensors, changes, formats)
    return Contents(config, tensors, metadata, free)


def _parsed(contents: Contents) -> peft_format.Adapter:
    """Returns the adapter that reading the contents would give."""
    return peft_format.parse(peft_config.checked(contents.config), contents.tensors, contents.metadata)


def _config(model: nn.Module, layers: dict[str, AdapterLinear], whole: list[str]) -> dict:
    """Returns PEFT's config of these layers: the first one's rank and alpha, and patterns for those that differ.

    Args:
        whole: names of the modules that are saved whole.
    """
    use_rslora = all(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {  # also of layers whose scaling was edited
        name: peft_config.alpha_of(float(layer.scaling), layer.r, use_rslora, layer.alpha)
        for name, layer in layers.items()
    }
    config = {
        "peft_type": "LORA",
        **whole_modules.task_fields(model),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "lora_dropout": next(iter(layers.values())).dropout_p,
        "target_modules": peft_config.target_names(layers, [key_name(name) for name, _ in model.named_modules()]),
        "use_rslora": use_rslora,
        "use_dora": any(isinstance(layer, DoRALinear) for layer in layers.values()),
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": whole or None,
    }
    peft_config.set_ranks(config, ranks, alphas)
    return config
