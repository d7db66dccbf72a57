"""Models whose linear layers have bitsandbytes' quantised weights, quantised by bitsandbytes' own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FORMATS = ("nf4", "fp4", "int8")


def quantized_linear(linear: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Linear:
    """Returns the layer with its weight in a format of ``FORMATS``: 4 bits with double quantisation and this compute
    dtype, or 8 bits without a threshold. The weight is quantised on its device."""
    import bitsandbytes as bnb

    sizes, weight = (linear.in_features, linear.out_features), linear.weight
    with torch.device("meta"):  # where it allocates nothing
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type=kind)
            options = {"quant_type": kind, "compress_statistics": True, "module": layer}
            layer.weight = bnb.nn.Params4bit(weight.detach().cpu(), requires_grad=False, **options)
    layer.bias = linear.bias
    return layer.to(weight.device).train(linear.training)


def quantize_(model: nn.Module, kind: str, dtype: torch.dtype) -> nn.Module:
    """Replaces the linear layers of a model, but for its head, and returns the model, which PEFT takes as one that
    transformers has loaded so."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, quantized_linear(child, kind, dtype))
    target: Any = model
    target.is_loaded_in_4bit, target.is_loaded_in_8bit = kind != "int8", kind == "int8"
    return model.requires_grad_(False)
