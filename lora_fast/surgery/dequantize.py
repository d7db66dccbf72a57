"""dequantize_: replaces quantised weights by plain ones, so that a model can be merged, unloaded and saved whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import checks
from ..layers.find import ADAPTER_LAYERS, AdapterLayer, PeftLayer, adapter_layers, fused_class, holders_of, is_fused
from ..layers.hooks import carry_hook, change_class_, has_replaced_forward, is_hooked
from ..quantized import QuantizedWeight, family_of, quantized_weight, reason_against
from .change_report import Report
from .fuse import share_merges_
from .targets import HOOKED

MODEL_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
CONFIG_MARKS = ("quantization_config", "_is_quantized")


@dataclass
class Place:
    """A quantised layer of a model.

    Attributes:
        name: of the adapter layer over it or, without one, its own.
        module: the layer of the library. layers: the adapter layers over it.
    """

    name: str
    module: nn.Module
    layers: list[AdapterLayer]


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None, *, allow_empty: bool = False) -> Report:
    """Replaces the quantised weights of a model by plain ones, in place, with the values that the quantised ones stand
    for. ``merge_``, ``unload_``, PEFT's ``merge_and_unload`` and a whole ``save_pretrained`` need plain weights.

    Layers of ours and PEFT's LoRA layers keep their adapters, hooks and groups. PEFT's become
    ``peft.tuners.lora.Linear``, fused where they were fused. A quantised layer itself becomes a frozen
    ``torch.nn.Linear``; its bias gets the weight's dtype. A weight that several layers hold stays one weight. Once no
    quantised weight is left, transformers and PEFT take the model for an unquantised one
    (``config.quantization_config``, ``hf_quantizer``, ``is_loaded_in_4bit`` and the like are removed).

    The weights are computed one after the other, so this needs the memory of one weight more than the result. An error
    half way, as out of memory, leaves a model that computes as before, with some weights plain: the error has a note
    that tells how many, and another call replaces the rest.

    Args:
        model: a model with quantised layers of formats that this library knows, with adapters or without.
        dtype: of the new weights: float16, bfloat16, float32 or float64. None takes the dtype from before the weight
            was quantised or, where the format does not record it (LLM.int8()), that of the model's config, else
            float16. The inputs of the layers must have this dtype, or run under autocast: after PEFT's
            ``prepare_model_for_kbit_training``, which makes norms and embeddings float32, pass ``torch.float32``.
        allow_empty: accept that there is no quantised weight.

    Returns:
        The layers changed, and the reasons of those left alone: hooks that a new layer would lose, a weight that is not
        ready or on the meta device, a layer of PEFT that has no counterpart over a plain weight.

    Raises:
        ArgumentError: no quantised weight to replace, a model that is a quantised layer itself, another dtype. The
            model is then unchanged.
    """
    checks.placement(None, dtype)
    if family_of(checks.module(model)) is not None:
        raise checks.ArgumentError("model", "a module that contains quantised layers", type(model).__name__)
    report, chosen, fallback = Report("dequantised"), [], _config_dtype(model)
    for place in _places(model):
        if reason := _irreplaceable(place):
            report.left[place.name] = reason
            continue
        weight: Any = quantized_weight(place.module)
        target = dtype or weight.original_dtype or fallback
        chosen.append((place, target))
        report.changed[place.name] = f"{_becomes(place)} of {target}, from {weight.format}"
    report.require_change("model", "at least one quantised layer of a known format", allow_empty)
    _replace_all_(model, chosen)
    if any(map(is_fused, adapter_layers(model).values())):
        share_merges_(model, report)
    if report.left or any(map(_is_quantized, model.parameters())):
        report.note = "The model still has quantised weights, and counts as quantised"
    else:
        _forget_quantization_(model)
    return report


def _places(model: nn.Module) -> list[Place]:
    """Returns the quantised layers of a model that are of a known family."""
    found: dict[nn.Module, Place] = {}
    for name, layer in adapter_layers(model).items():
        base = layer.base if isinstance(layer, ADAPTER_LAYERS) else layer.get_base_layer()
        if base is not None and family_of(base) is not None:
            found.setdefault(base, Place(name, base, [])).layers.append(layer)
    for name, module in model.named_modules():
        if module not in found and not isinstance(module, ADAPTER_LAYERS) and family_of(module) is not None:
            found[module] = Place(name, module, [])
    return list(found.values())


def _irreplaceable(place: Place) -> str | None:
    """Returns why a quantised layer cannot be replaced, or None if it can."""
    if reason := reason_against(place.module):
        return reason
    if is_hooked(place.module):
        return HOOKED
    for layer in place.layers:
        if isinstance(layer, ADAPTER_LAYERS):
            continue
        if _plain_class(layer) is None:
            return f"PEFT layer {type(layer).__module__}.{type(layer).__name__}, which takes no plain weight"
        if has_replaced_forward(layer):
            return "its forward was replaced"
    return None


def _plain_class(layer: PeftLayer) -> Any:
    """Returns the class of a PEFT layer over a plain weight, None where there is none."""
    from peft.tuners import lora

    from ..layers.fused_quantized import fused_class_of

    if is_fused(layer):
        return fused_class()
    kind: Any = type(layer)
    return lora.Linear if kind is lora.Linear or fused_class_of(kind) is not None else None


def _becomes(place: Place) -> str:
    if not place.layers:
        return "torch.nn.Linear"
    layer = place.layers[0]
    kind: type = type(layer) if isinstance(layer, ADAPTER_LAYERS) else _plain_class(layer)
    return kind.__name__


def _config_dtype(model: nn.Module) -> torch.dtype:
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    return dtype if dtype in checks.FLOATS else torch.float16


def _replace_all_(model: nn.Module, chosen: list[tuple[Place, torch.dtype]]) -> None:
    """Replaces the layers one by one. Nothing else keeps the quantised ones, so that each frees its memory."""
    total = len(chosen)
    holders = holders_of(model, {place.module for place, _ in chosen})
    counts = Counter(id(_weight(place).tensor) for place, _ in chosen)
    shared: dict[int, Any] = {}  # id of a quantised tensor that other layers hold, too → its plain weight
    try:
        while chosen:
            place, dtype = chosen[0]
            weight = _weight(place)
            linear = _plain_linear(weight, dtype, shared.get(id(weight.tensor)))
            if counts[id(weight.tensor)] > 1:
                shared[id(weight.tensor)] = linear.weight
            for parent, key in holders.pop(place.module, ()):
                setattr(parent, key, linear)
            for layer in place.layers:
                _put_over_(layer, linear)
            weight.let_go_()
            chosen.pop(0)
            del place, weight
    except BaseException as error:  # out of memory, or an interrupt
        done = f"{total - len(chosen)} of {total} quantised layers are replaced"
        error.add_note(f"lora_fast: {done}. The model computes as before, and lf.dequantize_ replaces the rest.")
        raise


def _weight(place: Place) -> QuantizedWeight:
    weight: Any = quantized_weight(place.module)  # which is ready: ``_irreplaceable``
    return weight


@torch.no_grad()
def _plain_linear(weight: QuantizedWeight, dtype: torch.dtype, known: nn.Parameter | None) -> nn.Linear:
    """Returns an nn.Linear with the values of a quantised layer, its bias, its mode and its hooks of accelerate.

    Args:
        known: its plain weight, if another layer has the same.
    """
    d_out, d_in = weight.shape
    linear: Any = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=dtype)  # where it allocates nothing
    linear.weight = known if known is not None else nn.Parameter(weight.dequantized(dtype), requires_grad=False)
    bias: Any = getattr(weight.module, "bias", None)
    if isinstance(bias, nn.Parameter):
        bias.data = bias.data.to(dtype)  # the same parameter, which an optimizer may have
        linear.bias = bias
    elif bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    carry_hook(weight.module, linear)
    plain: nn.Linear = linear.train(weight.module.training)
    return plain


def _put_over_(layer: AdapterLayer, linear: nn.Linear) -> None:
    """Gives an adapter layer, of ours or of PEFT, whose quantised base the nn.Linear replaces, what it needs."""
    if isinstance(layer, ADAPTER_LAYERS):
        layer.weight, layer.bias = linear.weight, linear.bias
        del layer.__dict__["base"]
        return
    plain = _plain_class(layer)
    if plain is not type(layer):
        layer.is_target_conv_1d_layer = False  # as the constructor of PEFT's class sets it
        layer.__dict__.pop("get_apply_tensor_subclass", None)  # with which PEFT's layer over torchao quantises a merge
        change_class_(layer, plain)


def _is_quantized(parameter: nn.Parameter) -> bool:
    """Returns whether a parameter is of a format that no family knows."""
    return type(parameter) not in checks.PLAIN or not parameter.is_floating_point()


def _forget_quantization_(model: nn.Module) -> None:
    """Removes what transformers, accelerate and PEFT take as the mark of a quantised model."""
    for module in model.modules():
        for mark in MODEL_MARKS:
            module.__dict__.pop(mark, None)
        for mark in CONFIG_MARKS:
            getattr(module.__dict__.get("config"), "__dict__", {}).pop(mark, None)
