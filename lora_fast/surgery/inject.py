"""Model surgery, in place: fused layers into a plain model or into an existing PEFT model.

Every function plans first, then acts: an error leaves the model as it was, and the report names every layer changed
and, for every other candidate, the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from .. import checks
from ..layers.find import ADAPTER_LAYERS, peft_layers
from ..layers.nb_lora import NBLoRALinear, share_factors_
from . import targets
from .change_report import Report
from .configs import AdapterConfig, LoRAConfig, NBLoRAConfig, SingLoRAConfig


def inject_(
    model: nn.Module,
    config: LoRAConfig | NBLoRAConfig | SingLoRAConfig,
    *,
    allow_empty: bool = False,
    progress: bool = True,
) -> Report:
    """Replace linear layers of a plain model by the config's adapter layers over the same weights, and freeze
    everything but the adapters. The model then computes all norm-bounded layers' factors at once before each forward.

    Only layers whose type is exactly ``torch.nn.Linear``, on any device (meta included), with plain parameters and no
    hooks are replaced; others that ``config.target_modules`` names are left alone, with the reason in the report. A
    weight tied to another module's may be adapted (it is frozen and only read). Adapters are float32 over 16-bit
    weights, else in the weight's dtype.

    Args:
        model: any module that contains nn.Linear layers.
        config: what to put in, and where.
        allow_empty: accept that no layer fits; the model then stays as it is.
        progress: show a bar on stderr (tqdm's) if it takes more than two seconds, as the norms of large weights do.

    Raises:
        ArgumentError: nothing to replace (with the closest names), a model that is itself a linear layer or already
            has PEFT layers. The model is then unchanged.
    """
    if not isinstance(config, AdapterConfig):
        expected = "an lf.LoRAConfig, lf.NBLoRAConfig or lf.SingLoRAConfig"
        raise checks.ArgumentError("config", expected, type(config).__name__)
    check_plain(model)
    found = targets.candidates(model, config.target_modules)
    report = Report("injected", left=targets.left_alone(model, found, config.target_modules))
    report.changed = {name: f"{config.layer.__name__}(r={config.r})" for name in found if name not in report.left}
    if not report.changed and not allow_empty:
        near = targets.closest(model, config.target_modules)
        by = "" if config.target_modules == "all-linear" else ", by a regular expression or a list of name ends"
        expected = f"at least one torch.nn.Linear{by} (closest: {near})"
        got = f"{config.target_modules!r}" + (f"; left {report.reasons()}" if report.left else "")
        raise checks.ArgumentError("target_modules", expected, got)
    replace_(model, {name: (config.layer, config.layer_settings()) for name in report.changed}, progress)
    return report


def check_plain(model: object) -> None:
    """Raises ArgumentError unless it is a module, without PEFT layers, whose inner layers can be replaced."""
    if isinstance(model, (nn.Linear, *ADAPTER_LAYERS)):
        expected = "a module that contains linear layers; for a single layer, lf.LoRALinear.from_linear"
        raise checks.ArgumentError("model", expected, type(model).__name__)
    if peft_layers(model):
        expected = "a model without PEFT layers; fuse those with lf.fuse_"
        raise checks.ArgumentError("model", expected, type(model).__name__)


def replace_(model: nn.Module, kinds: dict[str, tuple[type[nn.Module], dict]], progress: bool = False) -> None:
    """Put a layer in the place of each named nn.Linear, wherever the model holds it, and freeze all but adapters.
    ``kinds``: name → its class and the arguments of ``from_linear``. All layers are built before the first is placed; a
    failure on the way leaves the model as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        linears = {name: model.get_submodule(name) for name in kinds}
        names = bar(kinds, "Adapter layers") if progress else kinds
        fused = {linears[name]: _build(name, linears[name], *kinds[name]) for name in names}
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    if not fused:
        return
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child in fused:
                setattr(parent, key, fused[child])
    layers = [module for module in model.modules() if isinstance(module, ADAPTER_LAYERS)]
    adapters = {id(getattr(layer, name)) for layer in layers for name in layer.TRAINABLE}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
    if any(isinstance(layer, NBLoRALinear) for layer in fused.values()):
        share_factors_(model)


def _build(name: str, linear: nn.Linear, kind: type[nn.Module], settings: dict) -> nn.Module:
    try:
        return kind.from_linear(linear, **settings)
    except checks.ArgumentError as error:
        raise checks.ArgumentError(error.argument, f"{error.expected} ({name})", error.got) from error


def bar(items: Collection[str], doing: str) -> Iterator[str]:
    """The items, under a tqdm bar on stderr that appears after two seconds and goes at the end; without one where tqdm
    is not installed (transformers brings it)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, desc=doing, unit="layer", delay=2, mininterval=1, leave=False))
