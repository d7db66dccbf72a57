"""The active adapter of a model with PEFT's layers: its tensors, scales and config, by the names that its files have.

PEFT keeps the config of an adapter, ``peft_config``, on the model that its layers are in. That is a PeftModel, or the
model given to ``peft.inject_adapter_in_model`` or to the ``add_adapter`` of transformers and diffusers. It may be a
part of the model that is saved, as transformers' model is one of a SentenceTransformer. The names in the files are
those in the model that is saved, without the names that PEFT's own wrappers add.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .. import checks
from ..checks import CheckpointError
from ..layers.find import PeftLayer, key_name, peft_layers
from ..layers.hooks import stored_tensor
from ..surgery import tasks
from . import peft_config
from .peft_format import ORIGINAL, PREFIX

Embeddings = bool | Literal["auto"]


@dataclass
class Owner:
    """A module on which PEFT keeps configs for the layers inside.

    Attributes:
        name: the module's name in the model, as files have it; empty for the model itself.
        wrapper: what PEFT adds to the names inside the module, if it is PEFT's own.
        state: the tensors of its ``state_dict``.
        configs: the configs of the adapter that are kept on it and on modules inside of it.
    """

    module: Any
    name: str
    wrapper: str
    state: dict[str, Tensor]
    configs: list[Any]

    @property
    def base(self) -> nn.Module:
        """Returns the model without PEFT's wrapper."""
        if self.wrapper == PREFIX:
            return self.module.base_model.model
        return self.module.model if self.wrapper else self.module

    def name_of(self, inner: str) -> str:
        """Returns the name in the model of what is called ``inner`` in the base model."""
        return f"{self.name}.{inner}".strip(".")


@dataclass
class PeftAdapter:
    """The active adapter of a model.

    Attributes:
        name: the adapter's name.
        owners: the modules that have its config.
        layers: the layers that have its lora_A and lora_B, by the layers' names in the files.
        scalings: the scaling of each layer that has the adapter, by the name that PEFT's patterns are matched with: the
            layer's or, for a layer of ``target_parameters``, the parameter's.
        ranks: the rank of each, by the same names.
        parameters: those of these names that are parameters'.
        others: the names of the model's other adapters.
    """

    model: nn.Module
    name: str
    owners: list[Owner]
    layers: dict[str, PeftLayer]
    scalings: dict[str, float]
    ranks: dict[str, int]
    parameters: set[str]
    others: tuple[str, ...]

    @property
    def is_of_peft_model(self) -> bool:
        """Returns whether the model is one of PEFT's own, whose files are those of its save_pretrained."""
        return bool(self.owners[0].wrapper) and not self.owners[0].name

    def key(self, name: str) -> str:
        """Returns the name in the files of a module or tensor of the model."""
        return _key(self.owners, name)

    def modules(self) -> dict[str, nn.Module]:
        """Returns the modules that the model has without PEFT, or PEFT's in their places, by their names in the
        files."""
        of_peft = [module for module in self.model.modules() if is_of_peft(module)]
        inner = {id(part) for module in of_peft for part in module.modules() if part is not module}
        return {self.key(name): part for name, part in self.model.named_modules() if id(part) not in inner}

    def of_others(self, name: str) -> bool:
        """Returns whether a parameter of this name belongs to another adapter."""
        return any(f".{other}." in f"{name}." for other in self.others)

    def tensors(self, embeddings: Embeddings) -> dict[str, Tensor]:
        """Returns the tensors that PEFT saves of the adapter, by their keys in the file without the prefix.

        Args:
            embeddings: PEFT's ``save_embedding_layers``: "auto" adds the embeddings where they are adapted or resized.
        """
        from peft import get_peft_model_state_dict

        found: dict[str, Tensor] = {}
        for owner in self.owners:
            state = {key: tensor for key, tensor in owner.state.items() if not self.of_others(key)}
            known = owner.configs[0].base_model_name_or_path  # which inject_adapter_in_model does not set
            resized = embeddings == "auto" and not known and tasks.vocabulary_was_resized(owner.base)
            saved = get_peft_model_state_dict(
                owner.module, state, self.name, save_embedding_layers=True if resized else embeddings
            )
            found |= {self.key(owner.name_of(key)): tensor for key, tensor in saved.items()}
        return found

    def restorable(self) -> dict[str, Tensor]:
        """Returns the tensors that PEFT restores in the base model from an adapter's file, by their keys without the
        prefix and ``original_module``: of embeddings, which may be adapted or have been resized, and of heads of
        classification tasks."""
        found: dict[str, Tensor] = {}
        adapted = [f"{name}.base_layer." for name in self.scalings if name not in self.layers]
        for owner in self.owners:
            inner = [*tasks.embeddings(owner.base), *tasks.heads(owner.base)]
            names = (*adapted, *(f"{owner.name_of(key_name(name))}." for name in inner))
            short = {self.key(owner.name_of(key)): tensor for key, tensor in owner.state.items()}
            found |= {key: t for key, t in short.items() if names and key.startswith(names) and ".lora_" not in key}
        return {key.replace(ORIGINAL, "."): tensor for key, tensor in found.items()}


