"""Statistics of adapters against the singular values of the explicit products."""

import expert_models as experts
import peft
import pytest
import tiny
import torch
from torch import nn

import lora_fast as lf


def test_stats_are_those_of_the_explicit_products():
    model = tiny.injected_llama()
    stats = lf.metrics.adapter_stats(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, lf.LoRALinear)}
    assert list(stats) == list(layers)
    for name, layer in layers.items():
        a, b, got = layer.lora_A.double(), layer.lora_B.double(), stats[name]
        sigma = torch.linalg.svdvals(layer.scaling * b @ a)[: layer.r]
        sa, sb = torch.linalg.svdvals(a), torch.linalg.svdvals(b)
        want = [
            *(a.norm(), b.norm(), a.square().mean().sqrt() / b.square().mean().sqrt()),
            *(sigma.norm(), sigma[0], sigma.sum(), (sigma > 0.005).sum(), sigma.norm() ** 2 / sigma[0] ** 2),
            *((a @ a.T - b.T @ b).norm(), (a @ a.T - layer.r / len(b) * b.T @ b).norm()),
            (sa[0] ** 2 + sb[0] ** 2) / min(sa[-1], sb[-1]) ** 2,
        ]
        for field, value in zip(vars(got).values(), want, strict=True):
            assert field == pytest.approx(value.item(), rel=1e-4), name
    assert lf.metrics.adapter_stats(tiny.llama()) == {}


def test_stats_of_other_adapters_are_those_of_the_product_or_missing():
    """DoRA's magnitudes are left aside; adapters of embeddings and convolutions have no product b a of matrices."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(6, 5), "embedding": nn.Embedding(7, 6), "conv": nn.Conv2d(3, 4, 3)})
    config = peft.LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=["linear", "embedding", "conv"])
    model = peft.get_peft_model(model, config)
    layer = model.base_model.model["linear"]
    nn.init.normal_(layer.lora_B["default"].weight)
    ((name, row),) = lf.metrics.adapter_stats(model).items()
    assert name == "base_model.model.linear.default"
    product = 3 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    assert row.frobenius == pytest.approx(product.norm().item(), rel=1e-5)
    assert row.nuclear == pytest.approx(torch.linalg.svdvals(product).sum().item(), rel=1e-5)


@experts.both_layouts
def test_stats_have_an_entry_for_each_expert(is_transposed):
    model, (wrapper,) = experts.experts_model(is_transposed)
    stats = lf.metrics.adapter_stats(model)
    prefix = "base_model.model.0.experts.default."
    assert list(stats) == [f"{prefix}{e}" for e in range(experts.E)]
    deltas = experts.matrices(wrapper, wrapper.get_delta_weight("default"))
    for (a, b), delta, row in zip(experts.factors(wrapper)[0], deltas, stats.values(), strict=True):
        sigma = torch.linalg.svdvals(delta)
        norm_a, norm_b = torch.linalg.matrix_norm(a), torch.linalg.matrix_norm(b)
        unbalanced = torch.linalg.matrix_norm(a @ a.mT - b.mT @ b)
        imbalance = torch.linalg.matrix_norm(a @ a.mT - experts.R / len(b) * b.mT @ b)
        want = {
            "norm_a": norm_a,
            "norm_b": norm_b,
            "rms_ratio": norm_a / norm_b * (len(b) / a.shape[1]) ** 0.5,
            "frobenius": sigma.square().sum().sqrt(),
            "spectral": sigma[0],
            "nuclear": sigma.sum(),
            "rank": (sigma > 0.005).sum(),
            "erank": sigma.square().sum() / sigma[0] ** 2,
            "unbalanced": unbalanced,
            "imbalance": imbalance,
        }
        for name, value in want.items():
            assert getattr(row, name) == pytest.approx(value.item(), rel=1e-9), name
