"""Opacus: gradients of each sample, and training with differential privacy."""

import pytest
import torch
from side_by_side import assert_same, factors
from tiny import fill
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workflows import workflow

import lora_fast as lf

opacus = pytest.importorskip("opacus", reason="pip install '.[works-with]'")
peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

LIBRARY = "opacus"
LAYERS = 2
HOOKED = "hooks, or a replaced forward, on the base layer or the adapter"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()


def build():
    return fill(peft.get_peft_model(net(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"])))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (12,), generator=generator)


def samples_gradients(module):
    x, y = data()
    nn.functional.cross_entropy(module(x), y, reduction="sum").backward()
    return {name: p.grad_sample for name, p in module.named_parameters() if p.requires_grad}


def one_by_one(model):
    """Returns the gradient of each sample, computed alone."""
    x, y = data()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    gradients = [torch.autograd.grad(row, trained.values()) for row in rows]
    return dict(zip(trained, map(torch.stack, zip(*gradients, strict=True)), strict=True))


@workflow("`GradSampleModule` of a PEFT model", "each sample's gradients: the same bits, by PEFT's forward")
def test_gradients_of_samples():
    def run(prepare):
        return samples_gradients(opacus.GradSampleModule(prepare(build()), loss_reduction="sum"))

    ours = assert_same(run, LAYERS, reason=HOOKED)
    wanted = {f"_module.{name}": value for name, value in one_by_one(build()).items()}
    torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=0)


@workflow(
    "`GradSampleModule` of layers of `lf.inject_`",
    "each sample's gradients, as one by one: 1e-12, float64",
)
def test_gradients_of_samples_of_injected_layers():
    model = net()
    lf.inject_(model, lf.LoRAConfig(r=2, alpha=4))
    wanted = one_by_one(fill(model))
    assert model[0].fallback_reason is None
    ours = samples_gradients(opacus.GradSampleModule(model, loss_reduction="sum"))
    assert model[0].fallback_reason is None  # Opacus runs a copy of the layer under torch.func
    torch.testing.assert_close({name[8:]: value for name, value in ours.items()}, wanted, atol=1e-12, rtol=0)


@workflow("`PrivacyEngine.make_private`, then training", "losses and factors: the same bits, by PEFT's forward")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_private_training(mode):
    def run(prepare):
        model, x_y, losses = prepare(build()), data(), []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        criterion = nn.CrossEntropyLoss()
        settings = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "poisson_sampling": False, "grad_sample_mode": mode}
        settings |= {"noise_generator": torch.Generator().manual_seed(2)}
        if mode == "ghost":
            settings["criterion"] = criterion
        loader = DataLoader(TensorDataset(*x_y), 4)
        parts = opacus.PrivacyEngine().make_private(module=model, optimizer=optimizer, data_loader=loader, **settings)
        private, optimizer, loader = parts[0], parts[1], parts[-1]
        criterion = parts[2] if mode == "ghost" else criterion
        for x, y in loader:
            loss = criterion(private(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, factors(model)

    assert_same(run, LAYERS, reason=HOOKED)


@workflow("Fused again once Opacus has removed its hooks (`to_standard_module`)", "outputs: 1e-12, float64")
def test_hooks_removed():
    def run(prepare):
        model = prepare(build())
        wrapped = opacus.GradSampleModule(model)
        samples_gradients(wrapped)
        return wrapped.to_standard_module()(data()[0])

    assert_same(run, LAYERS, atol=1e-12)
