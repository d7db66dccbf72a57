"""Merges the adapters of a model into their frozen weights, and restores the weights."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from .. import checks
from ..kernels.grouping import group_by
from ..layers.find import ADAPTER_LAYERS, AdapterLayer, adapter_layers, is_exact, is_fused, is_of_parameter
from ..layers.merging import CHANGED, KEEP_ORIGINALS
from ..quantized import reason_against_merge
from .change_report import Report


def merge_(model: nn.Module, *, keep_originals: str = "host", allow_empty: bool = False) -> Report:
    """Merges adapters into their weights: W + scaling · b a, summed in float32 and rounded once. The original weights
    are kept for ``unmerge_``; adapters stay as they are. ``unload_`` gives a plain model instead.

    Layers of ours and fused PEFT layers (their active adapters) are merged. PEFT layers that are not fused are left
    alone, because PEFT's own merge does not restore every bit. Weights tied to another module's are left alone, because
    that module would change too. So are weights that the layer itself does not have: offloaded by accelerate, sharded,
    quantised, on the meta device.

    Args:
        model: any module with such layers.
        keep_originals: where the originals of weights on a GPU are kept. ``"host"``: in the host's memory, pinned if
            the host can pin as much, so that the GPU holds the model once. ``"device"``: where they are. Originals of
            weights in the host's memory stay there. ``merge_adapter`` of a fused PEFT model keeps them as ``"host"``
            (not verified on a GPU).
        allow_empty: accept that no layer is merged.

    Returns:
        The layers merged, with what a merged layer does not keep (the bound of an NBLoRALinear with a 16-bit weight,
        of which one warning tells), and the reasons of those left alone.

    Raises:
        ArgumentError: no layer to merge, or an unknown place. The model is then unchanged.
    """
    checks.choice(keep_originals, "keep_originals", KEEP_ORIGINALS)
    layers = adapter_layers(model)
    owners = weight_owners(model)  # of the whole model: a weight may be tied to a module without an adapter
    report = Report("merged")
    for name, layer in layers.items():
        reason = unmergeable(layer) or tied(layer, owners)
        (report.left if reason else report.changed)[name] = reason or "adapter folded into its weight"
    report.require_change("model", "at least one layer to merge", allow_empty)
    merged = []
    try:
        for name in report.changed:
            merged.append((layers[name], _merge(layers[name], keep_originals)))
        notes = {name: layers[name].merge_note() for name in report.changed if isinstance(layers[name], ADAPTER_LAYERS)}
    except BaseException:  # out of memory, or an interrupt
        for layer, adapters in merged:
            layer.unmerge(*adapters)
        raise
    warn_of_notes(report, notes)
    return report


def unmerge_(model: nn.Module, *, allow_empty: bool = False) -> Report:
    """Restores the weights that ``merge_``, or ``merge_adapter`` of a fused PEFT model, changed, bit for bit. From a
    weight that others have changed since then, the adapter is subtracted, as PEFT does.

    Returns:
        The layers restored, and the reasons of those left alone: not merged, merged by PEFT's own arithmetic, or with a
        weight that was replaced, resized, offloaded or sharded after it was merged.

    Raises:
        ArgumentError: no layer to restore, and not ``allow_empty``.
    """
    layers, report = adapter_layers(model), Report("unmerged")
    for name, layer in layers.items():
        reason = not_unmergeable(layer)
        if reason:
            report.left[name] = reason
        elif layer._merged.is_changed():
            report.changed[name] = f"adapter subtracted, with rounding: {CHANGED}"
        else:
            report.changed[name] = "original weight restored"
    report.require_change("model", "at least one merged layer", allow_empty)
    for name in report.changed:
        layers[name].unmerge()
    return report


def unmergeable(layer: AdapterLayer) -> str | None:
    """Returns why a layer cannot be merged, or None if it can."""
    if isinstance(layer, ADAPTER_LAYERS):
        return layer.unmergeable()
    if not is_fused(layer):
        return "not fused: use lf.fuse_ first (PEFT's own merge does not restore every bit)"
    if is_of_parameter(layer):
        return f"adapter of the parameter {layer.parameter_name!r}, which PEFT merges (model.merge_adapter)"
    if not is_exact(layer):
        return reason_against_merge(layer.get_base_layer())
    if layer.disable_adapters:
        return "adapters disabled"
    active = _unmerged_adapters(layer)
    if not active:
        present = any(name in layer.lora_A for name in layer.active_adapters)
        return "already merged" if present else "active adapter not in this layer"
    if layer.merged_adapters and not layer.merged_exactly:
        return "merged by PEFT, which keeps no original"
    return layer.inexact_together(active)


def not_unmergeable(layer: AdapterLayer) -> str | None:
    """Returns why a layer cannot be unmerged bit for bit, or None if it can."""
    if isinstance(layer, ADAPTER_LAYERS) or is_exact(layer):
        return layer.not_unmergeable()
    return "merged by PEFT, which keeps no original" if layer.merged else "not merged"


def original_weight(layer: AdapterLayer) -> Tensor | None:
    """Returns a layer's frozen weight without its adapters, that of a merged layer perhaps in the host's memory; None
    where it is not known: PEFT has merged them and kept no original, or others have changed a merged PEFT layer."""
    if isinstance(layer, ADAPTER_LAYERS) or is_exact(layer):
        return layer.original_weight()
    return None if layer.merged else layer.weight


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Returns id of each parameter → names of the modules that hold it."""
    holders = [(name, p) for name, module in model.named_modules() for p in module._parameters.values()]
    groups = group_by(holders, lambda holder: id(holder[1]))
    return {parameter: [name for name, _ in group] for parameter, group in groups.items()}


def tied(layer: AdapterLayer, owners: dict[int, list[str]]) -> str | None:
    """Returns the names of the modules that share the layer's weight, as a reason, or None if it is not shared."""
    names = owners.get(id(layer.weight), [])
    return f"one weight held by {' and '.join(names)}: both would change" if len(names) > 1 else None


def warn_of_notes(report: Report, notes: dict[str, str]) -> None:
    """Adds what merged layers do not keep to the report, and warns once of all of them."""
    notes = {name: note for name, note in notes.items() if note}
    report.changed |= {name: f"{report.changed[name]}; {note}" for name, note in notes.items()}
    if notes:
        name, note = next(iter(notes.items()))
        more = f" ({len(notes)} such layers, listed in the report)" if len(notes) > 1 else ""
        report.note = f"{name}: {note}{more}"
        warnings.warn(f"lora_fast: {report.note}", stacklevel=3)


def _merge(layer: AdapterLayer, keep_originals: str) -> tuple[list[str], ...]:
    """Merges a layer and returns the arguments with which its ``unmerge`` takes back just that."""
    if isinstance(layer, ADAPTER_LAYERS):
        layer.fold_(keep_originals)
        return ()
    names = _unmerged_adapters(layer)
    layer.merge_exactly(names, keep_originals)
    return (names,)


def _unmerged_adapters(layer: AdapterLayer) -> list[str]:
    """Returns the active adapters that a fused PEFT layer has and has not merged."""
    return [name for name in layer.active_adapters if name in layer.lora_A and name not in layer.merged_adapters]
