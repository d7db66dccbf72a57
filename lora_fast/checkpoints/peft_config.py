"""Reads PEFT's ``adapter_config.json``, and answers as PEFT does which modules it adapts, at which rank and scale."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping

from .. import checks
from ..checks import CheckpointError
from ..surgery import targets

CONFIG = "adapter_config.json"
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None}  # PEFT's
PLAIN_INITS = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")  # the others change the base weights
BEYOND_LINEAR = (  # settings under which the file is more than one plain adapter per linear layer
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
HARMLESS = ("use_rslora", "loftq_config", "corda_config", "eva_config", "lora_ga_config", "runtime_config")


def parse(data: bytes) -> dict:
    """Returns what ``checked`` returns for the object in a file.

    Raises:
        CheckpointError: no JSON object, or as ``checked``.
    """
    try:
        config = json.loads(data)
    except ValueError as error:  # not JSON, or not UTF-8
        raise CheckpointError(CONFIG, "a JSON object", f"{error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(CONFIG, "a JSON object", type(config).__name__)
    return checked(config)


def checked(config: dict) -> dict:
    """Returns the config of a LoRA adapter, with PEFT's defaults for the fields that it does not have.

    Raises:
        CheckpointError: another method than LoRA, or targets that are no names.
    """
    if config.get("peft_type") != "LORA":
        raise CheckpointError("peft_type", "'LORA'", checks.shown(config.get("peft_type")))
    config = DEFAULTS | config
    for setting in ("target_modules", "exclude_modules"):
        if config.get(setting):
            _check_names(setting, config[setting])
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) and name for name in whole):
        raise CheckpointError(f"modules_to_save in {CONFIG}", "a list of names", checks.shown(whole))
    return config


def settings(config: Mapping, name: str) -> dict:
    """Returns r, alpha, dropout and use_rslora that the config gives a module.

    Args:
        name: the module's name, or that of a parameter that ``target_parameters`` names.
    """
    rank = by_pattern(config, "rank_pattern", name, config["r"])
    alpha = by_pattern(config, "alpha_pattern", name, config["lora_alpha"])
    try:
        return {
            "r": checks.count(rank, "r"),
            "alpha": checks.finite(int(alpha) if isinstance(alpha, bool) else alpha, "lora_alpha"),  # PEFT divides it
            "dropout": checks.probability(config["lora_dropout"], "lora_dropout"),
            "use_rslora": bool(config.get("use_rslora")),
        }
    except checks.ArgumentError as error:
        raise CheckpointError(f"{error.argument} in {CONFIG}", error.expected, error.got) from error


def scaling(settings: Mapping) -> float:
    """Returns alpha / r of a module's settings, or alpha / √r with use_rslora."""
    return settings["alpha"] / (math.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"])


def by_pattern(config: Mapping, setting: str, name: str, default: object) -> object:
    """Returns the value of the first pattern that matches the name, or its end after a dot, as PEFT does."""
    patterns = config.get(setting) or {}
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
    except (AttributeError, re.error) as error:
        raise CheckpointError(
            setting, "an object whose keys are regular expressions", checks.shown(patterns)
        ) from error


def names_targets(config: Mapping) -> bool:
    """Returns whether ``target_modules`` names modules. "all-linear" does not, nor does a config without the field,
    for which PEFT has a list of its own. The layers are then those of the file."""
    wanted = config["target_modules"]
    return bool(wanted) and not (isinstance(wanted, str) and wanted.lower() == targets.ALL_LINEAR)


def is_target(config: Mapping, name: str) -> bool:
    """Returns whether PEFT may put an adapter of this config on a module of this name."""
    excluded, wanted = config.get("exclude_modules"), config["target_modules"]
    if excluded and targets.matches(excluded, name):
        return False
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.get("modules_to_save") or ()):
        return False
    if not names_targets(config):
        return True
    named = targets.matches(wanted, name)
    return named and (isinstance(wanted, str) or name in wanted or _in_selected_layer(config, name))


def require_plain(config: Mapping) -> None:
    """Raises CheckpointError unless each adapter of the config is scaling · b a on an unchanged linear layer, or DoRA's
    there, which is what the layers of this package compute. A setting of ``bias`` is no obstacle: trained biases have
    keys in the file, and a model such as Llama has none."""
    for name, value in config.items():
        if value and name != "use_dora" and (name in BEYOND_LINEAR or _is_variant(name)):
            raise CheckpointError(name, "unset: only a PEFT model loads more than plain LoRA", checks.shown(value))
    if not _leaves_base(config):
        expected = "an initialisation that leaves the base weights as they are, or its adapter converted by PEFT's "
        expected += "save_pretrained(path_initial_model_for_weight_conversion=…)"
        raise CheckpointError("init_lora_weights", expected, checks.shown(config["init_lora_weights"]))


