"""Merging into one parameter from several layers, in any order, and what a merged layer survives. The references are
PEFT's own merge and sums in float64."""

import copy
import itertools
import pickle
import warnings

import numpy
import peft
import pytest
import torch
from merged_models import (
    ONE,
    delta,
    fused_linear,
    injected_linear,
    lf_free_copy,
    merge,
    set_factors_,
    tied_llama,
    two_layers_of_ours,
)
from tiny import COPIES, assert_same_tensors, llama
from torch import nn

import lora_fast as lf
from lora_fast.layers import merging


def replicated_llama():
    """Three layers that share the weights of one."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 1], [0, 1], [0, 1]])
    model = peft.get_peft_model(llama(layers=1), config)
    lf.fuse_(set_factors_(model))
    layers = [layer.self_attn.q_proj for layer in model.base_model.model.model.layers]
    assert len({id(layer.base_layer.weight) for layer in layers}) == 1
    return model, layers, layers[0].base_layer.weight


def linear_held_twice():
    """One adapted module under two names, and another layer over its weight."""
    linear, other = nn.Linear(24, 16), nn.Linear(24, 16)
    other.weight = linear.weight
    names = {"first": linear, "again": linear, "other": other}
    model = peft.get_peft_model(nn.ModuleDict(names), peft.LoraConfig(r=2, target_modules=list(names)))
    lf.fuse_(set_factors_(model))
    base = model.base_model.model
    return model, [base["first"], base["other"]], base["first"].base_layer.weight


SHARED = {f.__name__: f for f in (tied_llama, replicated_llama, two_layers_of_ours, linear_held_twice)}


@pytest.mark.parametrize("model", SHARED)
def test_merges_into_one_weight_are_taken_out_in_any_order(model):
    """A walk over many states: in each the weight is the original plus all that is merged, rounded once, and without
    merged adapters it is the original."""
    (model, layers, weight), generator = SHARED[model](), torch.Generator().manual_seed(0)
    original, merged, visited = weight.detach().clone(), {}, set()
    adapters = [list(layer.r) if hasattr(layer, "lora_variant") else [""] for layer in layers]
    for _ in range(40):
        i = torch.randint(len(layers), (), generator=generator).item()
        open_ = [name for name in adapters[i] if (i, name) not in merged]
        if open_ and torch.rand((), generator=generator) < 0.6:
            with warnings.catch_warnings():  # PEFT's, on merging a second adapter
                warnings.simplefilter("ignore")
                merge(layers[i], open_[0])
            merged[i, open_[0]] = delta(layers[i], open_[0])
        elif len(open_) < len(adapters[i]):
            layers[i].unmerge()
            merged = {key: value for key, value in merged.items() if key[0] != i}
        visited.add(frozenset(merged))
        exact = original.double() + sum(merged.values(), torch.zeros((), dtype=torch.float64))
        assert (weight - exact).abs().max() <= 4e-7 * exact.abs().max() if merged else torch.equal(weight, original)
    assert len(visited) > 3
    for layer in layers:
        if layer.merged:
            layer.unmerge()
    assert torch.equal(weight, original)


@pytest.mark.parametrize("order", [*itertools.permutations(range(2))], ids=str)
@pytest.mark.parametrize("back", [*itertools.permutations(range(2))], ids=str)
def test_tied_embeddings_of_peft_come_back_in_any_order(order, back):
    """Each layer alone, as PEFT's merge_adapter reaches them; two merged layers give what PEFT's own give."""
    model, layers, weight = tied_llama()
    original = weight.detach().clone()
    theirs = lf_free_copy(model)
    for i in order:
        layers[i].merge()
    theirs.merge_adapter()
    assert torch.allclose(weight, theirs.base_model.model.lm_head.base_layer.weight, atol=1e-6)
    for i in back:
        layers[i].unmerge()
    assert torch.equal(weight, original)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_peft_merge_adapter_of_tied_embeddings_restores_every_bit(safe):
    model, _, weight = tied_llama()
    before, ids = weight.detach().clone(), torch.arange(8)[None]
    logits = model(ids).logits
    for _ in range(3):
        model.merge_adapter(safe_merge=safe)
        assert not torch.equal(weight, before)
        model.unmerge_adapter()
    assert torch.equal(weight, before) and torch.equal(model(ids).logits, logits)


def test_merge_and_unload_of_tied_embeddings_gives_what_peft_gives():
    model, _, _ = tied_llama()
    theirs = lf_free_copy(model).merge_and_unload()
    ours = model.merge_and_unload()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.allclose(ours.lm_head.weight, theirs.lm_head.weight, atol=1e-6)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert not set(merging._known) & {id(p) for p in ours.parameters()}  # no original is kept


def test_broken_adapter_in_safe_merge_changes_nothing():
    model, layers, weight = tied_llama()
    layers[0].merge()
    before = weight.detach().clone()
    layers[1].lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(weight, before) and not layers[1].merged
    model.unmerge_adapter()
    layers[1].lora_B["default"].weight.data.zero_()
    layers[1].merge()
    layers[1].unmerge()


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("model", ["tied_llama", "two_layers_of_ours"])
def test_copies_of_a_half_merged_model_go_their_own_way(model, how):
    model, layers, weight = SHARED[model]()
    original, first, second = weight.detach().clone(), layers[0], layers[1]
    merge(first, "default")
    copied = COPIES[how](model)
    names = {id(module): name for name, module in model.named_modules()}
    twins = [copied.get_submodule(names[id(layer)]) for layer in layers]
    assert_same_tensors(copied.state_dict(), model.state_dict())
    merge(second, "default")
    both = weight.detach().clone()
    merge(twins[1], "default")  # it finds what the copy of the first layer has merged
    held = getattr(twins[1], "base_layer", twins[1]).weight
    assert torch.equal(held, both)
    twins[0].unmerge()
    twins[1].unmerge()
    assert torch.equal(held, original) and torch.equal(weight, both)
    second.unmerge()
    first.unmerge()
    assert torch.equal(weight, original)


CONVERSIONS = {
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "half and back": lambda model: model.half().float(),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("kind", ONE)
def test_conversion_of_a_merged_model_converts_the_original(kind, conversion):
    (model, layer, _), convert = ONE[kind](), CONVERSIONS[conversion]
    unmerged = convert(copy.deepcopy(model))
    layer.merge()
    convert(model)
    assert layer.merged
    layer.unmerge()
    assert_same_tensors(model.state_dict(), unmerged.state_dict())


@pytest.mark.parametrize("kind", ONE)
@pytest.mark.parametrize("keep", ["host", "device"])
def test_originals_of_a_gpu_are_kept_in_host_memory(kind, keep, monkeypatch):
    """Not verified on a GPU: a CPU's weights stand for those of one."""
    model, layer, holder = ONE[kind]()
    weight, pointer = holder.weight.detach().clone(), holder.weight.data_ptr()
    monkeypatch.setattr(merging, "is_on_accelerator", lambda tensor: True)
    lf.merge_(model, keep_originals=keep)
    (target,) = layer._merged.targets()
    assert (target.original.data_ptr() == pointer) == (keep == "device")
    assert not list(model.buffers())  # nothing that .to() would move
    lf.unmerge_(model)
    assert torch.equal(holder.weight, weight)
    layer.merge()  # as the last time
    assert (layer._merged.targets()[0].original.data_ptr() == holder.weight.data_ptr()) is False
    assert layer._merged.keep_originals == keep


