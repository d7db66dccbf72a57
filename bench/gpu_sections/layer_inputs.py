"""What the sections of bench/gpu.py run on: a LoRA layer in bfloat16 and rows for it."""

import torch
from torch import Tensor, nn

import lora_fast as lf


def layer(d_in: int, d_out: int, r: int, dropout: float, device: torch.device) -> lf.LoRALinear:
    """The same one at every call; b is not zero."""
    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out, bias=False, device=device, dtype=torch.bfloat16)
    module = lf.LoRALinear.from_linear(linear, r=r, alpha=2 * r, dropout=dropout)
    nn.init.normal_(module.lora_B, std=0.02)
    return module


def forward_backward(module: lf.LoRALinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, da, db."""
    for t in (x, module.lora_A, module.lora_B):
        t.grad = None
    y = module(x)
    y.backward(dy)
    return [y, x.grad, module.lora_A.grad, module.lora_B.grad]


def rows(n: int, d: int, device: torch.device) -> Tensor:
    return torch.randn(n, d, device=device).bfloat16()
