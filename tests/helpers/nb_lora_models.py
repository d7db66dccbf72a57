"""Norm-bounded models whose adapters are not 0."""

import torch
from torch import nn

import lora_fast as lf

NORMS = ["spectral", "frobenius", "nuclear"]


@torch.no_grad()
def scatter(model: nn.Module, size=1.0, seed=1) -> nn.Module:
    """Sets random free parameters and returns the model. The initial ones give b = 0, which would hide most errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "free_" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = size if "scale" in name else size / parameter.shape["free_a" in name] ** 0.5
            parameter.copy_(values * scale)
    return model


def layers_of(model) -> list[lf.NBLoRALinear]:
    return [module for module in model.modules() if isinstance(module, lf.NBLoRALinear)]