def require_same_kind(config: Mapping, in_model: Mapping) -> None:
    """Raises CheckpointError unless a PEFT model's own config makes the same kind of adapter as the file's config, as
    far as the names and shapes of the tensors do not show it."""
    for name in sorted({*config, *in_model}):
        if name in BEYOND_LINEAR or _is_variant(name):
            ours, theirs = in_model.get(name) or None, config.get(name) or None
            if ours != theirs:
                expected = f"{checks.shown(ours)}, as in the model's config"
                raise CheckpointError(f"{name} in {CONFIG}", expected, checks.shown(theirs))
    inits = [source.get("init_lora_weights", True) for source in (in_model, config)]
    if inits[0] != inits[1] and not (_leaves_base(config) and _leaves_base(in_model)):
        expected = f"{checks.shown(inits[0])}, as in the model: such an initialisation changes the base weights"
        raise CheckpointError(f"init_lora_weights in {CONFIG}", expected, checks.shown(inits[1]))


def target_names(chosen: Collection[str], modules: Iterable[str]) -> str | list[str]:
    """Returns ``target_modules`` that select just these of the modules. A list of names would also select modules whose
    names end in one of them; a regular expression does not."""
    names = sorted(chosen)
    ambiguous = any(name not in chosen and targets.matches(names, name) for name in modules)
    return "|".join(map(re.escape, chosen)) if ambiguous else names


def set_ranks(config: dict, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """Sets the ranks and alphas of a config, given by module name: the first layer's, and patterns if any differ."""
    first = next(iter(ranks))
    longest_first = sorted(ranks, key=len, reverse=True)  # PEFT takes the first pattern that matches a name's end
    config |= {"r": ranks[first], "lora_alpha": alphas[first]}
    for field_name, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        differ = len(set(values.values())) > 1
        config[field_name] = {re.escape(name): values[name] for name in longest_first} if differ else {}


def set_scalings_(config: dict, scalings: Mapping[str, float]) -> None:
    """Gives each layer its own alpha in a config, if a layer has another scaling than the config gives it, as after
    PEFT's ``set_scale``.

    Args:
        scalings: name that the patterns are matched with → scaling.
    """
    layers = {name: settings(config, name) for name in scalings}
    if not all(math.isclose(scaling(layers[name]), scalings[name], rel_tol=1e-12) for name in layers):
        alphas = {name: alpha_of(scalings[name], layers[name]["r"], layers[name]["use_rslora"]) for name in layers}
        set_ranks(config, {name: layers[name]["r"] for name in layers}, alphas)


def alpha_of(scaling: float, r: int, use_rslora: bool, nominal: float = math.nan) -> float:
    """Returns the alpha that gives a scaling, as an int if it is whole, as in PEFT's configs.

    Args:
        nominal: an alpha that is returned unrounded if it gives the scaling.
    """
    unit = math.sqrt(r) if use_rslora else r
    alpha = float(nominal if nominal / unit == scaling else scaling * unit)
    return int(alpha) if alpha.is_integer() else alpha


def _is_variant(name: str) -> bool:
    """Returns whether a field's name is that of a switch, as PEFT spells the variants of LoRA, also future ones."""
    return name not in HARMLESS and (name.startswith("use_") or name.endswith("_config"))


def _leaves_base(config: Mapping) -> bool:
    init = config.get("init_lora_weights", True)
    return (init.lower() if isinstance(init, str) else init) in PLAIN_INITS


def _in_selected_layer(config: Mapping, name: str) -> bool:
    """Returns whether the module is in one of the blocks that ``layers_to_transform`` selects, all if there are none.
    The first number in the name, after a name of ``layers_pattern`` if there is one, is the block's."""
    selected, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if selected is None or selected == []:
        return True
    selected = [selected] if isinstance(selected, int) else selected
    starts = [r".*?\.[^.]*"] if not patterns else [rf"(?:^|.*?\.){p}" for p in _as_list(patterns)]
    block = next((match for start in starts if (match := re.match(rf"{start}\.(\d+)\.", name))), None)
    return block is not None and int(block[1]) in selected


def _as_list(value: str | list) -> list:
    return [value] if isinstance(value, str) else value


def _check_names(setting: str, value: object) -> None:
    try:
        targets.check(value)
    except checks.ArgumentError as error:
        raise CheckpointError(f"{setting} in {CONFIG}", error.expected, error.got) from error
