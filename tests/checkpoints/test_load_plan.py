"""A plan contains all checks and changes nothing; applying it loads the adapter."""

import pytest
import torch
from tiny import ShardedTensor, assert_same_tensors, assert_unchanged, injected_llama, llama, peft_llama, snapshot
from torch import nn

import lora_fast as lf
from lora_fast.checkpoints import adapter as adapters
from lora_fast.checkpoints import folder, load_plan, peft_plan, peft_state
from lora_fast.checkpoints.sidecar import SIDECAR


def plan_for_plain_model(model, adapter, free):
    return load_plan.into_plain_model(model, adapter, free)


def plan_for_our_layers(model, adapter, free):
    return load_plan.into_our_layers(model, adapters._our_layers(model), adapter, free)


def plan_for_peft_layers(model, adapter, free):
    return peft_plan.plan(peft_state.find(model, writable=True), adapter)


@pytest.mark.parametrize(
    ("build", "make_plan"),
    [(llama, plan_for_plain_model), (injected_llama, plan_for_our_layers), (peft_llama, plan_for_peft_layers)],
    ids=["plain", "injected", "peft"],
)
def test_plan_changes_nothing_before_it_is_applied(build, make_plan, tmp_path):
    lf.save_adapter(injected_llama(seed=9), tmp_path)
    model, loaded = build(), build()
    before = snapshot(model)
    plan = make_plan(model, *folder.read(tmp_path, with_sidecar=True))
    assert_unchanged(model, before)
    plan.apply_(model)
    lf.load_adapter(loaded, tmp_path)
    assert_same_tensors(model.state_dict(), loaded.state_dict())


def test_sharded_parameters_are_refused(tmp_path):
    lf.save_adapter(injected_llama(seed=9), tmp_path)
    model = injected_llama()
    layer = model.model.layers[1].mlp.down_proj
    layer.lora_B = nn.Parameter(layer.lora_B.data.as_subclass(ShardedTensor))
    before = layer.lora_A.clone(), model.model.layers[0].self_attn.q_proj.lora_B.clone()
    with pytest.raises(lf.CheckpointError, match=r"down_proj.lora_B: expected a plain parameter.* got ShardedTensor"):
        lf.load_adapter(model, tmp_path)
    after = layer.lora_A, model.model.layers[0].self_attn.q_proj.lora_B
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))


def test_peft_models_ignore_the_sidecar(tmp_path):
    """PEFT leaves the file in a folder that it writes again, where the file no longer belongs to the adapter."""
    model = llama()
    lf.inject_(model, lf.NBLoRAConfig(r=4))
    lf.save_adapter(model, tmp_path)
    (tmp_path / SIDECAR).write_bytes(b"damaged")
    assert len(lf.load_adapter(peft_llama(alpha=4), tmp_path).changed) == 14
