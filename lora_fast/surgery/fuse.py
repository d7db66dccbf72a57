"""The fused forward for an existing PEFT model, in place, and PEFT's own back.

Every function plans first, then acts: an error leaves the model as it was, and the report names every layer changed
and, for every other candidate, the reason.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .. import checks
from ..layers.find import fused_class, peft_layers
from .change_report import Report


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

    from ..layers.fused_peft import fused_arguments

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
