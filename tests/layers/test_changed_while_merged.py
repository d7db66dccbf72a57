"""Weights that others change while they are merged: the change stays, and the adapters are subtracted as PEFT does. The
references are PEFT's own merge and sums in float64."""

import copy

import peft
import pytest
import torch
from merged_models import ONE, delta, lf_free_copy, merge, set_factors_, tied_llama, two_layers_of_ours
from tiny import COPIES, llama
from torch import nn

import lora_fast as lf
from lora_fast.layers.terms import fingerprint


def add_one(weight):
    weight.data.add_(1.0)


def exchange_rows(weight):
    with torch.no_grad():
        weight.copy_(weight.flip(0))


def replace_data(weight):
    weight.data = torch.full_like(weight, 0.5)


def train(weight):
    weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1e-3).step()


def change_one_bit(weight):
    weight.data[3, 5] = torch.nextafter(weight.data[3, 5], torch.tensor(9.0))


CHANGES = (add_one, exchange_rows, replace_data, train, change_one_bit)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ONE)
def test_a_change_of_a_merged_weight_outlives_unmerging(kind, change):
    model, layer, holder = ONE[kind]()
    adapter = delta(layer, "default")
    lf.merge_(model)
    change(holder.weight)
    want = holder.weight.detach().double() - adapter
    if kind == "injected":
        assert torch.allclose(model.state_dict()["0.weight"].double(), want, atol=1e-6)
    else:
        assert layer.original_weight() is None
    assert "changed by others" in next(iter(lf.unmerge_(model).changed.values()))
    assert not layer.merged and torch.allclose(holder.weight.double(), want, atol=1e-6)
    lf.merge_(model)  # anew, and exact again
    before = holder.weight.detach().double() - adapter
    lf.unmerge_(model)
    assert torch.allclose(holder.weight.double(), before, atol=1e-6) and not layer.merged


def test_the_state_of_another_merged_peft_model_is_unmerged_with_its_own_adapter():
    model, _, holder = ONE["fused"]()
    other = set_factors_(copy.deepcopy(model), seed=9)
    other_weight = nn.init.normal_(other.base_model.model[0].base_layer.weight).detach().clone()
    model.merge_adapter(), other.merge_adapter()
    model.load_state_dict(other.state_dict())
    model.unmerge_adapter()
    assert torch.allclose(holder.weight, other_weight, atol=1e-6)


def test_loading_the_same_merged_state_keeps_unmerging_exact():
    model, _, holder = ONE["fused"]()
    before = holder.weight.detach().clone()
    model.merge_adapter()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.unmerge_adapter()
    assert torch.equal(holder.weight, before)


@pytest.mark.parametrize("how", [*COPIES, "half and back", "double"])
@pytest.mark.parametrize("kind", ONE)
def test_copies_and_conversions_remember_a_change(kind, how):
    model, _, holder = ONE[kind]()
    want = holder.weight.detach().double() + 1
    lf.merge_(model)
    holder.weight.data.add_(1.0)
    conversions = {"half and back": lambda model: model.half().float(), "double": nn.Module.double}
    copied = conversions[how](model) if how in conversions else COPIES[how](model)
    lf.unmerge_(copied)
    (weight,) = [p for p in copied.parameters() if p.shape == holder.weight.shape]
    assert torch.allclose(weight.double(), want, atol=4e-3 if how == "half and back" else 2e-6)


@pytest.mark.parametrize("first", [0, 1])
def test_layers_over_one_changed_weight_subtract_in_any_order(first):
    model, layers, weight = two_layers_of_ours()
    model.pop(2)
    want = weight.detach().double() + 1
    layers[0].merge(), layers[1].merge()
    weight.data.add_(1.0)
    assert torch.allclose(model.state_dict()["1.weight"].double(), want, atol=2e-6)
    layers[first].unmerge()
    assert torch.allclose(weight.double(), want + delta(layers[1 - first], ""), atol=2e-6)
    with pytest.raises(lf.ArgumentError, match="weight changed by others while it was merged"):
        layers[first].merge()
    layers[1 - first].unmerge()
    assert torch.allclose(weight.double(), want, atol=2e-6)
    before = weight.detach().clone()
    layers[first].merge(), layers[first].unmerge()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", ONE)
