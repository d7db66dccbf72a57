"""The parts of a model that PEFT's ``LoraConfig`` names, found as ``get_peft_model`` finds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from .. import checks


def default(model: nn.Module) -> Any:
    """Returns the modules that PEFT targets in a model of this type by default."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    kind: Any = getattr(getattr(model, "config", None), "model_type", None)
    names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if names is None:
        expected = "names of modules (PEFT has no default for this model's type)"
        raise checks.ArgumentError("target_modules", expected, f"None and model type {kind!r}")
    return names if isinstance(names, str) else set(names)


def trained_whole(model: nn.Module, ends: Iterable[str]) -> dict[str, nn.Module]:
    """Returns name → module of those that are trained whole, whose names end as PEFT's rule says.

    Raises:
        ArgumentError: a module that cannot be trained in place, as PEFT trains a copy.
    """
    ends = tuple(ends)
    saved = {name: module for name, module in model.named_modules() if name and ends and name.endswith(ends)}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, module in saved.items():
        inside = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
        for key, parameter in module.named_parameters():
            if owners[id(parameter)] > inside[id(parameter)]:
                expected = "modules whose parameters no other module holds (PEFT trains a copy, lf.inject_ the module)"
                raise checks.ArgumentError("modules_to_save", expected, f"{name}.{key}")
            if not parameter.is_floating_point():
                got = f"{name}.{key} of {parameter.dtype}"
                raise checks.ArgumentError("modules_to_save", "modules of floating-point parameters", got)
    return saved


def convert_(config: Any, model: nn.Module) -> list[str]:
    """Changes a copy of PEFT's config as PEFT does for mixtures of experts: transformers 5 has stacked the weights of
    their experts, which were linear layers before, so PEFT adapts parameters in place of the layers that were named.

    Returns:
        The names of these parameters; the config keeps the modules alone.

    Raises:
        ArgumentError: names that PEFT cannot convert, as they are a part of what one parameter holds.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # PEFT 0.18, which converts nothing
        return []
    config.rank_pattern, config.alpha_pattern = dict(config.rank_pattern), dict(config.alpha_pattern)
    named = config.target_modules
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError as error:
        expected = "names that PEFT can convert for this model"
        raise checks.ArgumentError("target_modules", expected, f"{checks.shown(named)} ({error})") from error
    ends = tuple(f".{name}" for name in config.target_parameters or ())
    config.target_parameters = None
    return [name for name, _ in model.named_parameters() if f".{name}".endswith(ends)]
