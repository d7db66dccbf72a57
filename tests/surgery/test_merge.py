"""merge_ and unmerge_ on layers of ours: one rounding, every bit restored, and errors that change nothing."""

import copy
import pickle

import accelerate
import pytest
import torch
from tiny import ShardedTensor, assert_unchanged, batch, injected_llama, peft_llama, snapshot
from torch import nn

import lora_fast as lf
from lora_fast.layers.exact_merge import ExactMerge

LLAMA_LINEARS = 14  # in two layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype):
    model = injected_llama(dtype=dtype)
    before, logits = snapshot(model), model(batch()).logits
    report = lf.merge_(model)
    assert len(report.changed) == LLAMA_LINEARS
    for name in report.changed:
        layer, wide = model.get_submodule(name), torch.promote_types(dtype, torch.float32)
        a, b, weight = layer.lora_A.to(wide), layer.lora_B.to(wide), before["bits"][f"{name}.weight"].to(wide)
        assert torch.equal(layer.weight, torch.addmm(weight, b, a, alpha=2.0).to(dtype)), name
    merged = model(batch()).logits
    assert not torch.equal(merged, logits)
    if dtype == torch.float64:
        assert (merged - logits).norm() <= 8 * torch.finfo(dtype).eps * logits.norm()
    lf.unmerge_(model)
    assert_unchanged(model, before)
    assert torch.equal(model(batch()).logits, logits)


def test_merge_reports_layers_whose_bound_rounding_exceeds():
    """One warning for all, and a line of the report for each; the other layers' lines are as always."""
    blocks = [torch.nn.Linear(24, 16), torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)]
    model = torch.nn.Sequential(*blocks).bfloat16()
    lf.inject_(model, lf.NBLoRAConfig(r=2, target_modules=["0", "1"]))
    lf.inject_(model, lf.LoRAConfig(r=2, target_modules=["2"]), allow_empty=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.warns(UserWarning) as caught:
        report = lf.merge_(model)
    (warning,) = caught
    note = "rounding to the bfloat16 weight adds up to about"
    assert f"0: {note}" in str(warning.message) and "2 such layers" in str(warning.message)
    assert report.note in str(warning.message) and report.note in str(report)
    assert note in report.changed["0"] and note in report.changed["1"]
    assert report.changed["2"] == "adapter folded into its weight"


def test_merge_leaves_tied_weights():
    model = injected_llama(tied=True, target_modules=["lm_head", "q_proj"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = model.lm_head.weight.clone()
    report = lf.merge_(model)
    assert len(report.changed) == 2 and "model.embed_tokens" in report.left["lm_head"]
    assert torch.equal(model.lm_head.weight, before)


def test_merged_model_can_be_copied_and_cast():
    model = injected_llama(target_modules=["q_proj"])
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    lf.merge_(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model))).double()
    lf.unmerge_(twin)
    assert torch.equal(twin.model.layers[0].self_attn.q_proj.weight, weight.double())
    assert model.model.layers[0].self_attn.q_proj.merged


def test_failure_while_merging_restores_the_weights(monkeypatch):
    model = injected_llama()
    before, fold_ = snapshot(model), lf.LoRALinear.fold_

    def fail_at_the_last(layer, *arguments):
        if layer is model.model.layers[1].mlp.down_proj:
            raise MemoryError
        fold_(layer, *arguments)

    monkeypatch.setattr(lf.LoRALinear, "fold_", fail_at_the_last)
    with pytest.raises(MemoryError):
        lf.merge_(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda model: lf.unmerge_(model), ["model", "at least one merged layer", "not merged"]),
        (lambda model: lf.merge_(model.model.embed_tokens), ["model", "at least one layer to merge"]),
    ],
    ids=["unmerge-unmerged", "no-adapters"],
)
def test_merge_and_unmerge_refuse_models_without_such_layers(act, says):
    model = injected_llama()
    before = snapshot(model)
    with pytest.raises(lf.ArgumentError) as raised:
        act(model)
    assert all(part in str(raised.value) for part in says), raised.value
    assert_unchanged(model, before)


def test_merge_twice_is_refused():
    model = injected_llama()
    lf.merge_(model)
    before = snapshot(model)
    with pytest.raises(lf.ArgumentError, match="already merged"):
        lf.merge_(model)
    assert_unchanged(model, before)
    assert not lf.merge_(model, allow_empty=True).changed


def q_proj(model):
    """Returns the first q_proj's layer, and the module that holds its weight."""
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    return layer, getattr(layer, "base_layer", layer)


def offload(model):
    accelerate.cpu_offload(q_proj(model)[1], execution_device=torch.device("cpu"))


