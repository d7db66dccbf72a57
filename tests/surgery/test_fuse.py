"""fuse_ and unfuse_: which layers change, which are left alone and why, and that errors change nothing."""

import sys

import pytest
from expert_models import experts_model
from fused_models import (
    LLAMA_LINEARS,
    PROBE,
    fused_llama,
    hook_base,
    hook_lora,
    merge_all,
    patch_base,
    probe_model,
    train_base,
)
from peft import LoraConfig, get_peft_model
from tiny import ShardedTensor, assert_same_tensors, assert_unchanged, injected_llama, llama, peft_llama, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fast as lf

# what fuse_ changes, and what it leaves


def test_fuse_changes_classes_only():
    model = peft_llama()
    before = snapshot(model)
    report = lf.fuse_(model)
    assert str(report) == "fused 14 layers"
    after = snapshot(model)
    assert [entry[:2] for entry in after["modules"]] == [entry[:2] for entry in before["modules"]]
    assert after["parameters"] == before["parameters"]
    assert_same_tensors(after["bits"], before["bits"])
    assert str(lf.unfuse_(model)) == "unfused 14 layers"
    assert_unchanged(model, before)


def test_fuse_with_filter_fn_leaves_the_excluded_layers():
    model = peft_llama()
    report = lf.fuse_(model, filter_fn=lambda name, layer: "q_proj" in name, strict=True)
    assert len(report.changed) == 2 and set(report.left.values()) == {"excluded by filter_fn"}
    again = lf.fuse_(model)
    assert len(again.changed) == LLAMA_LINEARS - 2 and set(again.left.values()) == {"already fused"}


def test_fuse_takes_a_model_after_add_adapter():
    model = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    assert len(lf.fuse_(model).changed) == 2


def own_dropout(model):
    model.get_submodule(PROBE).lora_dropout["default"] = nn.AlphaDropout(0.5)


def patch_layer(model):
    layer = model.get_submodule(PROBE)
    forward = layer.forward
    layer.forward = lambda x: forward(x)


def shard_base(model):
    base = model.get_submodule(PROBE).base_layer
    base.weight = nn.Parameter(base.weight.data.as_subclass(ShardedTensor), requires_grad=False)


ALORA = {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}
UNFUSABLE = {
    "variant": (ALORA, None, "variant ALoraLinearVariant"),
    "rank": ({"r": 257}, None, "rank 257"),
    "hook": ({}, hook_base, "hooks"),
    "replaced-base-forward": ({}, patch_base, "replaced forward"),
    "replaced-forward": ({}, patch_layer, "its forward was replaced"),
    "trainable-base": ({}, train_base, "trainable base weight"),
    "sharded": ({}, shard_base, "weight of type ShardedTensor"),
    "lora-hook": ({}, hook_lora, "hooks"),
    "dropout": ({}, own_dropout, "AlphaDropout"),
    "merged": ({}, merge_all, "merged: unmerge it first"),
}


@pytest.mark.parametrize("case", UNFUSABLE)
def test_fuse_reports_the_reason_of_each_layer_left_alone(case):
    options, change, reason = UNFUSABLE[case]
    model = probe_model(**options)
    if change is not None:
        change(model)
    before = snapshot(model)
    report = lf.fuse_(model, allow_empty=True)
    assert reason in report.left[PROBE]
    assert len(report.changed) == (0 if options or case == "merged" else 1)
    lf.unfuse_(model, allow_empty=True)
    with pytest.raises(lf.ArgumentError) as raised:
        lf.fuse_(model, strict=True)
    assert raised.value.argument == "peft_model" and reason in str(raised.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("act", "build", "says"),
    [
        (lf.fuse_, llama, ["peft_model", "at least one LoRA layer of PEFT"]),
        (lf.fuse_, injected_llama, ["peft_model", "at least one LoRA layer of PEFT"]),
        (lf.fuse_, fused_llama, ["already fused"]),
        (lf.fuse_, lambda: probe_model(**ALORA), ["ALoraLinearVariant"]),
        (lf.unfuse_, peft_llama, ["peft_model", "at least one fused layer", "not fused"]),
        (lf.merge_, peft_llama, ["not fused: use lf.fuse_ first"]),
        (lf.unmerge_, fused_llama, ["not merged"]),
    ],
    ids=["plain", "injected", "twice", "variant", "unfuse-unfused", "merge-unfused", "unmerge-unmerged"],
)
def test_surgery_without_a_layer_to_change_is_refused(act, build, says):
    model = build()
    before = snapshot(model)
    with pytest.raises(lf.ArgumentError) as raised:
        act(model)
    assert all(part in str(raised.value) for part in says), raised.value
    assert_unchanged(model, before)
    assert not act(model, allow_empty=True).changed


def test_fuse_again_fuses_layers_that_add_adapter_added():
    model = fused_llama(targets=["q_proj"])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["k_proj"]))
    assert len(lf.fuse_(model).changed) == 2


def test_unfuse_refuses_merged_layers():
    model = fused_llama()
    lf.merge_(model)
    with pytest.raises(lf.ArgumentError, match="unmerge it first"):
        lf.unfuse_(model)


def test_fuse_without_peft_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(lf.MissingPackageError, match="pip install"):
        lf.fuse_(nn.Sequential(nn.Linear(8, 8)))


def test_fuse_names_the_parameter_and_its_experts():
    model, wrappers = experts_model()
    report = lf.fuse_(model, allow_empty=True)
    reason = "adapter of the parameter 'matrices' of 4 experts: Experts with a forward of its own"
    assert list(report.left.values()) == [reason] * len(wrappers)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_fuse_takes_conv1d():
    base = nn.Sequential(Conv1D(8, 4), nn.Linear(8, 4))
    report = lf.fuse_(get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", lora_bias=True)), strict=True)
    assert len(report.changed) == 2
