"""The config that the files of an adapter in a model with PEFT's layers get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checks import CheckpointError, shown
from . import peft_config, whole_modules
from .peft_config import CONFIG
from .peft_state import PeftAdapter, auto_mapping, config_fields, is_of_peft

WHICH = {  # fields that say which modules get an adapter of which size, and of which model they are parts
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"),
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode"),
}


def config(adapter: PeftAdapter, beside: Sequence[str] = ()) -> dict:
    """Returns PEFT's config of the adapter: its own where the saved model has it, and otherwise one with the full names
    in that model.

    Args:
        beside: names of modules that are saved whole though PEFT does not know them.

    Raises:
        CheckpointError: parts of the model with configs that one file cannot hold.
    """
    owner = adapter.owners[0]
    fields = config_fields(owner.configs[0])
    if len(adapter.owners) > 1 or len(owner.configs) > 1 or owner.name:
        return _with_full_names(adapter, beside)
    name = fields["base_model_name_or_path"] or owner.base.__dict__.get("name_or_path")
    fields["base_model_name_or_path"] = name or None
    fields["inference_mode"] = True
    if not adapter.is_of_peft_model and whole_modules.head_is_adapted(owner.base):
        fields["task_type"] = None  # because PEFT expects a head without adapters
    if fields["task_type"] is None:
        fields["auto_mapping"] = auto_mapping(owner.base)
    if beside:
        fields["modules_to_save"] = [*(fields["modules_to_save"] or ()), *beside]
    if adapter.scalings:
        peft_config.set_scalings_(fields, adapter.scalings)
    return fields


def _with_full_names(adapter: PeftAdapter, beside: Sequence[str]) -> dict:
    """Returns a config that names every module by its name in the whole model, whose parts have the configs."""
    fields, *more = [config_fields(settings) for owner in adapter.owners for settings in owner.configs]
    for other in more:
        for name in fields.keys() | other.keys():
            if name not in WHICH and fields.get(name) != other.get(name):
                got = f"{shown(fields.get(name))} and {shown(other.get(name))} in parts of the model"
                raise CheckpointError(f"{name} in {CONFIG}", "one setting, as the file has one config", got)
    if fields.get("layer_replication"):
        got = f"{shown(fields['layer_replication'])} in a part of the model"
        raise CheckpointError(f"layer_replication in {CONFIG}", "unset, as PEFT replicates layers of whole models", got)
    modules, targets = adapter.modules(), _targets(adapter)
    fields |= {
        "target_modules": peft_config.target_names(targets, modules),
        "target_parameters": sorted(adapter.parameters) or None,
        "modules_to_save": [*_whole(adapter, modules), *beside] or None,
        "trainable_token_indices": _token_indices(adapter, modules) or None,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "revision", "task_type")),
        "base_model_name_or_path": None,
        "auto_mapping": auto_mapping(adapter.model),
        "inference_mode": True,
    }
    rooted = fields["use_rslora"]
    alphas = {name: peft_config.alpha_of(x, adapter.ranks[name], rooted) for name, x in adapter.scalings.items()}
    if alphas:
        peft_config.set_ranks(fields, adapter.ranks, alphas)
    return fields


def _targets(adapter: PeftAdapter) -> list[str]:
    """Returns the names of the modules that have the adapter, without those of which only parameters have one."""
    return [name for name in adapter.scalings if name not in adapter.parameters]


def _whole(adapter: PeftAdapter, modules: dict[str, Any]) -> list[str]:
    """Returns the names of the modules of which PEFT trains a copy."""
    wrappers = {name: module for name, module in modules.items() if is_of_peft(module)}
    return [name for name, module in wrappers.items() if adapter.name in getattr(module, "modules_to_save", ())]


def _token_indices(adapter: PeftAdapter, modules: dict[str, Any]) -> dict[str, list[int]]:
    """Returns the names of the embeddings of which PEFT trains some tokens → the tokens.

    Raises:
        CheckpointError: one that is tied to another embedding, which PEFT finds out from the config of a whole model.
    """
    wrapped = {name: getattr(module, "token_adapter", None) for name, module in modules.items() if is_of_peft(module)}
    trained = {name: tokens for name, tokens in wrapped.items() if tokens and adapter.name in tokens.token_indices}
    for name, tokens in trained.items():
        if tokens.tied_adapter is not None:
            expected = "tokens of untied embeddings, where a part of the model has the adapter"
            raise CheckpointError(f"trainable_token_indices in {CONFIG}", expected, f"those of {name}, which is tied")
    return {name: [*map(int, tokens.token_indices[adapter.name])] for name, tokens in trained.items()}
