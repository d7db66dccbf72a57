"""disable_adapters: a context in which a model computes as if it had no adapters."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .. import checks
from ..layers.find import ADAPTER_LAYERS, AdapterLayer, adapter_layers
from ..layers.hooks import offloads
from ..layers.merge_log import holder
from .change_report import Report

_lock = threading.RLock()
# module → how many running contexts disable it, and what enables it again.
_disabled: weakref.WeakKeyDictionary[nn.Module, tuple[int, Callable[[], object]]] = weakref.WeakKeyDictionary()


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[Report]:
    """Disables all adapters of a model while the context runs, as the reference model of DPO and KL penalties needs it:
    ``with lf.disable_adapters(model): reference = model(**batch)``.

    Layers of ours and PEFT's layers, with ``modules_to_save``, are disabled. Merged layers are unmerged meanwhile and
    merged again at the end. Contexts may be nested, and may overlap in several threads: a model's adapters are enabled
    when its last context ends, also by an exception. They are disabled for all threads, because nn.DataParallel runs
    forwards in its own. A backward pass that runs the forward again (activation checkpointing) belongs in the context.
    A compiled model is compiled once more, for the state without adapters. A copy of the model that is made meanwhile
    has its own adapters enabled if they are layers of ours.

    Args:
        model: a model with our layers or with PEFT's, also compiled or under data parallelism.

    Yields:
        The layers disabled, and the reasons of those left alone.

    Raises:
        ArgumentError: no adapter, or a merged layer that cannot be unmerged. The model is then unchanged.
    """
    layers, report = adapter_layers(model), Report("disabled")
    for name, layer in layers.items():
        if not isinstance(layer, ADAPTER_LAYERS) and layer.disable_adapters and layer not in _disabled:
            report.left[name] = "disabled already"
        else:
            report.changed[name] = "computes its base layer alone"
    if not layers:
        raise checks.ArgumentError("model", "a model with adapters", "none")
    modules = [layers[name] for name in report.changed] + _auxiliary_modules(model)
    with ExitStack() as stack:
        with _lock:
            for module in modules:
                _enter(module)
                stack.callback(_leave, module)
        yield report


def _enter(module: AdapterLayer) -> None:
    with _lock:
        count, enable = _disabled.get(module, (0, None))
        _disabled[module] = (count + 1, enable or _disable(module))


def _leave(module: AdapterLayer) -> None:
    with _lock:
        count, enable = _disabled.pop(module)
        if count > 1:
            _disabled[module] = (count - 1, enable)
        else:
            enable()


def _disable(module: AdapterLayer) -> Callable[[], object]:
    """Disables one module and returns what enables it again, as it was."""
    merged = list(getattr(module, "merged_adapters", ()))  # of PEFT; a layer of ours has one adapter
    was_merged = getattr(module, "merged", False)
    if was_merged:
        if offloads(holder(module)):
            raise checks.ArgumentError("model", "an unmerged model where accelerate offloads it", "a merged layer")
        module.unmerge()
    restore_flags = _flags(module)
    _set_disabled(module, True)
    reference = weakref.ref(module)  # the module itself would keep the table's weak key alive

    def enable() -> None:
        module: Any = reference()
        _set_disabled(module, False)
        restore_flags(module)
        if was_merged:
            module.fold_() if isinstance(module, ADAPTER_LAYERS) else module.merge(adapter_names=merged)

    return enable


def _flags(module: AdapterLayer) -> Callable[[AdapterLayer], None]:
    """Returns a function that gives a module of PEFT the flags ``requires_grad`` of now. PEFT's ``disable_adapter``,
    inside the context, freezes the adapters and leaves them frozen, as it has not disabled them itself."""
    if isinstance(module, ADAPTER_LAYERS):
        return lambda module: None
    active = list(module.active_adapters)
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    def restore(module: AdapterLayer) -> None:
        if active == list(module.active_adapters):  # PEFT gives an adapter that it activates flags of its own
            for parameter, flag in flags:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)

    return restore


def _set_disabled(module: AdapterLayer, disabled: bool) -> None:
    if isinstance(module, ADAPTER_LAYERS):
        module.set_disabled_(disabled)
    else:  # PEFT's enable_adapters would also change which parameters require gradients
        module._disable_adapters = disabled


def _auxiliary_modules(model: nn.Module) -> list[nn.Module]:
    """Returns PEFT's wrappers around modules that an adapter trains as a whole or in part, which are enabled."""
    if "peft" not in sys.modules:
        return []
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return [module for module in wrappers if module in _disabled or not module.disable_adapters]
