"""The tensors that an adapter's files contain beside the adapters, in models without PEFT's wrappers.

Saved are the heads of classification tasks, which no pretrained model has, every module that was trained beside the
adapters, and the embeddings of a vocabulary that was resized. PEFT has the first two as its ``modules_to_save``. Of a
head that has adapters itself, the frozen parameters are saved, under the keys that PEFT gives adapted embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import CheckpointError
from ..layers.find import ADAPTER_LAYERS, key_name
from ..layers.hooks import stored_tensor
from ..surgery import tasks
from ..surgery.merge import weight_owners
from . import io, peft_state
from .peft_format import ORIGINAL, PREFIX, Adapter
from .peft_state import PeftAdapter, is_of_peft

MARK = "saved_with_adapter"  # attribute of a module that load_adapter has filled, so that it is saved again
BASE = ".base_layer."  # in the key of a frozen parameter of an adapter's layer


def to_save(model: nn.Module) -> dict[str, nn.Module]:
    """Returns name → module of every module that is saved whole.

    Raises:
        CheckpointError: a trained parameter that PEFT's format cannot hold, because its module contains an adapter or
            is the whole model.
    """
    chosen = {name: module for name, module in model.named_modules() if MARK in module.__dict__ or _trained(module)}
    chosen |= {name: head for name, head in tasks.heads(model).items() if not _has_adapters(head)}
    return _by_names(dict(model.named_modules()), chosen)


def beside_peft(adapter: PeftAdapter, saved: dict[str, Tensor]) -> dict[str, nn.Module]:
    """Returns name → module of every module beside the adapter of PEFT's layers that is saved whole: the heads of a
    classification task and what was trained without PEFT's knowledge. PEFT's own model saves what PEFT saves alone.

    Args:
        saved: the tensors that PEFT saves.

    Raises:
        CheckpointError: a trained parameter that PEFT's format cannot hold.
    """
    if adapter.is_of_peft_model:
        return {}
    modules, known = adapter.modules(), {tensor.data_ptr() for tensor in saved.values()}
    chosen = [key_name(name) for name, head in tasks.heads(adapter.model).items() if not _has_adapters(head)]
    for name, module in modules.items():
        trained = [getattr(module, role).data_ptr() for role in _trained(module)]
        if not is_of_peft(module) and (MARK in module.__dict__ or not known.issuperset(trained)):
            chosen.append(name)
    return _by_names(modules, chosen)


def named_in(own: PeftAdapter, adapter: Adapter) -> dict[str, nn.Module]:
    """Returns name → module of the modules that are saved whole in an adapter's file and that PEFT has not wrapped in a
    model with PEFT's layers."""
    ends = tuple(adapter.config.get("modules_to_save") or ())
    if own.is_of_peft_model or not ends:
        return {}
    return {name: part for name, part in own.modules().items() if name.endswith(ends) and not _has_adapters(part)}


def states(modules: dict[str, nn.Module], writable: bool = False) -> dict[str, Tensor]:
    """Returns key without the prefix → tensor of modules, by their names."""
    return {
        f"{name}.{key_name(key)}": tensor
        for name, module in modules.items()
        for key, tensor in peft_state.state(module, writable).items()
    }


def _by_names(modules: dict[str, nn.Module], chosen: Iterable[str]) -> dict[str, nn.Module]:
    """Returns name → module of those that PEFT takes for these ``modules_to_save``: every one whose name ends with one
    of them, without what is inside of another."""
    ends = tuple(chosen)
    taken = {name: module for name, module in modules.items() if ends and name.endswith(ends)}
    for name, module in taken.items():
        if not name or _has_adapters(module):
            expected = "no trained parameters but those of adapters and of modules without any (PEFT's modules_to_save)"
            raise CheckpointError(
                "model", expected, f"{', '.join(_trained(module)) or 'adapters'} in {name or 'itself'}"
            )
    inner = {name for name in taken for outer in taken if name.startswith(f"{outer}.")}
    return {name: module for name, module in taken.items() if name not in inner}


def tensors(model: nn.Module, modules: Iterable[str]) -> dict[str, Tensor]:
    """Returns key without the prefix → tensor of the modules that are saved whole, of heads that have adapters and of
    embeddings that were resized."""
    names = [*modules, *(name for name, head in tasks.heads(model).items() if _has_adapters(head))]
    if tasks.vocabulary_was_resized(model):
        names += tasks.embeddings(model)
    beside: dict[str, Any] = {}
    for key, (owner, attribute) in _places(model, names).items():
        if isinstance(owner, ADAPTER_LAYERS):
            name = key.removesuffix(f".{attribute}")
            beside[f"{name}{BASE}{attribute}"] = stored_tensor(owner, attribute)
        else:
            beside[key] = stored_tensor(owner, attribute)
    return beside


