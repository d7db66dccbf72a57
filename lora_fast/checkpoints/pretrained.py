"""save_pretrained of transformers' models (and of others that have it) with adapter layers of ours.

The class's own method writes the adapters' tensors among the model's, and ``from_pretrained`` ignores them there: the
file loads without its adapters. Models with layers of ours therefore have an instance attribute ``save_pretrained``,
which ``Trainer``, ``push_to_hub`` and users call. It writes the adapter, as transformers does for PEFT's, or a plain
model once all layers are merged.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from .. import checks
from ..layers import merge_log
from ..layers.find import ADAPTER_LAYERS, bare_name
from ..quantized import family_of
from ..surgery import inject, unload
from . import io
from .adapter import save_adapter
from .peft_format import CONFIG

SAVE = "save_pretrained"
TRAINED = "model.safetensors"  # the name by which Trainer finds the weights of a checkpoint


class SaveHook:
    """``save_pretrained`` of one model, as an attribute of the instance, without a cycle of references."""

    def __init__(self, model: Any):
        self._model = weakref.ref(model)

    def __call__(self, save_directory: str | os.PathLike, *args, **kwargs) -> Any:
        return save_pretrained(self._model(), save_directory, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> SaveHook:  # the model is being copied
        model: Any = self._model()
        return SaveHook(memo.get(id(model), model))

    def __reduce__(self) -> tuple:
        return SaveHook, (self._model(),)


def save_pretrained(model: Any, save_directory: str | os.PathLike, *args, **kwargs) -> Any:
    """Writes a model with layers of ours into a folder. It replaces the instance's ``save_pretrained``.

    - If all layers are merged: the plain model with the merged weights, by the class's own method.
    - Else: the adapter in PEFT's format, by ``lf.save_adapter``. To a caller that passes ``state_dict``, as Trainer
      does, the file ``model.safetensors`` with everything but the frozen weights is written as well. Trainer resumes
      from it. As it has no frozen weight and there is no ``config.json``, ``from_pretrained`` takes the folder for an
      adapter.

    Args:
        save_directory: the folder.
        args, kwargs: those of the class's method; for an adapter only ``is_main_process`` and ``state_dict`` matter.

    Returns:
        The report of ``lf.save_adapter``, or what the class's method returns.

    Raises:
        CheckpointError: as ``lf.save_adapter``. A caller that passes ``state_dict`` gets a warning instead.
        ArgumentError: ``push_to_hub`` for an adapter (``model.push_to_hub`` uploads it); a merged model whose class
            takes no ``state_dict`` (use ``lf.unload_``), or a folder with an adapter for a merged model.
    """
    method = getattr(type(model), SAVE)
    layers = [module for module in model.modules() if isinstance(module, ADAPTER_LAYERS)]
    if not layers:
        return method(model, save_directory, *args, **kwargs)
    call = inspect.signature(method).bind(model, save_directory, *args, **kwargs)
    state = call.arguments.get("state_dict")
    if all(layer.not_unmergeable() is None for layer in layers):
        if "state_dict" not in call.signature.parameters:
            raise checks.ArgumentError("model", "an unmerged or a plain model (lf.unload_)", "merged layers")
        if Path(save_directory, CONFIG).exists():
            expected = f"a folder without {CONFIG}, because from_pretrained would add that adapter to the merged model"
            raise checks.ArgumentError("save_directory", expected, os.fspath(save_directory))
        call.arguments["state_dict"] = plain_state(model, model.state_dict() if state is None else state)
        return method(*call.args, **call.kwargs)
    if call.arguments.get("push_to_hub"):
        raise checks.ArgumentError("push_to_hub", "False for an adapter; model.push_to_hub(repo_id) uploads it", "True")
    if not call.arguments.get("is_main_process", True):
        return None
    if "state_dict" not in call.arguments:
        return save_adapter(model, save_directory)
    # First, because a Trainer's checkpoint must not be lost.
    _write_trained(model, save_directory, model.state_dict() if state is None else state)
    try:
        return save_adapter(model, save_directory)
    except checks.CheckpointError as error:
        warnings.warn(f"lora_fast: {save_directory} has {TRAINED} for Trainer, but no adapter: {error}", stacklevel=2)
        return None


def plain_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state_dict of the plain model that a model with merged layers of ours equals."""
    layers = {bare_name(name): x for name, x in model.named_modules() if isinstance(x, ADAPTER_LAYERS)}
    adapters = {f"{name}.{role}" for name, layer in layers.items() for role in (*layer.TRAINABLE, *layer.SAVED_STATE)}
    merged = {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}
    return {key: merged.get(key, tensor) for key, tensor in state.items() if key not in adapters}


