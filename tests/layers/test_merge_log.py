"""The record of merges into frozen weights: the mark and the terms survive copies, and ScaLoRA refuses some weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
from changed_bases import (
    KINDS,
    LAYER,
    RANK,
    injected,
    merge_some,
    read,
    scalora,
    train,
)
from tiny import COPIES, assert_same_tensors, assert_unchanged, batch, loss_of, snapshot
from torch import nn

import lora_fast as lf
from lora_fast.batches import pairs
from lora_fast.layers import merge_log

# what the model remembers


@pytest.mark.parametrize("keep", ["weights", "terms"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_the_mark_and_the_terms(kind, copied, keep, tmp_path):
    model = merge_some(KINDS[kind](), keep)
    keys = list(KINDS[kind]().state_dict())
    lf.save_adapter(model, tmp_path / "model")
    lf.save_adapter(copied(model), tmp_path / "copy")
    (tensors, metadata), (others, other_metadata) = read(tmp_path / "model"), read(tmp_path / "copy")
    assert_same_tensors(tensors, others)
    assert metadata == other_metadata and "changed_base" in metadata
    assert list(model.state_dict()) == keys


def test_terms_of_a_copy_are_its_own():
    model = merge_some(injected(), "terms", merges=1)
    twin = copy.deepcopy(model)
    merge_some(twin, "terms", merges=1)
    assert len(merge_log.kept_terms(model.get_submodule(LAYER))) == 1


def test_terms_are_copied_at_the_merge():
    model = injected()
    pair = pairs.find_pairs(model)[0]
    a, b = pair.a.detach().clone(), pair.b.detach().clone()
    merge_log.record(pair.layer, pair.a, pair.b, torch.full((RANK,), 2.0), "terms")
    pair.a.data.zero_(), pair.b.data.zero_()
    ((kept_b, kept_a),) = merge_log.kept_terms(pair.layer)
    assert torch.equal(kept_a, a) and torch.equal(kept_b, 2 * b)


def test_terms_are_read_while_another_thread_merges(monkeypatch):
    """As by a thread that saves during training. A term whose copy may not have arrived is left out."""
    devices = [torch.device("cuda", i) for i in range(3)]
    terms = merge_log.Terms(["first"], {devices[0]})
    waited = []

    def synchronize(device: torch.device) -> None:  # meanwhile, a merge from another GPU
        waited.append(device)
        terms._copying_from.add(devices[len(waited)])
        terms.terms.append("later")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert terms.arrived() == ["first"] and waited == devices[:1]
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert terms.arrived() == ["first", "later"] and set(waited[1:]) == set(devices[:2])


def test_bare_pairs_record_nothing():
    """They are merged into all the same."""
    a, b, weight = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2)), torch.zeros(4, 3)
    a.grad, b.grad = torch.arange(6.0).view(2, 3), torch.arange(8.0).view(4, 2)
    method = lf.methods.ScaLoRA(kappa=1.0, interval=1, keep="terms")
    lf.optim.LoRAAdamW([(a, b, 1.0, weight)], methods=[method]).step()
    assert weight.ne(0).any() and not weight.__dict__


def test_terms_are_refused_in_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer, on_gpu = nn.Linear(3, 4), SimpleNamespace(is_cuda=True)
    with pytest.raises(lf.ArgumentError, match="keep: expected 'weights'"):
        merge_log.record(layer, on_gpu, on_gpu, on_gpu, "terms")
    assert not merge_log.is_changed(layer)
    merge_log.record(layer, on_gpu, on_gpu, on_gpu, "weights")
    assert merge_log.is_changed(layer)


def transposed(layer):
    """Stores the layer's weight by columns."""
    layer.weight.data = layer.weight.data.t().contiguous().t()


REFUSED = {
    "by columns": (r"q_proj\S*\.weight: expected a contiguous weight.* got strides \(1, 64\)$", {}, transposed),
    "rank": (r"q_proj\S*\.lora_A: expected a rank of at most 128.* got 129$", {"r": 129}, lambda layer: None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_scalora_refuses_weights_that_the_kernels_cannot_merge(case, kind):
    """The constructor refuses them, or the step if the backend is chosen later; the torch backend takes both."""
    message, config, change = REFUSED[case]

    def build():
        model = KINDS[kind](**config)
        change(merge_log.holder(model.get_submodule(f"base_model.model.{LAYER}" if kind != "injected" else LAYER)))
        return model, scalora(model)

    (model, optimizer), (other, expected) = build(), build()
    with lf.set_backend("triton"), pytest.raises(lf.ArgumentError, match=message):
        scalora(model)
    loss_of(model, batch(seed=0)).backward()
    before, places = snapshot(model), [p.data_ptr() for p in model.parameters()]
    with lf.set_backend("triton"), pytest.raises(lf.ArgumentError, match=message):
        optimizer.step()
    assert_unchanged(model, before)
    assert not optimizer.state_dict()["state"] and [p.data_ptr() for p in model.parameters()] == places
    assert not any(merge_log.is_changed(module) for module in model.modules())
    optimizer.step()  # as if nothing had been tried
    train(other, expected, 1)
    assert_same_tensors(snapshot(model)["bits"], snapshot(other)["bits"])
    assert all(state["step"] == 1 for state in optimizer.state_dict()["state"].values())
