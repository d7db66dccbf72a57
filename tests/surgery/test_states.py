"""Walks through the states that a model can be in: whatever has been done to it, it computes what its base and its
adapter compute, and its base weights are those of the start."""

import copy
import random

import peft
import pytest
import torch
from tiny import COPIES
from torch import nn

import lora_fast as lf
from lora_fast.layers import merging

CONFIGS = {
    "LoRA": lf.LoRAConfig(r=2),
    "NB-LoRA": lf.NBLoRAConfig(r=2),
    "SingLoRA": lf.SingLoRAConfig(r=2, ramp_steps=0),
}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def made(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)).eval()
    base = copy.deepcopy(model)
    if kind == "fused":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["0", "2"]))
        lf.fuse_(model.eval())
    else:
        lf.inject_(model, CONFIGS[kind])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model, base


def reloaded(model):
    """Returns the model of a fresh process, from its state."""
    fresh, _ = made("fused" if hasattr(model, "peft_config") else kind_of(model))
    if hasattr(model, "peft_config"):  # whose state has merged weights, as PEFT's
        lf.unmerge_(model, allow_empty=True)
    fresh.load_state_dict(model.state_dict())
    return fresh


def kind_of(model):
    return type(model[0]).__name__.removesuffix("Linear").replace("NBLoRA", "NB-LoRA")


def loaded_in_place(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()) if not hasattr(model, "peft_config") else {}, strict=False)
    return model


def disabled_and_enabled(model):
    with lf.disable_adapters(model), lf.disable_adapters(model):
        model(X)
    return model


def done(change, **options):
    def run(model):
        change(model, allow_empty=True, **options)
        return model

    return run


STEPS = {
    "merge_": done(lf.merge_),
    "merge_ to the device": done(lf.merge_, keep_originals="device"),
    "unmerge_": done(lf.unmerge_),
    "train and eval": lambda model: model.train().eval(),
    "same dtype": lambda model: model.to(torch.float32),
    "disable": disabled_and_enabled,
    "reload": reloaded,
    "load in place": loaded_in_place,
    **COPIES,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [*CONFIGS, "fused"])
def test_every_walk_through_states_keeps_outputs_and_weights(kind, seed, monkeypatch):
    monkeypatch.setattr(merging, "is_on_accelerator", lambda tensor: True)  # originals move as from a GPU
    (model, base), walk = made(kind), random.Random(seed)
    expected, plain = model(X), base(X)
    for name in walk.choices(list(STEPS), k=25):
        model = STEPS[name](model)
        assert torch.allclose(model(X), expected, atol=1e-5), name
        with lf.disable_adapters(model):
            assert torch.allclose(model(X), plain, atol=1e-6), name
    lf.unmerge_(model, allow_empty=True)
    assert torch.equal(model(X), expected)
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith(("weight", "bias"))]
    originals = [w for w in weights if not any(w is p for p in adapters(model))]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(originals, base.parameters(), strict=True))


def adapters(model):
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name or "free_" in name]
