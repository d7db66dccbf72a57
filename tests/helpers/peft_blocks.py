"""A small residual network of two blocks with PEFT's layers, for workflows of torch itself."""

from __future__ import annotations

import peft
import torch
from tiny import fill
from torch import Tensor, nn

WIDTH, LAYERS = 8, 4  # two fused layers in each block
TARGETS = ["up", "down"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Its ``run_block`` may be replaced, as by checkpointing."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run_block(block, x)
        return x

    @staticmethod
    def run_block(block: nn.Module, x: Tensor) -> Tensor:
        return block(x)


def plain_net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def build(dtype: torch.dtype = torch.float64, **options) -> peft.PeftModel:
    """Returns the network with an adapter in all of its linear layers."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, **options)
    return fill(peft.get_peft_model(plain_net(dtype), config))


def net_of(model: nn.Module) -> Net:
    """Returns the network of a model that may be a PeftModel."""
    return model if isinstance(model, Net) else model.base_model.model


def inputs(step: int, rows: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step), dtype=dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(inputs(step, dtype=dtype)) - 1).square().mean()