def hook_(model: nn.Module) -> None:
    """Gives every module that has ``save_pretrained`` and contains layers of ours the function above, as an
    attribute of the instance, which deepcopy and pickle keep, and the model the hook below. A quantised model of
    transformers counts as one that can be trained. Where no layer of ours is left, all of this is undone."""
    hooks = model._state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is warn_of_outer_model]:
        del hooks[key]
    if _has_layers(model):
        model.register_state_dict_pre_hook(warn_of_outer_model)
    for module in model.modules():
        if not callable(getattr(type(module), SAVE, None)):
            continue
        if isinstance(module.__dict__.get(SAVE), SaveHook):
            del module.__dict__[SAVE]
        if SAVE not in module.__dict__ and _has_layers(module):
            module.__dict__[SAVE] = SaveHook(module)
        if "is_quantized" in module.__dict__ and getattr(module, "hf_quantizer", None) is not None:
            # Trainer refuses quantised models without adapters, and knows no adapters but PEFT's.
            module.is_quantized = not _has_layers(module)  # type: ignore[assignment]


def warn_of_outer_model(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Warns when a model around this one, which ``inject_`` does not know, runs its class's ``save_pretrained``. That
    writes the adapters under keys that ``from_pretrained`` ignores. A hook of ``state_dict``, which it calls."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        outer = frame.f_locals.get("self") if frame.f_code.co_name == SAVE else None
        if isinstance(outer, nn.Module) and not isinstance(outer.__dict__.get(SAVE), SaveHook):
            text = (
                f"from_pretrained will not read the adapters from what {type(outer).__name__}.save_pretrained writes, "
            )
            text += "because lf.inject_ got a module inside of that model: lf.save_adapter writes them"
            warnings.warn(f"lora_fast: {text}", stacklevel=2)
            return
        frame = frame.f_back


def _has_layers(model: nn.Module) -> bool:
    return any(isinstance(module, ADAPTER_LAYERS) for module in model.modules())


def _write_trained(model: nn.Module, folder: str | os.PathLike, state: dict[str, Tensor]) -> None:
    """Writes everything but the frozen weights that training has not changed."""
    frozen = {bare_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, ADAPTER_LAYERS):
            frozen -= {bare_name(f"{name}.{role}") for role in (*module.TRAINABLE, *module.SAVED_STATE)}
        if merge_log.is_changed(module):
            frozen.discard(bare_name(f"{name}.weight"))
        base = module.base if isinstance(module, ADAPTER_LAYERS) else module
        if base is not None and family_of(base) is not None:  # its library stores scales beside the weight
            stored: dict[str, Tensor] = {}
            base._save_to_state_dict(stored, f"{name}.", False)
            frozen |= {bare_name(key) for key in stored}
    kept = {name: io.to_host(name, tensor).contiguous().clone() for name, tensor in state.items() if name not in frozen}
    io.write(folder, {TRAINED: lambda path: safetensors.torch.save_file(kept, path, metadata={"format": "pt"})})


inject.AFTER_PLACING.append(hook_)
unload.AFTER_UNLOADING.append(hook_)
