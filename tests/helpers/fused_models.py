"""PEFT models with fused layers, and changes under which a layer cannot run fused."""

from tiny import peft_llama
from torch import nn

import lora_fast as lf
from lora_fast.layers.fused_experts import FusedParamWrapper
from lora_fast.layers.fused_peft import FusedLoraLinear

LLAMA_LINEARS = 14  # in two layers
PROBE = "base_model.model.model.layers.0.self_attn.q_proj"


def fused_llama(group=True, **options):
    model = peft_llama(**options)
    lf.fuse_(model, group=group)
    return model


def fused_layers(model):
    return [module for module in model.modules() if type(module) in (FusedLoraLinear, FusedParamWrapper)]


def probe_model(**options):
    return peft_llama(targets=["q_proj"], **options)


def hook_base(model):
    model.get_submodule(PROBE).base_layer.register_forward_hook(lambda module, args, output: output + 1)


def patch_base(model):
    base = model.get_submodule(PROBE).base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight) + 1


def train_base(model):
    model.get_submodule(PROBE).base_layer.weight.requires_grad_()


def hook_lora(model):
    model.get_submodule(PROBE).lora_A["default"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def merge_all(model):
    model.merge_adapter()
