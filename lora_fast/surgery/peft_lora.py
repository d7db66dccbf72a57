"""Takes PEFT's own ``LoraConfig`` for ``inject_``: the layers, ranks, scales and first factors that ``get_peft_model``
gives a model with the same seed. PEFT selects the modules and computes the factors.

What the layers of this library do not have is refused by name before anything changes. Fields that have their default
value are no obstacle, whichever PEFT's version adds.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..layers import merge_log
from ..layers.base import AdapterLinear, sizes
from ..layers.dora_linear import DoRALinear
from ..layers.lora import LoRALinear
from ..quantized import quantized_weight
from . import peft_targets, targets, tasks
from .configs import AdapterConfig

TAKEN = (  # fields of PEFT's LoraConfig, whatever their values
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "inference_mode",
    "fan_in_fan_out",  # which follows from each layer's class
    "runtime_config",  # where DoRA computes
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
)  # fmt: skip
FROM_DATA = ("eva", "corda", "lora_ga")  # initialisations for which PEFT needs activations or gradients
FROM_SHAPES = (True, False, "gaussian", "orthogonal")  # those that leave the base weight as it is
INSTEAD = "get_peft_model, then lf.fuse_"  # for what the layers of this library do not have
NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}  # ours → PEFT's, for errors


class Initial(NamedTuple):
    """The initial values that PEFT gives a layer: a (r, d_in), b (d_out, r), the base weight where that changes, and
    DoRA's magnitudes."""

    a: Tensor
    b: Tensor
    weight: Tensor | None
    magnitude: Tensor | None  # DoRA's (d_out,); None also over a quantised weight, whose norms the layer computes


