"""unload_: a plain model again, with or without the adapters in its weights."""

import copy

import peft
import pytest
import torch
from tiny import assert_same_tensors, assert_unchanged, batch, injected_llama, llama, snapshot
from torch import nn

import lora_fast as lf
from lora_fast.layers import merge_log, merging

CONFIGS = {
    "LoRA": lf.LoRAConfig(r=2),
    "NB-LoRA": lf.NBLoRAConfig(r=2),
    "SingLoRA": lf.SingLoRAConfig(r=2, ramp_steps=0),
}


def injected(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8, bias=False)).to(dtype).eval()
    plain = copy.deepcopy(model)
    lf.inject_(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model, plain


@pytest.mark.parametrize("state", ["unmerged", "merged"])
@pytest.mark.parametrize("merge", [True, False], ids=["merge", "drop"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_unloaded_model_is_plain(kind, merge, state):
    model, plain = injected(CONFIGS[kind])
    x, weights = torch.randn(3, 8), [model[0].weight, model[2].weight]
    output = model(x)
    if state == "merged":
        lf.merge_(model)
    report = lf.unload_(model, merge=merge)
    assert [type(module) for module in model] == [type(module) for module in plain]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model[0].weight is weights[0] and model[2].weight is weights[1] and not model[0].training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks and not model._forward_hooks and not model._forward_hooks_always_called
    assert (
        not set(merging._known) & {id(p) for p in model.parameters()}
        and list(report.changed) == ["0", "2"]
        and report.action == "unloaded"
    )
    if merge:
        assert torch.allclose(model(x), output, atol=1e-5)
    else:
        assert_same_tensors(model.state_dict(), plain.state_dict())
    lf.inject_(model, CONFIGS[kind])  # and it can go through inject_ again


def test_unloading_rounds_once_and_tells_of_lost_bounds():
    model, plain = injected(lf.NBLoRAConfig(r=2), torch.bfloat16)
    layer = model[0]
    exact = torch.addmm(plain[0].weight.float(), layer.lora_B.float(), layer.lora_A.float())
    with pytest.warns(UserWarning, match="rounding to the bfloat16 weight"):
        report = lf.unload_(model)
    assert torch.equal(model[0].weight, exact.bfloat16())
    assert "rounding" in report.changed["0"] and "2 such layers" in report.note


def test_modules_held_twice_stay_one():
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": linear, "again": linear})
    lf.inject_(model, lf.LoRAConfig(r=2))
    lf.unload_(model)
    assert type(model["first"]) is nn.Linear and model["first"] is model["again"]


def test_changed_weights_stay_marked():
    model, _ = injected(lf.LoRAConfig(r=2))
    merge_log.mark(model[0])
    lf.unload_(model)
    assert merge_log.is_changed(model[0]) and not merge_log.is_changed(model[2])


def test_hooks_of_a_device_map_are_carried():
    accelerate = pytest.importorskip("accelerate")
    model = llama(layers=1)
    model = accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    hooked = "_hf_hook" in model.lm_head.__dict__
    lf.inject_(model, lf.LoRAConfig(r=2, target_modules=["lm_head"]))
    lf.unload_(model)
    assert type(model.lm_head) is nn.Linear and ("_hf_hook" in model.lm_head.__dict__) == hooked
    model(batch())


def with_hook(model):
    model.lm_head.register_forward_hook(lambda *_: None)


def offloaded(model):
    import accelerate

    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def replaced(model):
    lf.merge_(model)
    model.lm_head.weight = nn.Parameter(torch.ones_like(model.lm_head.weight), requires_grad=False)


REFUSED = {
    "replaced": (lambda: prepared(replaced), {}, "replaced"),
    "tied": (lambda: injected_llama(tied=True, target_modules=["lm_head", "q_proj"]), {}, "model.embed_tokens"),
    "hooks": (lambda: prepared(with_hook), {"merge": False}, "hooks"),
    "offloaded": (lambda: prepared(offloaded), {"merge": False}, "hooks, or a replaced forward"),
    "no layers": (llama, {}, "at least one adapter layer"),
    "one layer": (lambda: lf.LoRALinear(4, 4, r=2, alpha=4), {}, "a module that contains adapter layers"),
    "PEFT": (lambda: peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])), {}, "merge_and_unload"),
    "no bool": (llama, {"merge": "yes"}, "merge: expected True or False"),
}


def prepared(change):
    model = injected_llama(target_modules=["lm_head", "q_proj"])
    change(model)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_unload_refuses_before_anything_changes(case):
    make, arguments, says = REFUSED[case]
    model = make()
    before = snapshot(model) if case != "offloaded" else None
    with pytest.raises(lf.ArgumentError) as raised:
        lf.unload_(model, **arguments)
    assert says in str(raised.value)
    if before is not None:
        assert_unchanged(model, before)
    assert case != "tied" or len(lf.unload_(model, merge=False).changed) == 3


def test_unload_accepts_nothing_if_allowed():
    assert not lf.unload_(llama(), allow_empty=True).changed