def task_fields(model: nn.Module) -> dict:
    """Returns the config's fields by which PEFT finds the model's class: its task type, or the class itself where there
    is none, and where the head has adapters, because PEFT expects a head without."""
    task = tasks.task_type(model)
    if task is None or head_is_adapted(model):
        return {"task_type": None, "auto_mapping": peft_state.auto_mapping(model)}
    return {"task_type": task, "auto_mapping": None}


def head_is_adapted(model: nn.Module) -> bool:
    """Returns whether a head of a classification task has adapters."""
    return any(map(_has_adapters, tasks.heads(model).values()))


def destinations(model: nn.Module, adapter: Adapter) -> tuple[list[tuple[str, Tensor, Tensor]], list[nn.Module]]:
    """Returns where the tensors beside the adapter's pairs belong in a model without PEFT's layers.

    Returns:
        (key, tensor of the model, value) of each; the modules of ``modules_to_save``.

    Raises:
        CheckpointError: a tensor of something else than such a module, an embedding or a head, or a missing one.
    """
    ends = tuple(adapter.config.get("modules_to_save") or ())
    chosen = {name: module for name, module in model.named_modules() if ends and key_name(name).endswith(ends)}
    frozen = {f"{name}{BASE}weight": weight for name, weight in adapter.base_weights.items()}
    originals = {key.replace(ORIGINAL, "."): value for key, value in adapter.others.items() if ORIGINAL in key}
    # A model without PEFT's wrappers has one place for an embedding's trained values and for its original.
    values = originals | {key: value for key, value in adapter.others.items() if ORIGINAL not in key} | frozen
    places = _places(model, [*chosen, *tasks.heads(model), *tasks.embeddings(model)])
    copies = []
    for key, value in values.items():
        place = places.get(key.replace(BASE, "."))
        if place is not None:
            copies.append((key, io.destination(key, *place), value))
        elif key not in frozen:  # the base weights are compared with the model's (base_weights.check)
            expected = (
                "lora_A and lora_B of linear layers, modules_to_save and embeddings (a PEFT model loads the others)"
            )
            raise CheckpointError(f"key {PREFIX}{key}", expected, "an extra key")
    _check_shared(model, copies, tuple(f"{key_name(name)}." for name in chosen))
    for key in _places(model, chosen):
        if key not in values:
            raise CheckpointError(f"key {PREFIX}{key}", "in the file, for modules_to_save", "missing")
    return copies, list(chosen.values())


def _check_shared(model: nn.Module, copies: list[tuple[str, Tensor, Tensor]], trained: tuple[str, ...]) -> None:
    """Raises CheckpointError if a parameter that several modules hold has more than one value in the file, or one for
    only some of these modules of which PEFT has trained a copy (its key starts with one of ``trained``)."""
    owners, values = weight_owners(model), {key.replace(BASE, "."): value for key, _, value in copies}
    for key, tensor, value in copies:
        attribute = key.rpartition(".")[2]
        names = [f"{key_name(name)}.{attribute}" for name in owners.get(id(tensor), ())]
        # PEFT restores the others in the base model, where modules share them.
        is_copy = bool(trained) and key.startswith(trained)
        same = all(torch.equal(values[name], value) if name in values else not is_copy for name in names)
        unchanged = tensor.shape == value.shape and torch.equal(tensor.cpu(), value.to(tensor.dtype))
        if len(names) > 1 and not same and not (is_copy and unchanged):
            expected = "a parameter of its own in the model, for its trained values"
            raise CheckpointError(f"key {PREFIX}{key}", expected, f"one held by {' and '.join(names)}")


def _places(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    """Returns key without the prefix → module and attribute, of every tensor that the ``state_dict`` of these modules
    has, without those of adapters."""
    places = {}
    for root in names:
        for name, module in model.get_submodule(root).named_modules(prefix=root):
            stored = {**module._parameters, **module._buffers}
            if isinstance(module, ADAPTER_LAYERS):
                stored = {"weight": module.weight, "bias": module.bias}
            for attribute, tensor in stored.items():
                if tensor is not None and attribute not in module._non_persistent_buffers_set:
                    places[f"{key_name(name)}.{attribute}"] = (module, attribute)
    return places


def _trained(module: nn.Module) -> list[str]:
    """Returns the names of the module's own trained parameters that are no adapter's. FSDP1's flat parameters and
    shards do not count."""
    adapters = module.TRAINABLE if isinstance(module, ADAPTER_LAYERS) else ()
    parameters = {name: p for name, p in module._parameters.items() if type(p) is nn.Parameter and name not in adapters}
    return [name for name, parameter in parameters.items() if parameter.requires_grad]


def _has_adapters(module: nn.Module) -> bool:
    return any(isinstance(part, ADAPTER_LAYERS) or is_of_peft(part) for part in module.modules())
