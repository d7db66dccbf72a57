"""A model whose layers q, k and v read one x."""

import torch
from torch import nn

import lora_fast as lf

D, LAYERS = 12, ("q", "k", "v")
D_OUT = {"q": D, "k": 6, "v": 6, "o": D}


class Attention(nn.Module):
    """q, k, v of x and o of something else."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        for i, (name, d_out) in enumerate(D_OUT.items()):
            self.add_module(name, nn.Linear(D, d_out, bias=i % 2 == 0, dtype=dtype))

    def forward(self, x, called=LAYERS):
        q, k, v = (getattr(self, name)(x) if name in called else x[..., : D_OUT[name]] for name in LAYERS)
        return self.o(q * torch.cat((k.sin(), v.cos()), -1))


def model_of(dtype=torch.float64, group=True, config=None):
    torch.manual_seed(0)
    model = Attention(dtype)
    lf.inject_(model, config or lf.LoRAConfig(r=3, alpha=6), group=group)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    return model


def settled(model, stage):
    """Calls the model once, if it is to know its groups, forward and backward."""
    if stage == "together":
        model(torch.zeros(2, D, dtype=model.o.weight.dtype, requires_grad=True)).sum().backward()
        model.zero_grad()
        assert lf.groups(model).groups == [LAYERS]
    return model


def x_of(dtype=torch.float64, *shape):
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 5, D)), dtype=dtype).requires_grad_()