def test_moving_a_merged_model_leaves_originals_where_they_are():
    """The meta device stands for a GPU."""
    model, layer, _ = injected_linear()
    lf.merge_(model)
    (target,) = layer._merged.targets()
    model.to("meta")
    assert target.original.device.type == "cpu"
    with pytest.raises(lf.ArgumentError, match="at least one merged layer"):
        lf.unmerge_(model)


@pytest.mark.parametrize("kind", ONE)
def test_a_weight_replaced_while_merged_is_not_restored(kind):
    model, layer, holder = ONE[kind]()
    layer.merge()
    holder.weight = nn.Parameter(torch.ones_like(holder.weight), requires_grad=False)
    with pytest.raises(lf.ArgumentError, match="replaced or offloaded while it was merged"):
        layer.unmerge()
    report = lf.unmerge_(model, allow_empty=True)
    assert not report.changed and "replaced" in str(report)
    assert (holder.weight == 1).all()


def test_an_unfused_layer_over_the_weight_keeps_the_arithmetic_of_peft():
    """A layer whose merges cannot be recorded changes the weight behind any original that is kept."""
    first, second = nn.Linear(24, 16), nn.Linear(24, 16)
    second.weight = first.weight
    model = nn.ModuleDict({"first": first, "second": second})
    model = set_factors_(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["first", "second"])))
    lf.fuse_(model, filter_fn=lambda name, layer: name.endswith("first"))
    base, weight = model.base_model.model, first.weight.detach().clone()
    assert (
        "weight shared with base_model.model.second"
        in lf.merge_(model, allow_empty=True).left["base_model.model.first"]
    )
    for order in (("first", "second"), ("second", "first")):
        for name in order:
            base[name].merge()
        base["first"].unmerge()
        base["second"].unmerge()
        assert torch.allclose(first.weight, weight, atol=1e-6)
    lf.fuse_(model)
    base["second"].merge(), base["first"].merge(), base["second"].unmerge(), base["first"].unmerge()
    assert torch.allclose(first.weight, weight, atol=1e-6) and base["first"].shares_weight_with == ""