def is_peft_config(config: object) -> bool:
    """Returns whether it is a config of PEFT, for whichever tuner."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftConfig

    return isinstance(config, PeftConfig)


class PeftLoRAConfig(AdapterConfig):
    """A ``peft.LoraConfig`` for one model, which is not changed.

    Args:
        config: any config of PEFT. model: the plain model.

    Attributes:
        target_modules: as given, or PEFT's default for the model's type.

    Raises:
        ArgumentError: a config of another tuner; a field with a value that the layers of this library do not have.
    """

    def __init__(self, config: Any, model: nn.Module):
        from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

        _check_fields(config)
        self.layer = DoRALinear if config.use_dora else LoRALinear
        _check_selection(config)
        self.config = copy.copy(config)  # with target_modules as names or a regular expression, as PEFT resolves them
        if config.target_modules is None:
            self.config.target_modules = peft_targets.default(model)
        self.target_modules = self.config.target_modules
        targets.check(self.target_modules)
        self.patterns = {name: getattr(config, name) for name in ("rank_pattern", "alpha_pattern")}
        self.config.layers_to_transform = checks.python_number(config.layers_to_transform)
        self.config.modules_to_save = [*(config.modules_to_save or ()), *tasks.HEADS.get(config.task_type, ())] or None
        self.parameters = self._convert_(model)
        self.config = _maybe_include_all_linear_layers(self.config, model)
        self.saved = peft_targets.trained_whole(model, self.config.modules_to_save or ())
        self.owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())

    def _convert_(self, model: nn.Module) -> list[str]:
        """Converts the targets as PEFT does, and returns the names of the parameters that "all-linear" then means.

        Raises:
            ArgumentError: other targets that mean parameters, which no layer of this library adapts.
        """
        parameters = peft_targets.convert_(self.config, model)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == targets.ALL_LINEAR:
            return parameters
        if parameters:
            expected = f"names of linear layers alone (for others: {INSTEAD})"
            got = f"{checks.shown(self.target_modules)}, for which PEFT adapts parameters ({', '.join(parameters[:4])})"
            raise checks.ArgumentError("target_modules", expected, got)
        if isinstance(self.target_modules, str):
            self.target_modules = self.config.target_modules  # PEFT may have replaced the expression by names
        return []

    def left_alone(self, model: nn.Module, candidates: dict[str, nn.Module]) -> dict[str, str]:
        names = self.config.target_modules if isinstance(self.target_modules, str) else self.target_modules
        excluded = {name: reason for name in candidates if (reason := self._excluded(name)) is not None}
        parameters = dict.fromkeys(self.parameters, f"a parameter, which PEFT adapts: {INSTEAD}")
        return targets.left_alone(model, candidates, names) | excluded | parameters

    def _excluded(self, name: str) -> str | None:
        """Returns why PEFT gives no adapter to a module that ``target_modules`` names, or None if it does."""
        from peft.tuners.tuners_utils import check_target_module_exists

        if check_target_module_exists(self.config, name):
            return None
        for setting in ("exclude_modules", "modules_to_save", "layers_to_transform"):
            without = copy.copy(self.config)
            setattr(without, setting, None)
            if check_target_module_exists(without, name):
                return f"left out by {setting}"
        return f"PEFT leaves it out of {checks.shown(self.target_modules)}"

    def unmatched(self, names: Iterable[str]) -> dict[str, str]:
        """Returns entries of the config that match none of the layers, or no module → the reason for the report."""
        left = {}
        for setting, patterns in self.patterns.items():
            for key in patterns:
                if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
                    left[key] = f"a key of {setting} that matches no layer"
        heads = tasks.HEADS.get(self.config.task_type, ())
        for entry in self.config.modules_to_save or ():
            if entry not in heads and not any(name.endswith(entry) for name in self.saved):
                left[entry] = "no module of this name, for modules_to_save"
        return left

    def layer_settings(self, name: str = "") -> dict:
        from peft.utils.other import get_pattern_key

        ranks, alphas, rslora = self.config.rank_pattern, self.config.alpha_pattern, self.config.use_rslora
        settings = {
            "r": ranks.get(get_pattern_key(ranks, name), self.config.r),
            "alpha": alphas.get(get_pattern_key(alphas, name), self.config.lora_alpha),
            "dropout": self.config.lora_dropout,
            "use_rslora": bool(rslora) if rslora is None or isinstance(rslora, checks.NUMBERS) else rslora,
            "init": "gaussian" if self.config.init_lora_weights == "gaussian" else "kaiming",
        }
        try:
            self.layer(1, 1, device="meta", **settings)
        except checks.ArgumentError as error:
            argument = NAMES.get(error.argument, error.argument)
            raise checks.ArgumentError(argument, f"{error.expected} ({name})", error.got) from None
        return settings

    def initial(self, name: str, linear: nn.Linear) -> Initial | None:
        """Returns what PEFT's initialisation gives a layer; None on the meta device, where there is nothing to compute.

        Raises:
            ArgumentError: PEFT cannot compute it, or it would change a weight that other modules hold, too.
        """
        from peft import inject_adapter_in_model

        init = self.config.init_lora_weights
        changes = (init.lower() if isinstance(init, str) else init) not in FROM_SHAPES
        if (quantized := quantized_weight(linear)) is not None:
            if changes:
                expected = "an initialisation that needs no weights, over quantised ones (True, 'gaussian', …)"
                raise checks.ArgumentError("init_lora_weights", expected, f"{init!r} ({name})")
            linear = _stand_in(quantized)
        weight = linear.weight.detach()
        if weight.is_meta:
            if init in (True, "gaussian"):
                return None
            raise checks.ArgumentError("init_lora_weights", "True or 'gaussian' on the meta device", checks.shown(init))
        if changes and self.owners[id(linear.weight)] > 1:
            expected = "an initialisation that leaves base weights as they are, where modules share one"
            raise checks.ArgumentError("init_lora_weights", expected, f"{init!r} ({name})")
        twin = copy.copy(linear)
        # PEFT freezes the twin's parameters, and the linear layer keeps its flags.
        twin._parameters = {
            key: p if p is None else nn.Parameter(p.detach(), False) for key, p in linear._parameters.items()
        }
        if changes:
            twin.weight = nn.Parameter(weight.clone(), False)
        holder = nn.ModuleDict({"layer": twin})
        try:
            inject_adapter_in_model(self._for_one_layer(name, linear), holder)
        except Exception as error:  # of torch.linalg, a missing package, a rank that the initialisation does not allow
            expected = "an initialisation that PEFT can compute for every layer"
            got = f"{init!r} ({name}: {str(error)[:300]})"
            raise checks.ArgumentError("init_lora_weights", expected, got) from error
        adapted: Any = holder["layer"]
        variant = next((type(variant).__name__ for variant in adapted.lora_variant.values()), None)
        if variant != ("DoraLinearVariant" if self.config.use_dora else None):
            raise checks.ArgumentError("init_lora_weights", "plain LoRA", f"{init!r} ({variant})")
        (a,), (b,) = adapted.lora_A.values(), adapted.lora_B.values()
        d_in, d_out = sizes(linear)
        r = self.layer_settings(name)["r"]
        if a.weight.shape != (r, d_in) or b.weight.shape != (d_out, r):  # PiSSA's of a small layer, OLoRA's of a Conv1D
            got = f"{init!r} ({name}: {tuple(a.weight.shape)} and {tuple(b.weight.shape)})"
            expected = f"an initialisation with factors of shape {(r, d_in)} and {(d_out, r)}"
            raise checks.ArgumentError("init_lora_weights", expected, got)
        changed = changes and not torch.equal(twin.weight, weight)
        has_magnitude = self.config.use_dora and quantized is None
        magnitude = next(iter(adapted.lora_magnitude_vector.values())).weight.detach() if has_magnitude else None
        return Initial(a.weight.detach(), b.weight.detach(), twin.weight.detach() if changed else None, magnitude)

    def _for_one_layer(self, name: str, linear: nn.Linear) -> Any:
        """Returns PEFT's config for a model that consists of one layer, called ``layer``."""
        config, settings = copy.copy(self.config), self.layer_settings(name)
        config.target_modules, config.r, config.lora_alpha = {"layer"}, settings["r"], settings["alpha"]
        config.rank_pattern, config.alpha_pattern = {}, {}
        config.exclude_modules = config.modules_to_save = config.layers_to_transform = config.layers_pattern = None
        config.fan_in_fan_out = not isinstance(linear, nn.Linear)
        return config

    @torch.no_grad()
    def finish_(self, layers: Mapping[str, AdapterLinear], initial: Mapping[str, Initial]) -> dict[str, str]:
        """Puts the initial values into layers that are in the model, and unfreezes the modules that are trained whole.

        Returns:
            Name of each such module → what it became, for the report.
        """
        for name, (a, b, weight, magnitude) in initial.items():
            layer: Any = layers[name]
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
            if magnitude is not None:
                layer.lora_magnitude_vector.copy_(magnitude)
            elif self.config.use_dora:
                layer.reset_magnitude()
            if weight is not None:
                layer.weight.copy_(weight)
                merge_log.mark(layer)  # so that save_adapter saves the weight, without which the adapter is wrong
        trains = not self.config.inference_mode
        for layer in layers.values():
            for parameter in (getattr(layer, name) for name in layer.TRAINABLE):
                parameter.requires_grad_(trains)
        for module in self.saved.values():
            module.requires_grad_(trains)
        return dict.fromkeys(self.saved, "trained whole (modules_to_save)")


