"""Measures the stable rank of what training changed, if it changed the frozen weights too."""

from __future__ import annotations

import statistics

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

SINGULAR_VALUES, ITERATIONS = 8, 8  # of the randomised SVD; enough for a few digits of the largest singular value


@torch.no_grad()
def mean_erank(model: PeftModel, start: nn.Module) -> float:
    """Returns the stable rank ‖D‖²_F / ‖D‖²₂ of D = W + s b a − W₀, averaged over all adapted layers. ``start`` is the
    model before training, which has W₀. Computes in float32, one layer at a time to save memory."""
    eranks = []
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().get_parameter("weight")
            before = start.get_parameter(f"{name}.weight").to(weight.device, torch.float32)
            # The layers of all kinds have this method; only their base class does not declare it.
            delta = layer.get_delta_weight(layer.active_adapters[0]).float()  # type: ignore[attr-defined]
            eranks.append(_erank(weight.float() - before + delta))
    return statistics.fmean(torch.stack(eranks).tolist())


def _erank(matrix: Tensor) -> Tensor:
    """Returns the stable rank of a matrix. Estimates its largest singular value, since full decompositions take minutes
    for a large model."""
    count = min(SINGULAR_VALUES, *matrix.shape)
    with torch.random.fork_rng():  # svd_lowrank draws a random matrix; training must not see that
        torch.manual_seed(0)
        largest = torch.svd_lowrank(matrix, count, ITERATIONS)[1][0]
    return torch.where(largest > 0, matrix.square().sum() / largest.square(), 0.0)