def find(model: nn.Module, writable: bool = False) -> PeftAdapter:
    """Returns the active adapter of a model with PEFT's layers.

    Args:
        writable: leave out what accelerate has offloaded to the disk (``hooks.stored_tensor``).

    Raises:
        CheckpointError: several active adapters, one without a config, or one of another method than LoRA.
    """
    layers = peft_layers(model)
    active = {adapter for layer in layers.values() for adapter in layer.active_adapters}
    if len(active) != 1:
        raise CheckpointError("model", "one active adapter", ", ".join(sorted(active)) or "none")
    adapter = active.pop()
    owners = _owners(model, adapter, writable)
    owned = {id(module) for owner in owners for module in owner.module.modules()}
    holding = {name: layer for name, layer in layers.items() if adapter in getattr(layer, "scaling", ())}
    lost = next((name for name, layer in holding.items() if id(layer) not in owned), None)
    if lost is not None or not owners:
        expected = f"PEFT's config of the adapter {adapter!r}, in peft_config of the model or of a part that it adapts"
        raise CheckpointError("model", expected, f"none for {lost or next(iter(layers))}")
    matched = {_matched_name(_key(owners, name), layer): layer for name, layer in holding.items()}
    pairs = {_key(owners, name): layer for name, layer in holding.items() if adapter in getattr(layer, "lora_A", ())}
    present = {name for layer in layers.values() for name in getattr(layer, "scaling", ())}
    present |= {name for owner in owners for name in owner.module.peft_config}
    return PeftAdapter(
        model,
        adapter,
        owners,
        pairs,
        scalings={name: float(layer.scaling[adapter]) for name, layer in matched.items()},
        ranks={name: layer.r[adapter] for name, layer in matched.items()},
        parameters={name for name, layer in matched.items() if hasattr(layer, "parameter_name")},
        others=tuple(sorted(present - {adapter})),
    )


def own_configs(module: Any) -> dict[str, Any] | None:
    """Returns the configs that PEFT keeps on this module, by the adapters' names. A wrapper that passes on the
    attributes of the model inside has none."""
    has_own = "peft_config" in module.__dict__ or hasattr(type(module), "peft_config")
    configs: Any = module.peft_config if has_own else None
    return configs if isinstance(configs, dict) else None


def is_of_peft(module: nn.Module) -> bool:
    """Returns whether it is a layer of PEFT, or PEFT's wrapper of a module that is trained whole or in part."""
    return hasattr(type(module), "adapter_layer_names")


def state(module: nn.Module, writable: bool = False) -> dict[str, Tensor]:
    """Returns a module's ``state_dict``, with the tensors that accelerate has offloaded, all in the model's memory.

    Args:
        writable: leave out what accelerate has offloaded to the disk (``hooks.stored_tensor``).
    """
    state: dict[str, Any] = dict(module.state_dict())
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            path, _, name = key.rpartition(".")
            state[key] = stored_tensor(module.get_submodule(path), name, writable)
    return state


def check_complete(adapter: PeftAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a trained parameter, of no other adapter, is not among the tensors that are saved."""
    saved = {tensor.data_ptr() for tensor in tensors.values()}
    for name, parameter in adapter.model.named_parameters():
        trained = parameter.requires_grad and type(parameter) is nn.Parameter and not parameter.is_meta
        if trained and parameter.data_ptr() not in saved and not adapter.of_others(name):
            expected = "no trained parameters but those that PEFT saves with the adapter (modules_to_save adds modules)"
            raise CheckpointError("model", expected, adapter.key(name))


def config_fields(config: Any) -> dict:
    """Returns the fields of a PEFT config as JSON has them. Patterns keep their order, because PEFT takes the first one
    that matches."""
    plain = lambda value: sorted(value) if isinstance(value, (set, frozenset)) else checks.plain_number(value)
    return json.loads(json.dumps(config.to_dict(), default=plain))


def auto_mapping(model: nn.Module) -> dict[str, str]:
    """Returns the names by which PEFT's ``AutoPeftModel`` finds the class of a model without a task type."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _owners(model: nn.Module, adapter: str, writable: bool) -> list[Owner]:
    """Returns the outermost modules with a config of the adapter; raises CheckpointError for another method than
    LoRA."""
    owners: list[Owner] = []
    inside: dict[int, Owner] = {}
    known: list[dict] = []
    for name, module in model.named_modules():
        configs = own_configs(module)
        if configs is None or adapter not in configs or any(configs is other for other in known):
            continue
        peft_config.checked(config_fields(configs[adapter]))
        known.append(configs)  # PEFT's wrappers and the model inside share one dictionary
        if id(module) in inside:
            inside[id(module)].configs.append(configs[adapter])
            continue
        owner = Owner(module, key_name(name), _wrapper(module), state(module, writable), [configs[adapter]])
        owners.append(owner)
        inside |= dict.fromkeys(map(id, module.modules()), owner)
    return owners


def _wrapper(module: nn.Module) -> str:
    """Returns what PEFT's own module adds to the names in the model that it wraps."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(module, (PeftModel, PeftMixedModel)):
        return PREFIX
    return "model." if isinstance(module, BaseTuner) else ""


def _key(owners: list[Owner], name: str) -> str:
    bare = key_name(name)
    for owner in owners:
        start = f"{owner.name}." if owner.name else ""
        if bare.startswith(start):
            return start + bare.removeprefix(start).removeprefix(owner.wrapper)
    return bare


def _matched_name(name: str, layer: PeftLayer) -> str:
    """Returns the name that PEFT's patterns are matched with: for a layer of ``target_parameters`` the parameter's,
    without the names of the wrappers of the module's other parameters."""
    parameter = getattr(layer, "parameter_name", None)
    if parameter is None:
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{parameter}"
