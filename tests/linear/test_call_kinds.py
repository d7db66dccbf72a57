"""Every kind of call gives PEFT's result and gradients, or those of the plain formula; PEFT's refusals are refused. The
summary of pytest has the counts."""

import copy

import peft
import pytest
import torch
from call_kinds import KINDS, WIDTH
from torch import nn
from torch.nn.functional import linear

import lora_fast as lf

BACKENDS = ("torch", "triton")


class Formula(nn.Module):
    """The layer as plain torch ops, with the parameters of one of our layers under the same names."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        self.scaling, self.dropout_p = layer.scaling, 0.0
        self.bound = getattr(layer, "applied_bound", None)

    def forward(self, x):
        a, b = self.factors()
        dropped = nn.functional.dropout(x, self.dropout_p, self.training)
        return linear(x, self.weight, self.bias) + self.scaling * linear(linear(dropped, a), b)

    def factors(self):
        return self.lora_A, self.lora_B


class DoRAFormula(Formula):
    def forward(self, x):
        weight = self.weight + self.scaling * (self.lora_B @ self.lora_A)
        kept = nn.functional.dropout(x, self.dropout_p, self.training)
        y = linear(kept, weight) * (self.lora_magnitude_vector / weight.detach().norm(dim=1))
        return y + self.bias if self.dropout_p == 0 else y + linear(x - kept, self.weight, self.bias)


class SingFormula(Formula):
    def factors(self):
        return self.free_s[: self.weight.shape[1]].t(), self.free_s[: self.weight.shape[0]]


class NBFormula(Formula):
    """The Cayley transform by one solve with [ã | b̃ᵀ]; the nuclear norm's shares are a softmax."""

    def factors(self):
        a, b = self.free_a.double(), self.free_b.double()
        r = len(a)
        eye = torch.eye(r, dtype=a.dtype, device=a.device)
        a1, a2 = a[:, :r], a[:, r:]
        z = a1.mT - a1 + a2 @ a2.mT + b.mT @ b
        inverse = torch.linalg.inv(eye + z)
        shares = torch.softmax(self.free_scale.double() / r**0.5, -1)
        first = (inverse @ (eye - z)).mT
        new_a = torch.cat((first, -2 * inverse.mT @ a2), -1)
        new_b = -4 * self.bound * b @ inverse * shares
        return new_a.to(self.free_a.dtype), new_b.to(self.free_b.dtype)


def ours(kind, formula, **settings):
    layer = kind(WIDTH, 5, r=2, **settings)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return layer, formula(layer)


def fused(**options):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False, **options)
    plain = peft.get_peft_model(nn.Sequential(nn.Linear(WIDTH, 5)), config)
    model = copy.deepcopy(plain)
    lf.fuse_(model)
    return model, plain


LAYERS = {
    "fused PEFT": fused,
    "fused PEFT DoRA": lambda: fused(use_dora=True),
    "LoRALinear": lambda: ours(lf.LoRALinear, Formula, alpha=3),
    "DoRALinear": lambda: ours(lf.DoRALinear, DoRAFormula, alpha=3),
    "NBLoRALinear": lambda: ours(lf.NBLoRALinear, NBFormula),
    "SingLoRALinear": lambda: ours(lf.SingLoRALinear, SingFormula, alpha=3),
}


def outcome(run, module, x):
    """Returns the tensors that a call returns, or the exception that it raises."""
    torch.manual_seed(5)
    try:
        return [t for t in run(module, x) if t is not None]
    except Exception as error:
        return error


def check(got, expected) -> str:
    if isinstance(expected, Exception):
        assert isinstance(got, Exception), "PEFT or the formula refuses this call"
        named = isinstance(got, (lf.ArgumentError, lf.BackendError)) or type(got) is type(expected)
        assert named, f"{type(got).__name__}: {got}"
        return "refused by name, as PEFT refuses it"
    if isinstance(got, Exception):
        raise AssertionError("PEFT or the formula takes this call") from got
    flat = lambda t: torch.cat([p.flatten() for p in t.unbind()]) if t.is_nested else t
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype and g.layout == e.layout
        torch.testing.assert_close(flat(g), flat(e), rtol=2e-4, atol=2e-5)
    return "right"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_call_of_a_kind_is_right_or_refused_as_pefts(kind, layer, record_property):
    torch.manual_seed(0)
    module, reference = LAYERS[layer]()
    x = torch.randn(4, WIDTH)
    expected = outcome(KINDS[kind], reference, x)
    for backend in BACKENDS:
        with lf.set_backend(backend):
            got = outcome(KINDS[kind], copy.deepcopy(module), x)
        record_property("calls of all kinds", {check(got, expected): 1})
