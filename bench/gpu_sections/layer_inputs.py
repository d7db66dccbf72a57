"""Inputs of the sections of bench/gpu.py: a LoRA layer in bfloat16, and rows for it."""

import torch
from torch import Tensor, nn

import lora_fast as lf


def layer(d_in: int, d_out: int, r: int, dropout: float, device: torch.device) -> lf.LoRALinear:
    """Returns a layer with b ≠ 0; every call returns the same values."""
    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out, bias=False, device=device, dtype=torch.bfloat16)
    module = lf.LoRALinear.from_linear(linear, r=r, alpha=2 * r, dropout=dropout)
    nn.init.normal_(module.lora_B, std=0.02)
    return module


def forward_backward(module: lf.LoRALinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Returns y, dx, da and db, the last three as the tensors in ``.grad``."""
    for t in (x, module.lora_A, module.lora_B):
        t.grad = None
    y = module(x)
    y.backward(dy)
    return [y, x.grad, module.lora_A.grad, module.lora_B.grad]


def rows(n: int, d: int, device: torch.device) -> Tensor:
    return torch.randn(n, d, device=device).bfloat16()