def test_conv1d_and_lora_bias_are_restored_bit_for_bit():
    from transformers.pytorch_utils import Conv1D

    for base, options in ((Conv1D(16, 24), {"fan_in_fan_out": True}), (nn.Linear(24, 16), {"lora_bias": True})):
        model = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(r=2, target_modules=["0"], **options))
        set_factors_(model)
        layer, theirs, before = model.base_model.model[0], copy.deepcopy(model), copy.deepcopy(base.state_dict())
        layer.__class__ = lf.surgery.fuse.fused_class()
        layer.merge()
        assert layer.merged_exactly
        theirs.merge_adapter()
        for ours, reference in zip(base.parameters(), theirs.base_model.model[0].base_layer.parameters(), strict=True):
            assert torch.allclose(ours, reference, atol=1e-6)
        layer.unmerge()
        assert_same_tensors(base.state_dict(), before)


SCALINGS = {"tensor": torch.tensor(2.0), "numpy": numpy.float32(2), "int": 2, "column": torch.full((16, 1), 2.0)}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scalings_of_all_kinds_merge_as_in_peft(scaling):
    model, layer, holder = fused_linear()
    theirs, before = lf_free_copy(model), holder.weight.detach().clone()
    for each in (layer, theirs.base_model.model[0]):
        each.scaling["default"] = scaling
        each.merge()
    assert torch.allclose(holder.weight, theirs.base_model.model[0].base_layer.weight, atol=1e-6)
    layer.unmerge()
    exact = not isinstance(scaling, torch.Tensor) or scaling.numel() == 1  # else PEFT's arithmetic
    assert torch.equal(holder.weight, before) if exact else torch.allclose(holder.weight, before, atol=1e-6)


def test_state_of_a_merged_layer_is_that_of_the_unmerged_one():
    model, _, _ = injected_linear()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 24)
    want = model(x)
    lf.merge_(model)
    assert_same_tensors(model.state_dict(), before)
    fresh, _, _ = injected_linear()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), want)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_merged_layer_loads_an_unmerged_state(assign):
    model, layer, _ = injected_linear()
    other = set_factors_(copy.deepcopy(model), seed=9)
    nn.init.normal_(other[0].weight)
    lf.merge_(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert layer.merged
    x = torch.randn(3, 24)
    assert torch.allclose(model(x), other(x), atol=1e-5)
    lf.unmerge_(model)
    assert_same_tensors(model.state_dict(), other.state_dict())


def test_a_weight_merged_by_two_layers_refuses_a_state():
    model, layers, weight = two_layers_of_ours()
    original = weight.detach().clone()
    state = copy.deepcopy(model.state_dict())
    layers[0].merge(), layers[1].merge()
    with pytest.raises(RuntimeError, match="merged with the adapter of another layer"):
        model.load_state_dict(state)
    layers[1].unmerge()  # the other layers hold the weight that is still merged with the first one's adapter
    with pytest.raises(RuntimeError, match="merged with the adapter of another layer"):
        model.load_state_dict(state)
    layers[0].unmerge()
    assert torch.equal(weight, original)


def test_a_merged_model_that_is_offloaded_afterwards_is_a_named_error():
    """accelerate offloads what state_dict has, which is the unmerged weight."""
    accelerate = pytest.importorskip("accelerate")
    model, _, _ = injected_linear()
    lf.merge_(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(lf.ArgumentError, match="unmerged before it is offloaded"):
        model(torch.randn(3, 24))


def test_taking_one_of_two_adapters_out_under_inference_mode_leaves_a_weight_for_backward():
    _, layers, _ = two_layers_of_ours()
    layers[0].merge(), layers[1].merge()
    with torch.inference_mode():
        layers[0].unmerge()
    x = torch.randn(3, 24, requires_grad=True)
    layers[1](x).sum().backward()
    assert x.grad is not None


def test_pickled_layers_merge_after_a_round_trip():
    model, _, _ = injected_linear()
    before = copy.deepcopy(model.state_dict())
    loaded = pickle.loads(pickle.dumps(model))
    lf.merge_(loaded)
    lf.unmerge_(loaded)
    assert_same_tensors(loaded.state_dict(), before)
