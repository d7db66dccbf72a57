"""Puts adapter layers into a plain model, in place of its linear layers.

All layers are built before the first one is placed, so an error leaves the model as it was. The report names every
layer that changed and, for every other candidate, the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import checks
from ..layers.base import AdapterLinear
from ..layers.find import ADAPTER_LAYERS, holders_of, peft_layers
from ..layers.nb_lora import NBLoRALinear, share_factors_
from ..quantized import over_format
from . import targets
from .change_report import Report
from .configs import AdapterConfig, LoRAConfig, NBLoRAConfig, SingLoRAConfig
from .groups import pair_
from .peft_lora import PeftLoRAConfig, is_peft_config

if TYPE_CHECKING:
    from peft import LoraConfig

AFTER_PLACING: list[Callable[[nn.Module], None]] = []  # each is called with the model, once its layers are placed


def inject_(
    model: nn.Module,
    config: LoRAConfig | NBLoRAConfig | SingLoRAConfig | LoraConfig,
    *,
    allow_empty: bool = False,
    progress: bool = True,
    group: bool = True,
) -> Report:
    """Replaces linear layers of a plain model by the config's adapter layers over the same weights, and freezes all
    parameters but the adapters'. With an NBLoRAConfig the model computes all layers' factors at once before each
    forward.

    Only layers whose type is exactly ``torch.nn.Linear`` or transformers' ``Conv1D`` (GPT-2), on any device (meta
    included), with plain parameters and no hooks are replaced, and layers with quantised weights of the families in
    ``lora_fast.quantized``, whose library goes on multiplying by them (docs/quantized.md). accelerate's hooks that only
    move a layer's input to its device (``device_map``) are carried to the new layer. Layers whose weight the model
    reads without calling them, as fused kernels do, are left alone, because an adapter would have no effect. The report
    gives the reason of every layer that ``config.target_modules`` names and that is left alone. A weight tied to
    another module's may be adapted, because it is frozen and only read. Adapters are float32 over 16-bit and quantised
    weights, else in the weight's dtype.

    Args:
        model: any module that contains nn.Linear layers.
        config: the kind of adapter, its settings, and the layers that get one. A ``peft.LoraConfig`` gives the layers,
            scales and, after the same seed, the initial values that ``get_peft_model`` gives. Its ``modules_to_save``
            are trained in place. Weights that an initialisation changes (PiSSA, OLoRA) are changed in the model, and
            ``save_adapter`` saves them.
        allow_empty: accept that no layer fits; the model then stays as it is.
        progress: show a tqdm bar on stderr if this takes more than two seconds, as the norms of large weights do.
        group: compute layers of one parent that are called with the same tensor, such as q, k and v, as one op, which
            reads that tensor and writes its gradient once. After a call of the model, ``lf.groups`` names them.

    Returns:
        The layers replaced, and the reasons of those left alone.

    Raises:
        ArgumentError: no layer to replace (the message contains the closest names), a model that is itself a linear
            layer or already has PEFT layers, or a setting of PEFT's that the layers of this library do not have, or
            names of experts for which PEFT adapts parameters. The model is then unchanged.
    """
    check_plain(model)
    group = checks.flag(group, "group")
    settings = _settings(config, model)
    target = settings.target_modules
    candidates = targets.candidates(model, target)
    report = Report("injected", left=settings.left_alone(model, candidates))
    kinds = {name: (settings.layer, settings.layer_settings(name)) for name in candidates if name not in report.left}
    over = {name: over_format(candidates[name]) for name in kinds}
    report.changed = {name: f"{kind.__name__}(r={options['r']}){over[name]}" for name, (kind, options) in kinds.items()}
    if not report.changed and not allow_empty:
        near = targets.closest(model, target)
        by = "" if target == "all-linear" else ", by a regular expression or a list of name ends"
        expected = f"at least one torch.nn.Linear{by} (closest: {near})"
        got = f"{target!r}" + (f"; left {report.reasons()}" if report.left else "")
        raise checks.ArgumentError("target_modules", expected, got)
    layers = _inject(model, kinds, settings, progress, group, report)
    report.note_fallbacks(layers)
    return report


def _settings(config: object, model: nn.Module) -> AdapterConfig:
    """Returns the config, or what ``inject_`` needs of PEFT's."""
    if is_peft_config(config):
        return PeftLoRAConfig(config, model)
    if isinstance(config, AdapterConfig):
        return config
    expected = "an lf.LoRAConfig, lf.NBLoRAConfig, lf.SingLoRAConfig or peft.LoraConfig"
    raise checks.ArgumentError("config", expected, type(config).__name__)


