"""Models whose layers share a weight or have one alone, for tests of merging."""

import copy

import peft
import torch
from tiny import llama
from torch import nn

import lora_fast as lf


def set_factors_(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "free_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def tied_llama():
    """lm_head and embed_tokens, over one weight, with two adapters each."""
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(llama(tied=True, layers=1), config)
    model.add_adapter("second", config)
    lf.fuse_(set_factors_(model))
    base = model.base_model.model
    return model, [base.model.embed_tokens, base.lm_head], base.lm_head.base_layer.weight


def two_layers_of_ours():
    linear = nn.Linear(24, 16)
    kinds = ((lf.LoRALinear, {"alpha": 8}), (lf.NBLoRALinear, {"norm": "nuclear"}), (lf.SingLoRALinear, {"alpha": 8}))
    layers = [kind.from_linear(linear, r=2, **settings) for kind, settings in kinds]
    model = set_factors_(nn.ModuleList(layers))
    assert len({id(layer.weight) for layer in layers}) == 1
    return model, layers, linear.weight


def delta(layer, adapter):
    """Returns an adapter's ΔW in float64, by PEFT's formula."""
    if isinstance(layer, lf.LoRALinear | lf.NBLoRALinear | lf.SingLoRALinear):
        return layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return copy.deepcopy(layer).double().get_delta_weight(adapter).detach()


def merge(layer, adapter, **options):
    layer.merge(adapter_names=[adapter], **options) if hasattr(layer, "lora_variant") else layer.merge()


def lf_free_copy(model):
    copied = copy.deepcopy(model)
    lf.unfuse_(copied)
    assert {type(layer).__module__ for layer in copied.modules() if hasattr(layer, "merge")} == {
        "peft.tuners.lora.layer"
    }
    return copied


def fused_linear():
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh())
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    lf.fuse_(set_factors_(model))
    return model, model.base_model.model[0], model.base_model.model[0].base_layer


def injected_linear():
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh())
    lf.inject_(model, lf.LoRAConfig(r=2))
    return set_factors_(model), model[0], model[0]


ONE = {"fused": fused_linear, "injected": injected_linear}
