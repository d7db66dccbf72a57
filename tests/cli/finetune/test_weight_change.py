"""The stable rank of what training changed, against a full singular value decomposition."""

import pytest
import tiny
import torch

from lora_fast.cli.finetune.weight_change import mean_erank
from lora_fast.layers.find import peft_layers


def test_mean_erank_equals_that_of_a_full_svd():
    torch.manual_seed(0)
    start, model = tiny.llama(), tiny.peft_llama()
    eranks = []
    for name, layer in peft_layers(model).items():
        weight = layer.get_base_layer().weight
        weight.data += torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1])
        before = start.get_submodule(name.removeprefix("base_model.model.")).weight
        sigma = torch.linalg.svdvals((weight - before + layer.get_delta_weight("default")).double())
        eranks.append((sigma.square().sum() / sigma[0].square()).item())
    assert mean_erank(model, start) == pytest.approx(sum(eranks) / len(eranks), rel=1e-3)
