"""Merges the adapters of a model into their frozen weights, and restores the weights."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from ..kernels.grouping import group_by
from ..layers.find import ADAPTER_LAYERS, AdapterLayer, adapter_layers, fused_class
from .change_report import Report


def merge_(model: nn.Module, *, allow_empty: bool = False) -> Report:
    """Merges adapters into their weights: W + scaling · b a, summed in float32 and rounded once. The original weights
    are kept for ``unmerge_``, as a second copy in memory; adapters stay as they are.

    Layers of ours and fused PEFT layers (their active adapters) are merged. PEFT layers that are not fused are left
    alone, because PEFT's own merge does not restore every bit. Weights tied to another module's are left alone, because
    that module would change too.

    Args:
        model: any module with such layers.
        allow_empty: accept that no layer is merged.

    Returns:
        The layers merged, with what a merged layer does not keep (the bound of an NBLoRALinear with a 16-bit weight,
        of which one warning tells), and the reasons of those left alone.

    Raises:
        ArgumentError: no layer to merge. The model is then unchanged.
    """
    layers = adapter_layers(model)
    owners = weight_owners(model)  # of the whole model: a weight may be tied to a module without an adapter
    report = Report("merged")
    for name, layer in layers.items():
        reason = _unmergeable(layer) or _tied(layer, owners)
        (report.left if reason else report.changed)[name] = reason or "adapter folded into its weight"
    report.require_change("model", "at least one layer to merge", allow_empty)
    merged = []
    try:
        for name in report.changed:
            layer = layers[name]
            layer.fold_() if isinstance(layer, ADAPTER_LAYERS) else layer.merge()
            merged.append(layer)
        notes = {name: layers[name].merge_note() for name in report.changed if isinstance(layers[name], ADAPTER_LAYERS)}
    except BaseException:  # out of memory, or an interrupt
        for layer in merged:
            layer.unmerge()
        raise
    notes = {name: note for name, note in notes.items() if note}
    report.changed |= {name: f"{report.changed[name]}; {note}" for name, note in notes.items()}
    if notes:
        name, note = next(iter(notes.items()))
        more = f" ({len(notes)} such layers, listed in the report)" if len(notes) > 1 else ""
        report.note = f"{name}: {note}{more}"
        warnings.warn(f"lora_fast: {report.note}", stacklevel=2)
    return report


def unmerge_(model: nn.Module, *, allow_empty: bool = False) -> Report:
    """Restores the weights that ``merge_``, or ``merge_adapter`` of a fused PEFT model, changed, bit for bit.

    Returns:
        The layers restored, and the reasons of those left alone.

    Raises:
        ArgumentError: no layer to restore, and not ``allow_empty``.
    """
    layers, report = adapter_layers(model), Report("unmerged")
    for name, layer in layers.items():
        if layer._buffers.get("_unmerged_weight") is not None:
            report.changed[name] = "original weight restored"
        else:
            report.left[name] = "merged by PEFT, which keeps no original" if layer.merged else "not merged"
    report.require_change("model", "at least one merged layer", allow_empty)
    for name in report.changed:
        layers[name].unmerge()
    return report


def _unmergeable(layer: AdapterLayer) -> str | None:
    """Returns why a layer cannot be merged, or None if it can."""
    if isinstance(layer, ADAPTER_LAYERS):
        return "already merged" if layer.merged else None
    if type(layer) is not fused_class():
        return "not fused: use lf.fuse_ first (PEFT's own merge does not restore every bit)"
    if layer.disable_adapters:
        return "adapters disabled"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return "active adapter not in this layer"
    if set(active) <= set(layer.merged_adapters):
        return "already merged"
    return None if all(layer._is_plain(name) for name in active) else "adapter that is more than scaling · b a"


def original_weight(layer: AdapterLayer) -> Tensor | None:
    """Returns a layer's frozen weight without its adapters; None where PEFT has merged them and kept no original."""
    kept = layer._buffers.get("_unmerged_weight")
    if kept is not None or layer.merged:
        return kept
    return layer.weight


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Returns id of each parameter → names of the modules that hold it."""
    holders = [(name, p) for name, module in model.named_modules() for p in module._parameters.values()]
    groups = group_by(holders, lambda holder: id(holder[1]))
    return {parameter: [name for name, _ in group] for parameter, group in groups.items()}


def _tied(layer: AdapterLayer, owners: dict[int, list[str]]) -> str | None:
    """Returns the names of the modules that share the layer's weight, as a reason, or None if it is not shared."""
    names = owners[id(layer.weight)]
    return f"one weight held by {' and '.join(names)}: both would change" if len(names) > 1 else None
