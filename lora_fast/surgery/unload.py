"""unload_: replaces adapter layers by plain linear layers, with the adapters merged into their weights or without."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .. import checks
from ..layers.find import ADAPTER_LAYERS, AdapterLayer, holders_of, peft_layers
from ..layers.hooks import is_hooked
from ..layers.nb_lora import unshare_factors_
from .change_report import Report
from .merge import tied, warn_of_notes, weight_owners

AFTER_UNLOADING: list[Callable[[nn.Module], None]] = []  # each is called with the model, once its layers are replaced


def unload_(model: nn.Module, *, merge: bool = True, allow_empty: bool = False) -> Report:
    """Replaces the adapter layers of a model that went through ``inject_`` by ``torch.nn.Linear``, in place, as PEFT's
    ``merge_and_unload`` and ``unload`` do for its own. The model then is a plain one: its ``state_dict`` has the keys
    that it had before ``inject_``, and ``save_pretrained`` writes a whole model.

    The linear layers get the parameters themselves, which stay frozen, the mode (training or not), and accelerate's
    hooks that move the input. A layer over a quantised weight gives the library's own layer back, but it cannot be
    merged (``dequantize_`` first). The layers are replaced one by one, so that merging needs the memory of one weight
    more.

    Args:
        model: a model with layers of ours. For PEFT's use ``model.merge_and_unload()``.
        merge: merge each adapter into its weight, summed in float32 and rounded once. With False the adapters are
            dropped, and merged layers are unmerged, bit for bit.
        allow_empty: accept that there is no layer of ours.

    Returns:
        The layers replaced, with what a merged weight does not keep (as ``merge_``).

    Raises:
        ArgumentError: no such layer, a model that is one itself, PEFT's layers, or a layer that cannot be merged or
            replaced (a weight tied to another module's, without data or sharded; hooks). The model is then unchanged.
    """
    checks.flag(merge, "merge")
    if peft_layers(model):
        expected = "a model with layers of ours; for PEFT's, model.merge_and_unload() or model.unload()"
        raise checks.ArgumentError("model", expected, f"PEFT layers in a {type(model).__name__}")
    if isinstance(model, ADAPTER_LAYERS):
        raise checks.ArgumentError("model", "a module that contains adapter layers", type(model).__name__)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ADAPTER_LAYERS)}
    report, owners = Report("unloaded"), weight_owners(model)
    for name, layer in layers.items():
        if reason := _unreplaceable(layer, merge, owners):
            report.left[name] = reason
        else:
            plain = "Conv1D" if layer.fan_in_fan_out else "torch.nn.Linear"
            kind = plain if layer.base is None else f"{type(layer.base).__module__}.{type(layer.base).__name__}"
            report.changed[name] = f"{kind}, adapter folded into its weight" if merge else kind
    if report.left:
        expected = "layers that can all be merged and replaced" if merge else "layers that can all be replaced"
        raise checks.ArgumentError("model", expected, report.reasons())
    report.require_change("model", "at least one adapter layer to replace", allow_empty)
    holders = holders_of(model, set(layers.values()))
    notes = {}
    for name, layer in layers.items():
        if merge:
            layer.fold_("device")  # the original is dropped with the layer
            notes[name] = layer.merge_note()
        else:
            layer.unmerge()
        linear = layer.to_linear()
        for parent, key in holders[layer]:
            setattr(parent, key, linear)
    unshare_factors_(model)
    for function in AFTER_UNLOADING:
        function(model)
    warn_of_notes(report, notes)
    return report


def _unreplaceable(layer: AdapterLayer, merge: bool, owners: dict[int, list[str]]) -> str | None:
    """Returns why a layer cannot be replaced, or None if it can."""
    if is_hooked(layer):
        return "hooks, or a replaced forward, which a plain layer would lose"
    if layer.disabled:
        return "adapters disabled"
    if layer.merged:
        return layer.not_unmergeable()
    return (layer.unmergeable() or tied(layer, owners)) if merge else None
