"""Tiny models whose linear layers bitsandbytes has quantised, as transformers quantises them."""

import pytest
import torch
from tiny import llama
from torch import nn

import lora_fast as lf

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = ("nf4", "fp4", "int8")


def quantized_linear(linear, kind="nf4", **options):
    """Returns bitsandbytes' layer with the values of an nn.Linear; without bitsandbytes the test is skipped."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    d_out, d_in = linear.weight.shape
    has_bias = linear.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(d_in, d_out, has_bias, has_fp16_weights=False, **options)
    else:
        compute = options.pop("compute_dtype", linear.weight.dtype)
        layer = bnb.nn.Linear4bit(d_in, d_out, has_bias, compute_dtype=compute, quant_type=kind, **options)
    for name, parameter in linear.named_parameters():
        getattr(layer, name).data = parameter.data.clone()
    return layer.to("cpu").requires_grad_(False)


def quantized_(model, kind="nf4", **options):
    """Quantises the linear layers of a model, but for its head, in place and returns it."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, quantized_linear(module, kind, **options))
    return model


def quantized_llama(kind="nf4", dtype=torch.float32, layers=1, seed=0, **options):
    model = quantized_(llama(seed, dtype, layers=layers), kind, **options)
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # as transformers does
    return model


def quantized_peft_llama(kind="nf4", **options):
    """Returns a PeftModel over ``quantized_llama`` whose adapters are not 0."""
    import peft

    model = quantized_llama(kind)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options)
    return peft.get_peft_model(model, config)


def quantized_injected_llama(kind="nf4", config=None):
    model = quantized_llama(kind)
    lf.inject_(model, config or lf.LoRAConfig(r=4, alpha=8), progress=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model
