"""Small nets of two linear layers with adapters of every kind."""

import peft
import torch
from torch import nn

import lora_fast as lf

IN, HIDDEN, RANK = 64, 48, 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, IN))


def plain(dropout=0.0):
    config = peft.LoraConfig(r=RANK, target_modules=["0", "2"], init_lora_weights=False, lora_dropout=dropout)
    return peft.get_peft_model(net(), config).base_model.model


def fused(dropout=0.0):
    model = plain(dropout)
    lf.fuse_(model)
    return model


def injected(kind):
    def build(dropout=0.0):
        model = net()
        lf.inject_(model, kind(r=RANK, dropout=dropout))
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "free_b")):
                nn.init.normal_(parameter, std=0.2)
        return model

    return build


OURS = {
    "fused": fused,
    "LoRALinear": injected(lf.LoRAConfig),
    "SingLoRALinear": injected(lambda **settings: lf.SingLoRAConfig(**settings, ramp_steps=0)),
    "NBLoRALinear": injected(lf.NBLoRAConfig),
}