def test_a_weight_resized_while_merged_is_a_named_error(kind):
    model, layer, holder = ONE[kind]()
    lf.merge_(model)
    holder.weight.data = torch.cat([holder.weight.data, torch.ones(2, 24)])
    with pytest.raises(lf.ArgumentError, match=r"shape \(18, 24\) in place of \(16, 24\), resized while it was merged"):
        layer.unmerge()
    assert layer.merged and "resized" in str(lf.unmerge_(model, allow_empty=True))


@pytest.mark.parametrize("order", [["default", "late"], ["late", "default"]], ids=str)
@pytest.mark.parametrize("back", ["unmerge_adapter", "fused first", "embedding first"])
def test_an_embedding_adapted_after_fusing_is_taken_out_as_by_peft(order, back):
    """Its layer is PEFT's, which adds to the merged weight in place."""
    options = {"r": 2, "init_lora_weights": False}
    model = peft.get_peft_model(llama(tied=True, layers=1), peft.LoraConfig(target_modules=["lm_head"], **options))
    lf.fuse_(model)
    model.add_adapter("late", peft.LoraConfig(target_modules=["embed_tokens"], **options))
    model.base_model.set_adapter(["default", "late"])
    layers = [model.base_model.model.lm_head, model.base_model.model.model.embed_tokens]
    weight = layers[0].base_layer.weight
    before = weight.detach().clone()
    model.merge_adapter(order)
    if back == "unmerge_adapter":
        model.unmerge_adapter()
    else:
        for layer in layers if back == "fused first" else layers[::-1]:
            layer.unmerge()
    assert torch.allclose(weight, before, atol=1e-4 * before.abs().max().item())


def tied_llama_with_dora():
    model, layers, weight = tied_llama()
    model.double()
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, init_lora_weights=False))
    return model, layers, weight


def test_dora_beneath_merges_of_ours_is_taken_out_as_by_peft():
    model, _, weight = tied_llama_with_dora()
    theirs, before = lf_free_copy(model), weight.detach().clone()
    for each in (model, theirs):
        each.merge_adapter(["dora"])
        each.merge_adapter(["default"])
    assert torch.allclose(weight, theirs.base_model.model.lm_head.base_layer.weight, atol=1e-12)
    model.unmerge_adapter()
    assert torch.allclose(weight, before, atol=1e-12)
    model.merge_adapter(["default"])
    after = weight.detach().clone()
    model.unmerge_adapter(), model.merge_adapter(["default"])
    assert torch.equal(weight, after)  # exact again


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_the_original_comes_back_from_below_dora(order):
    """Here PEFT's own arithmetic does not restore the weight, because DoRA is no sum."""
    _, layers, weight = tied_llama_with_dora()
    before = weight.detach().clone()
    merge(layers[1], "default"), merge(layers[1], "dora"), merge(layers[0], "default"), merge(layers[0], "second")
    assert "PEFT has merged another" in layers[0].inexact("default")
    for i in order:
        layers[i].unmerge()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (9,)], ids=str)
def test_fingerprints_differ_in_one_bit_and_are_equal_in_any_layout(dtype, shape):
    values = torch.randn(shape, dtype=dtype)
    marked = fingerprint(values)
    assert torch.equal(fingerprint(values.t().contiguous().t() if len(shape) > 1 else values.clone()), marked)
    for i in range(values.numel()):
        changed = values.clone()
        changed.view(-1)[i] = torch.nextafter(changed.view(-1)[i], torch.tensor(9.0, dtype=dtype))
        assert not torch.equal(fingerprint(changed), marked)
    assert not torch.equal(fingerprint(values.flip(0)), marked)