def shard(model):
    holder = q_proj(model)[1]
    weight = holder.weight.detach().as_subclass(ShardedTensor)
    holder.weight = nn.Parameter(weight, requires_grad=False)


def release(model):  # as ZeRO-3 does between forwards
    q_proj(model)[1].weight.data = torch.empty(0)


def parametrize(model):
    nn.utils.parametrize.register_parametrization(q_proj(model)[1], "weight", nn.Identity())


def remake_under_inference_mode(model):
    holder = q_proj(model)[1]
    with torch.inference_mode():
        holder.weight = nn.Parameter(holder.weight.clone(), requires_grad=False)


STATES = {
    "offloaded": (offload, "offloaded by accelerate"),
    "meta": (lambda model: q_proj(model)[1].to("meta"), "without its data on meta"),
    "sharded": (shard, "weight of type"),
    "released": (release, "without its data"),
    "parametrized": (parametrize, ""),
    "inference": (remake_under_inference_mode, "inference_mode"),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", [injected_llama, peft_llama], ids=["injected", "fused"])
def test_weights_that_a_layer_does_not_have_are_left_alone(kind, state):
    model, (change, says) = kind(), STATES[state]
    if kind is peft_llama:
        lf.fuse_(model)
    change(model)
    layer, _ = q_proj(model)
    name = next(name for name, module in model.named_modules() if module is layer)
    report = lf.merge_(model)
    assert list(report.left) == [name] and says in report.left[name] and not layer.merged
    assert len(report.changed) == LLAMA_LINEARS - 1
    report = lf.unmerge_(model)
    assert len(report.changed) == LLAMA_LINEARS - 1 and report.left == {name: "not merged"}


@pytest.mark.parametrize("kind", [injected_llama, peft_llama], ids=["injected", "fused"])
def test_unmerge_leaves_layers_that_were_offloaded_while_merged(kind):
    model = kind()
    if kind is peft_llama:
        lf.fuse_(model)
    lf.merge_(model)
    offload(model)
    report = lf.unmerge_(model)
    assert len(report.changed) == LLAMA_LINEARS - 1 and len(report.left) == 1
    assert "replaced or offloaded while it was merged" in str(report)


def test_peft_unmerges_what_was_offloaded_while_merged():
    model = peft_llama().eval()
    lf.fuse_(model)
    logits = model(batch()).logits
    model.merge_adapter()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model.unmerge_adapter()
    assert torch.allclose(model(batch()).logits, logits, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(model(batch()).logits, logits, atol=1e-5)


def test_merging_under_inference_mode_gives_weights_to_train_beside():
    model = injected_llama()
    with torch.inference_mode():
        lf.merge_(model)
        lf.unmerge_(model)
        lf.merge_(model)
    lf.unload_(model)
    model.lm_head.weight.requires_grad_(True)
    model(batch()).logits.sum().backward()
    assert model.lm_head.weight.grad.norm() > 0


def test_failure_while_merging_keeps_what_was_merged_before(monkeypatch):
    """Of a fused PEFT model only the adapters that this call has merged are taken out."""
    model = peft_llama()
    model.add_adapter("second", model.peft_config["default"])
    lf.fuse_(model)
    model.base_model.set_adapter(["default", "second"])  # which would unmerge
    model.merge_adapter(["second"])
    before, merge_exactly = snapshot(model), ExactMerge.merge_exactly
    calls = iter(range(5))

    def fail_at_the_sixth(layer, *arguments):
        if next(calls, None) is None:
            raise MemoryError
        merge_exactly(layer, *arguments)

    monkeypatch.setattr(ExactMerge, "merge_exactly", fail_at_the_sixth)
    with pytest.raises(MemoryError):
        lf.merge_(model)
    assert_unchanged(model, before)
    assert all(layer.merged_adapters == ["second"] for layer in model.modules() if isinstance(layer, ExactMerge))


def test_saved_adapter_of_a_merged_fused_model_fits_its_base(tmp_path):
    from peft import PeftModel

    model = peft_llama().eval()
    lf.fuse_(model)
    logits = model(batch()).logits
    lf.merge_(model)
    model.save_pretrained(tmp_path)
    model.unload()
    fresh = PeftModel.from_pretrained(peft_llama().unload(), tmp_path).eval()
    assert torch.allclose(fresh(batch()).logits, logits, atol=1e-5)


def test_merge_refuses_an_unknown_place_for_originals():
    model = injected_llama()
    with pytest.raises(lf.ArgumentError, match="keep_originals: expected one of host, device, got 'disk'"):
        lf.merge_(model, keep_originals="disk")
