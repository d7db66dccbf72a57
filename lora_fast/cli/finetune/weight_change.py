"""How much of a layer's space training has used, where it changed the frozen weights too."""

from __future__ import annotations

import statistics

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

WANTED, ITERATIONS = 8, 8  # singular values sought, and passes: the largest is then known to a few digits


@torch.no_grad()
def mean_erank(model: PeftModel, start: nn.Module) -> float:
    """Stable rank ‖D‖²_F / ‖D‖²₂ of D = W + s b a − W₀, the mean over all adapted layers. ``start``: the model before
    training, which holds W₀. One layer at a time, in float32."""
    eranks = []
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            before = start.get_submodule(name).weight.to(weight.device, torch.float32)
            added = layer.get_delta_weight(layer.active_adapters[0]).float()
            eranks.append(_erank(weight.float() - before + added))
    return statistics.fmean(torch.stack(eranks).tolist())


def _erank(matrix: Tensor) -> Tensor:
    """By a few of the largest singular values: the whole decomposition takes minutes for a large model."""
    wanted = min(WANTED, *matrix.shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        largest = torch.svd_lowrank(matrix, wanted, ITERATIONS)[1][0]
    return torch.where(largest > 0, matrix.square().sum() / largest.square(), 0.0)
