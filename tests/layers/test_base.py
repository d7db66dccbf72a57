"""AdapterLinear: what a subclass gets from it, shown by one of a dozen lines (LoRA-FA, which trains only b)."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import lora_fast as lf
from lora_fast.layers.base import AdapterLinear

CONFIGS = {
    "LoRALinear": lf.LoRAConfig(r=4),
    "NBLoRALinear": lf.NBLoRAConfig(r=4),
    "SingLoRALinear": lf.SingLoRAConfig(r=4, ramp_steps=0),
}
EACH_KIND = pytest.mark.parametrize("kind", CONFIGS)


def injected(kind):
    """Returns a model of one layer in float64 whose adapter has an effect."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6, dtype=torch.float64))
    lf.inject_(model, CONFIGS[kind], progress=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


class OnlyB(AdapterLinear):
    """A layer with a frozen random a and a trained b."""

    TRAINABLE = SAVED_STATE = ("free_b",)
    INIT_ARGUMENTS = ("alpha",)

    def __init__(self, in_features, out_features, *, r, alpha=1.0, dropout=0.0, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, r, dropout, bias, device, dtype)
        self.alpha, self.scaling = alpha, alpha / r
        self.free_b = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_adapter(self):
        nn.init.ones_(self.free_b)

    @property
    def lora_A(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.r, self.in_features, generator=generator).to(self.free_b)

    @property
    def lora_B(self):
        return self.free_b


def inputs():
    return torch.randn(3, 10, generator=torch.Generator().manual_seed(1))


def test_subclass_shares_the_linear_and_adds_its_parameters():
    linear = nn.Linear(10, 6, dtype=torch.bfloat16).eval()
    layer = OnlyB.from_linear(linear, r=4, alpha=2.0, dropout=0.5)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    trained = {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"free_b": torch.float32}
    assert list(layer.state_dict()) == ["weight", "bias", "free_b"]
    assert repr(layer) == "OnlyB(in_features=10, out_features=6, r=4, alpha=2.0, dropout=0.5, bias=True)"


def test_subclass_runs_forward_backward_and_merge():
    layer, x = OnlyB(10, 6, r=4, alpha=2.0), inputs()
    weight = layer.weight.clone()
    expected = nn.functional.linear(x, weight + 0.5 * layer.lora_B @ layer.lora_A, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.free_b.grad, 0.5 * (x @ layer.lora_A.T).sum(0).expand(6, 4))
    layer.merge()
    assert layer.merged and repr(layer).endswith(", merged)")
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_dropout_is_active_in_training_only():
    layer, x = OnlyB(10, 6, r=4, dropout=0.5), inputs()
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_load_free_restores_the_saved_state():
    layer, other = OnlyB(10, 6, r=4), OnlyB(10, 6, r=4)
    other.load_free_(torch.full((6, 4), 3.0))
    assert (other.free_b == 3).all()
    with pytest.raises(lf.ArgumentError, match=r"^adapter: expected the parameters of a OnlyB beside it"):
        layer.free_parameters_for(layer.lora_A, layer.lora_B)


@pytest.mark.parametrize("linear", [nn.Identity(), None], ids=["Identity", "None"])
def test_from_linear_refuses_other_modules(linear):
    expected = r"^linear: expected a torch.nn.Linear, transformers. Conv1D or a layer with a quantised weight, got "
    with pytest.raises(lf.ArgumentError, match=expected):
        OnlyB.from_linear(linear, r=2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [lf.LoRAConfig(r=2), lf.NBLoRAConfig(r=2), lf.SingLoRAConfig(r=2, ramp_steps=0)])
def test_layers_run_on_the_meta_device_as_nn_linear_does(config, autocast):
    """Tools that estimate memory do this, also while autocast is on for another device."""
    model = nn.Sequential(nn.Linear(6, 4))
    lf.inject_(model, config)
    model.to("meta")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(torch.empty(3, 6, device="meta"))
    assert y.is_meta and y.shape == (3, 4) and y.dtype == torch.float32


@EACH_KIND
def test_weight_computed_from_others_passes_their_gradient_on(kind):
    """Hypernetworks, masks and MAML's fast weights call the model with such a weight. Twice the gradient of the frozen
    product, because y is its square here."""
    model, x = injected(kind), inputs().double()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    run = lambda scale: torch.func.functional_call(model, {"0.weight": model[0].weight * scale}, (x,)).square().sum()
    run(scale).backward()
    expected = (2 * model(x).detach() * (x @ model[0].weight.T)).sum()
    torch.testing.assert_close(scale.grad, expected)
    torch.testing.assert_close(torch.func.grad(run)(scale.detach()), expected)
    run(scale)
    assert model[0].fallback_reason == "a weight that is computed from others"


@EACH_KIND
@pytest.mark.parametrize("of", ["weight", "first factor"])
def test_pruned_layer_computes_with_its_masked_parameter(kind, of):
    """torch.nn.utils.prune replaces a parameter by one of another name and an attribute."""
    model, x = injected(kind), inputs().double()
    name = "weight" if of == "weight" else type(model[0]).TRAINABLE[0]
    masked = copy.deepcopy(model)
    nn.utils.prune.l1_unstructured(model[0], name, 0.5)
    masked[0].get_parameter(name).data.copy_(getattr(model[0], name))
    assert not torch.equal(model(x), injected(kind)(x))
    torch.testing.assert_close(model(x), masked(x))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_optimizer_takes_a_layer_whose_weight_is_parametrized():
    model = injected("LoRALinear")
    nn.utils.parametrizations.weight_norm(model[0], "weight")
    lf.optim.LoRAAdamW(model)
    with pytest.raises(lf.ArgumentError, match="weight that a parametrization computes"):
        lf.optim.LoRAAdamW(model, methods=[lf.methods.ScaLoRA()])