def _stand_in(quantized: Any) -> nn.Linear:
    """Returns an nn.Linear without values, of the sizes and on the device of a quantised layer, for PEFT to adapt. No
    random number is drawn for it."""
    d_out, d_in = quantized.shape
    place = {"device": quantized.device, "dtype": torch.float32}
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=False, **place)
    return linear


def _check_fields(config: Any) -> None:
    """Raises ArgumentError unless it is a LoraConfig whose fields have values that the layers of this library have."""
    from peft import LoraConfig, PeftType

    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise checks.ArgumentError("config", "a peft.LoraConfig, of PEFT's configs", type(config).__name__)
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(FROM_DATA):
        expected = f"an initialisation that needs no data (for others: {INSTEAD})"
        raise checks.ArgumentError("init_lora_weights", expected, checks.shown(init))
    taken = (*TAKEN, "loftq_config") if init == "loftq" else TAKEN
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in taken and value != _default(field):
            expected = f"its default, {_default(field)!r}, in lf.inject_ (for others: {INSTEAD})"
            raise checks.ArgumentError(field.name, expected, checks.shown(value))
    if custom := getattr(config, "_custom_modules", None):
        raise checks.ArgumentError("config", "no custom modules", checks.shown(custom))


def _check_selection(config: Any) -> None:
    """Raises ArgumentError unless the fields that select layers and their ranks have the types that PEFT expects."""
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        if not isinstance(patterns, dict) or not all(map(_is_pattern, patterns)):
            raise checks.ArgumentError(name, "a dict whose keys are regular expressions", checks.shown(patterns))
    if config.exclude_modules:
        targets.check(config.exclude_modules, "exclude_modules")
    layers, pattern = checks.python_number(config.layers_to_transform), config.layers_pattern
    lists = {
        "modules_to_save": (config.modules_to_save, _is_pattern, "names of modules"),
        "layers_pattern": ([pattern] if isinstance(pattern, str) and pattern else pattern, _is_pattern, "names"),
        "layers_to_transform": ([layers] if isinstance(layers, int) else layers, _is_index, "numbers of layers"),
    }
    for name, (entries, fits, kind) in lists.items():
        if entries and (not isinstance(entries, (list, tuple, set, frozenset)) or not all(map(fits, entries))):
            raise checks.ArgumentError(name, f"a list of {kind}", checks.shown(getattr(config, name)))


def _is_pattern(entry: object) -> bool:
    """Returns whether it is a regular expression, as which PEFT takes names."""
    try:
        return isinstance(entry, str) and bool(entry) and re.compile(entry) is not None
    except re.error:
        return False


def _is_index(entry: object) -> bool:
    number = checks.python_number(entry)
    return isinstance(number, int) and not isinstance(number, bool)


def _default(field: Field) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