def _inject(
    model: nn.Module, kinds: dict[str, tuple[type[AdapterLinear], dict]], settings: AdapterConfig,
    progress: bool, group: bool, report: Report,
) -> Collection[AdapterLinear]:  # fmt: skip
    """Builds and places the layers, and returns them."""
    if not isinstance(settings, PeftLoRAConfig) or not kinds:
        layers = build_layers(model, kinds, progress)
        place_(model, layers, group)
        return layers.values()
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in kinds}  # nn.Linear each
    names = _with_progress_bar(kinds) if progress else kinds
    computed = {name: settings.initial(name, linears[name]) for name in names}
    with torch.random.fork_rng(devices=[]):  # PEFT has drawn what it draws, and no more is to be drawn
        layers = build_layers(model, kinds)
    place_(model, layers, group)
    placed = {name: layers[linear] for name, linear in linears.items()}
    report.left |= settings.unmatched(kinds)
    report.changed |= settings.finish_(placed, {name: x for name, x in computed.items() if x is not None})
    return layers.values()


def check_plain(model: nn.Module) -> None:
    """Raises ArgumentError unless the model is a module without PEFT layers whose inner layers can be replaced."""
    if isinstance(model, (nn.Linear, *ADAPTER_LAYERS)):
        expected = "a module that contains linear layers; for a single layer, lf.LoRALinear.from_linear"
        raise checks.ArgumentError("model", expected, type(model).__name__)
    if peft_layers(model):
        expected = "a model without PEFT layers; fuse those with lf.fuse_"
        raise checks.ArgumentError("model", expected, type(model).__name__)


def build_layers(
    model: nn.Module, kinds: Mapping[str, tuple[type[AdapterLinear], dict]], progress: bool = False
) -> dict[nn.Linear, AdapterLinear]:
    """Returns nn.Linear → a new adapter layer over its weight, for ``place_``; the model stays as it is.

    Args:
        kinds: name of the nn.Linear → the layer's class and the arguments of its ``from_linear``.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in kinds}  # nn.Linear each
    names = _with_progress_bar(kinds) if checks.flag(progress, "progress") else kinds
    try:
        return {linears[name]: _build(name, linears[name], *kinds[name]) for name in names}
    finally:  # from_linear freezes the weights, which the model's own layers still hold
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _build(name: str, linear: nn.Linear, kind: type[AdapterLinear], settings: dict) -> AdapterLinear:
    try:
        return kind.from_linear(linear, **settings)
    except checks.ArgumentError as error:
        raise checks.ArgumentError(error.argument, f"{error.expected} ({name})", error.got) from error


def _with_progress_bar(names: Collection[str]) -> Iterable[str]:
    """Returns the names under a tqdm bar on stderr that appears after two seconds and is cleared at the end; without a
    bar where tqdm is not installed (transformers depends on it)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return names
    return tqdm(names, desc="Adapter layers", unit="layer", delay=2, mininterval=1, leave=False)


def place_(model: nn.Module, layers: dict[nn.Linear, AdapterLinear], group: bool = True) -> None:
    """Replaces every nn.Linear by its layer, wherever the model holds it, and freezes all parameters but those of
    adapters. With ``group`` the layers of one parent are siblings."""
    if not layers:
        return
    for linear, holders in holders_of(model, layers).items():
        for parent, key in holders:
            setattr(parent, key, layers[linear])
    if group:
        pair_(model, set(layers.values()))
    placed = [module for module in model.modules() if isinstance(module, ADAPTER_LAYERS)]
    trained = {id(getattr(layer, name)) for layer in placed for name in layer.TRAINABLE}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    if any(isinstance(layer, NBLoRALinear) for layer in layers.values()):
        share_factors_(model)
    for function in AFTER_PLACING:
        function(model)
