"""Model surgery, in place: fused layers into a plain model or into an existing PEFT model.

Every function plans first, then acts: an error leaves the model as it was, and the report names every layer changed
and, for every other candidate, the reason.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from . import checks, targets
from .configs import AdapterConfig, LoRAConfig, NBLoRAConfig, SingLoRAConfig
from .layers import OURS, fused_class, peft_layers
from .nb_linear import NBLoRALinear, share_factors_
from .progress import bar
from .report import Report


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
    if isinstance(model, (nn.Linear, *OURS)):
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
    layers = [module for module in model.modules() if isinstance(module, OURS)]
    adapters = {id(getattr(layer, name)) for layer in layers for name in layer.TRAINED}
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


def fuse_(
    peft_model: nn.Module,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    *,
    allow_empty: bool = False,
) -> Report:
    """Give the LoRA layers of an existing PEFT model the fused forward, in place: module objects, parameters, adapters
    and state_dict keys stay as they are, and PEFT goes on working with them. Call it again after adding adapters on
    new layers.

    A fused layer checks at every call whether the fused op computes what PEFT would (one active, plain adapter, no
    hooks, …); where it does not, PEFT's forward runs and the layer's ``fallback_reason`` says why.

    Args:
        peft_model: any module that holds PEFT layers: a PeftModel, or a model after ``add_adapter``.
        filter_fn: (name, layer) → whether to fuse it.
        strict: raise if a layer that ``filter_fn`` admits cannot be fused.
        allow_empty: accept that no layer is fused.

    Raises:
        ArgumentError: no layer to fuse, or ``strict`` and a layer left alone. The model is then unchanged.
        MissingPackageError: PEFT is not installed.
    """
    fused = fused_class()
    report, chosen, unwanted = Report("fused"), [], {}
    for name, layer in peft_layers(peft_model).items():
        if filter_fn is not None and not filter_fn(name, layer):
            report.left[name] = "excluded by filter_fn"
        elif type(layer) is fused:
            report.left[name] = "already fused"
        elif (reason := _unfusable(layer)) is not None:
            report.left[name] = unwanted[name] = reason
        else:
            report.changed[name] = fused.__name__
            chosen.append(layer)
    if strict and unwanted:
        got = Report("fused", left=unwanted).reasons()
        raise checks.ArgumentError("peft_model", "only layers that can be fused (strict=True)", got)
    report.require_change("peft_model", "at least one LoRA layer of PEFT to fuse", allow_empty)
    for layer in chosen:
        layer.__class__ = fused
    return report


def _unfusable(layer: nn.Module) -> str | None:
    """Why a PEFT layer cannot run fused with any of its adapters as things are, or None."""
    from peft.tuners import lora

    from .peft_linear import fused_arguments

    if type(layer) is not lora.Linear:
        return f"PEFT layer {type(layer).__module__}.{type(layer).__name__}"
    if layer.merged_adapters:
        return "merged: unmerge it first"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    if layer.base_layer.weight.dtype not in checks.FLOATS:
        return f"weight of dtype {layer.base_layer.weight.dtype}"
    calls = [fused_arguments(layer, adapter) for adapter in layer.lora_A]
    if any(isinstance(call, tuple) for call in calls):
        return None
    return calls[0] if calls else "no adapter"


def unfuse_(peft_model: nn.Module, *, allow_empty: bool = False) -> Report:
    """Give fused layers PEFT's own forward back; the inverse of ``fuse_``. Merged layers have to be unmerged first.

    Raises:
        ArgumentError: no fused layer, and not ``allow_empty``. The model is then unchanged.
        MissingPackageError: PEFT is not installed.
    """
    fused = fused_class()
    from peft.tuners import lora

    report = Report("unfused")
    for name, layer in peft_layers(peft_model).items():
        if type(layer) is not fused:
            report.left[name] = "not fused"
        elif layer.merged_adapters:
            report.left[name] = "merged: unmerge it first"
        else:
            report.changed[name] = "peft.tuners.lora.Linear"
    report.require_change("peft_model", "at least one fused layer", allow_empty)
    for name in report.changed:
        layer = peft_model.get_submodule(name)
        layer.__dict__.pop("fallback_reason", None)
        layer.__class__ = lora.Linear
    return report
