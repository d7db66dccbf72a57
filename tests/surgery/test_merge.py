"""merge_ and unmerge_ on layers of ours: one rounding, every bit restored, and errors that change nothing."""

import copy
import pickle

import pytest
import torch
from tiny import assert_unchanged, batch, injected_llama, snapshot

import lora_fast as lf

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
    assert "_unmerged_weight" not in " ".join(model.state_dict())
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
