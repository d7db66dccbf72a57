"""Gives the LoRA layers of a PEFT model the fused forward, or PEFT's own back, by changing their class.

All layers are checked before the first one changes, so an error leaves the model as it was. The report names every
layer that changed and, for every other candidate, the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from .. import checks
from ..kernels.grouping import group_by
from ..layers.find import (
    PeftLayer,
    expert_count,
    fused_class,
    fused_class_for,
    is_fused,
    is_of_parameter,
    peft_layers,
)
from ..layers.hooks import change_class_, has_replaced_forward
from ..quantized import family_of, over_format, reason_against, reason_against_unknown
from .change_report import Report
from .groups import pair_
from .weight_reads import weight_reads

FUSED = "already fused"


def fuse_(
    peft_model: nn.Module,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    *,
    allow_empty: bool = False,
    group: bool = True,
) -> Report:
    """Gives the LoRA layers of a PEFT model the fused forward, in place. Module objects, parameters, adapters and
    state_dict keys stay as they are, so PEFT works with them as before. Call it again after adding adapters to new
    layers.

    A fused layer checks at every call whether the fused op computes the same as PEFT (one active adapter, plain or
    DoRA's, no hooks but those of accelerate that only move the input, …). Where it does not, PEFT's forward runs and
    the layer's ``fallback_reason`` contains the reason. In a ``repr``, a fused layer has PEFT's name and the word
    "fused".

    PEFT's layers over quantised weights of the families in ``lora_fast.quantized`` are fused, too: the library that
    owns the format multiplies by the weight, and the adapter's part is added to its result (docs/quantized.md).

    So are adapters of experts' parameters (``target_parameters``), where the module is one of transformers' experts:
    each parameter has a line in the report, and those of one module are fused together or not at all.

    Left as they are: other kinds of PEFT's layers (embeddings, convolutions, unknown formats, other parameters), and
    layers whose weight the model reads without calling them, so that an adapter has no effect there, neither PEFT's nor
    a fused one.

    Args:
        peft_model: any module that holds PEFT layers: a PeftModel, or a model after ``add_adapter``.
        filter_fn: (name, layer) → whether to fuse it.
        strict: raise if a layer that ``filter_fn`` admits cannot be fused.
        allow_empty: accept that no layer is fused.
        group: compute layers of one parent that are called with the same tensor, such as q, k and v, as one op, which
            reads that tensor and writes its gradient once. After a call of the model, ``lf.groups`` names them.

    Returns:
        The layers fused, and the reasons of those left alone.

    Raises:
        ArgumentError: no layer to fuse, or ``strict`` and a layer left alone. The model is then unchanged.
        MissingPackageError: PEFT is not installed.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise checks.ArgumentError("filter_fn", "a function or None", checks.shown(filter_fn))
    strict, group = checks.flag(strict, "strict"), checks.flag(group, "group")
    fused_class()  # PEFT is installed
    report, unfusable = Report("fused"), {}
    layers, reads = peft_layers(peft_model), weight_reads(peft_model)
    for name, layer in layers.items():
        if filter_fn is not None and not filter_fn(name, layer):
            report.left[name] = "excluded by filter_fn"
        elif is_fused(layer):
            report.left[name] = FUSED
        elif (reason := _unfusable(layer) or reads.get(layer)) is not None:
            report.left[name] = unfusable[name] = reason
        else:
            report.changed[name] = _becomes(layer)
    unfusable |= _leave_halves(layers, report)
    if strict and unfusable:
        got = Report("fused", left=unfusable).reasons()
        raise checks.ArgumentError("peft_model", "only layers that can be fused (strict=True)", got)
    report.require_change("peft_model", "at least one LoRA layer of PEFT to fuse", allow_empty)
    chosen = [layers[name] for name in report.changed]
    for layer in chosen:
        change_class_(layer, cast(Any, fused_class_for(layer)))
        if (kind := family_of(base := layer.get_base_layer())) is not None:
            kind.take_(base)
    if group:
        pair_(peft_model, set(chosen))
    share_merges_(peft_model, report)
    report.note_fallbacks(chosen)
    return report


def _becomes(layer: PeftLayer) -> str:
    """Returns what a layer will be, for the report."""
    fused: Any = fused_class_for(layer)
    return fused.__qualname__ + (
        f", {_of_parameter(layer)}" if is_of_parameter(layer) else over_format(layer.get_base_layer())
    )


def _of_parameter(layer: PeftLayer) -> str:
    experts = expert_count(layer)
    return f"adapter of the parameter {layer.parameter_name!r}" + (f" of {experts} experts" if experts > 1 else "")


def unfuse_(peft_model: nn.Module, *, allow_empty: bool = False) -> Report:
    """Gives fused layers PEFT's own forward back, as before ``fuse_``. Merged layers must be unmerged first.

    Returns:
        The layers that were changed, and the reasons of those left alone.

    Raises:
        ArgumentError: no fused layer, and not ``allow_empty``. The model is then unchanged.
        MissingPackageError: PEFT is not installed.
    """
    fused = fused_class()
    from peft.tuners import lora

    from ..layers.exact_merge import ExactLoraEmbedding

    report, layers = Report("unfused"), peft_layers(peft_model)
    for name, layer in layers.items():
        if not is_fused(layer):
            report.left[name] = "not fused"
        elif layer.merged_adapters:
            report.left[name] = "merged: unmerge it first"
        elif has_replaced_forward(layer):
            report.left[name] = "its forward was replaced"
        else:
            report.changed[name] = f"{layer.PEFT_CLASS.__module__}.{layer.PEFT_CLASS.__name__}"
    report.require_change("peft_model", "at least one fused layer", allow_empty)
    for name in report.changed:
        for attribute in (
            "fallback_reason",
            "shares_weight_with",
            "siblings",
            "_merged",
            "_norms",
        ):  # the class has defaults
            layers[name].__dict__.pop(attribute, None)
        change_class_(layers[name], layers[name].PEFT_CLASS)
        if (kind := family_of(base := layers[name].get_base_layer())) is not None:
            kind.release_(base)
    still_shared = {id(layer.get_base_layer().weight) for layer in layers.values() if type(layer) is fused}
    for layer in layers.values():
        is_alone = type(layer) is ExactLoraEmbedding and id(layer.get_base_layer().weight) not in still_shared
        if is_alone and not layer.merged:
            layer.__dict__.pop("_merged", None)
            change_class_(layer, lora.Embedding)
    return report


def share_merges_(peft_model: nn.Module, report: Report) -> None:
    """Prepares fused layers that share their weight with other PEFT layers for merging. Adapted embeddings (tied to an
    adapted ``lm_head``) become ``ExactLoraEmbedding``. Beside other kinds of layers, fused ones merge as PEFT does."""
    from peft.tuners import lora

    from ..layers.exact_merge import ExactLoraEmbedding

    fused, layers = fused_class(), peft_layers(peft_model)
    held = {name: {id(p) for p in layer.get_base_layer()._parameters.values()} for name, layer in layers.items()}
    sharing = group_by([(p, name) for name, ids in held.items() for p in ids - {id(None)}], lambda row: row[0])
    for name, layer in layers.items():
        if type(layer) is not fused:
            continue
        others = {other: layers[other] for p in held[name] for _, other in sharing.get(p, ()) if other != name}
        kinds = (fused, ExactLoraEmbedding)
        embeddings = [other for other, x in others.items() if type(x) is lora.Embedding and not x.merged]
        foreign = [other for other, x in others.items() if type(x) not in kinds and other not in embeddings]
        if foreign or layer.shares_weight_with:
            layer.shares_weight_with = ", ".join(foreign)
        for other in [] if foreign else embeddings:
            change_class_(layers[other], ExactLoraEmbedding)
            report.left[other] = f"embedding: PEFT's forward; merges into one weight with {name}"


def _unfusable(layer: PeftLayer) -> str | None:
    """Returns why a PEFT layer in its present state cannot run fused with any of its adapters, or None if it can."""
    from peft.tuners import lora

    from ..layers.fused_peft import HOOKED, fused_arguments, offloaded_modules

    if is_of_parameter(layer):
        reason = _unfusable_parameter(layer)
        return None if reason is None else f"{_of_parameter(layer)}: {reason}"
    if fused_class_for(layer) is None:
        base, kind = layer.get_base_layer(), f"PEFT layer {type(layer).__module__}.{type(layer).__name__}"
        return f"{kind} over a {type(base).__name__}" if isinstance(layer, lora.LoraLayer) else kind
    if layer.merged_adapters:
        return "merged: unmerge it first"
    if has_replaced_forward(layer):
        return "its forward was replaced"
    base = layer.base_layer
    if family_of(base) is not None:
        if reason := reason_against(base):
            return reason
    elif reason := reason_against_unknown(base):
        return reason
    elif type(layer) is lora.Linear and base.weight.dtype not in checks.FLOATS:
        return f"weight of dtype {base.weight.dtype}"
    calls = {adapter: fused_arguments(layer, adapter) for adapter in layer.lora_A}
    reasons = [
        call
        for adapter, call in calls.items()
        if isinstance(call, str) and not (call == HOOKED and offloaded_modules(layer, adapter))
    ]
    if len(reasons) < len(calls):
        return None
    return reasons[0] if reasons else "no adapter"


def _unfusable_parameter(layer: PeftLayer) -> str | None:
    """Returns why an adapter of a parameter cannot run fused, or None if it can."""
    from ..layers.experts import experts_of
    from ..layers.fused_experts import factors_of, reason_against_parameter

    module = layer.get_base_layer()
    if (kind := experts_of(module)) is None:
        return f"{type(module).__name__} with a forward of its own"
    if layer.merged_adapters:
        return "merged: unmerge it first"
    if has_replaced_forward(layer):
        return "its forward was replaced"
    if reason := reason_against_parameter(kind, module, layer.parameter_name):
        return reason
    found = [factors_of(layer, adapter) for adapter in layer.lora_A]
    reasons = [factors for factors in found if isinstance(factors, str)]
    return None if len(reasons) < len(found) else reasons[0] if reasons else "no adapter"


def _leave_halves(layers: dict[str, PeftLayer], report: Report) -> dict[str, str]:
    """Leaves the adapters of a module's parameters of which another one is left, and returns their names and reasons.
    The outermost computes all of them."""
    left = {id(layers[name].get_base_layer()): name for name, reason in report.left.items() if reason != FUSED}
    halves = {}
    for name in list(report.changed):
        other = left.get(id(layers[name].get_base_layer()))
        if other is not None and is_of_parameter(layers[name]):
            halves[name] = (
                f"{_of_parameter(layers[name])}: beside that of {layers[other].parameter_name!r}, which is left"
            )
            report.left[name] = halves[name]
            del report.changed[name]
    return halves
