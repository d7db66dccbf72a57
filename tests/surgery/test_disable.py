"""disable_adapters: the base model within the context, everything as before after it."""

import copy
import threading

import peft
import pytest
import torch
from tiny import assert_unchanged, snapshot
from torch import nn

import lora_fast as lf

CONFIGS = {
    "LoRA": lf.LoRAConfig(r=2, dropout=0.5),
    "NB-LoRA": lf.NBLoRAConfig(r=2),
    "SingLoRA": lf.SingLoRAConfig(r=2, ramp_steps=0),
    "SingLoRA uncounted": lf.SingLoRAConfig(r=2, ramp_steps=4),
}
KINDS = [*CONFIGS, "PEFT", "fused", "fused with modules_to_save"]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def models(kind):
    """Returns a model with filled adapters, and the output of the base model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)).eval()
    base = model(X)
    if kind in CONFIGS:
        lf.inject_(model, CONFIGS[kind])
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        for buffer in model.buffers():
            buffer.fill_(4)  # SingLoRA's steps
        return model, base
    saved = {"modules_to_save": ["2"], "target_modules": ["0"]} if "modules_to_save" in kind else {}
    config = {"target_modules": ["0", "2"], **saved}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **config)).eval()
    if saved:
        model.base_model.model[2].modules_to_save["default"].weight.data.normal_()
    if kind != "PEFT":
        lf.fuse_(model)
    return model, base


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapters_leave_the_base_model(kind):
    model, base = models(kind)
    before, output = snapshot(model), model(X)
    assert not torch.allclose(output, base)
    with lf.disable_adapters(model) as report:
        assert torch.equal(model(X), base)
        with lf.disable_adapters(model):
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
        assert report.action == "disabled" and len(report.changed) == (1 if "modules" in kind else 2)
    assert torch.equal(model(X), output)
    with pytest.raises(KeyError), lf.disable_adapters(model):
        raise KeyError
    assert torch.equal(model(X), output)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "SingLoRA uncounted"])
def test_merged_models_are_merged_again_after_the_context(kind):
    model, base = models(kind)
    output = model(X)
    model.merge_adapter() if hasattr(model, "merge_adapter") else lf.merge_(model)
    merged = model(X)
    with lf.disable_adapters(model):
        exact = kind != "PEFT"  # whose unmerging rounds
        assert torch.equal(model(X), base) if exact else torch.allclose(model(X), base, atol=1e-6)
    assert torch.equal(model(X), merged) or not exact
    model.unmerge_adapter() if hasattr(model, "unmerge_adapter") else lf.unmerge_(model)
    assert torch.allclose(model(X), output, atol=1e-5)


@pytest.mark.parametrize("kind", ["LoRA", "fused"])
def test_overlapping_contexts_of_threads_end_with_the_last(kind):
    model, base = models(kind)
    output, first_is_in, second_is_in = model(X), threading.Event(), threading.Event()
    seen = []

    def run():
        first_is_in.wait(10)
        with lf.disable_adapters(model):
            second_is_in.set()
            first_is_out.wait(10)
            seen.append(model(X))

    first_is_out, thread = threading.Event(), threading.Thread(target=run)
    thread.start()
    with lf.disable_adapters(model):
        first_is_in.set()
        assert second_is_in.wait(10)
    still = model(X)
    first_is_out.set()
    thread.join()
    assert torch.equal(still, base) and torch.equal(seen[0], base)
    assert torch.equal(model(X), output)


@pytest.mark.parametrize("kind", ["LoRA", "NB-LoRA", "fused"])
def test_compiled_models_follow(kind):
    model, base = models(kind)
    torch._dynamo.reset()
    compiled, output = torch.compile(model, backend="eager"), model(X)
    for _ in range(2):
        assert torch.allclose(compiled(X), output, atol=1e-5)
        with lf.disable_adapters(compiled):
            assert torch.allclose(compiled(X), base, atol=1e-6)
    lf.merge_(model)
    assert torch.allclose(compiled(X), output, atol=1e-5)
    lf.unmerge_(model)
    assert torch.allclose(compiled(X), output, atol=1e-5)


def test_training_goes_on_after_the_context():
    """A step of DPO: the reference within the context, then a backward pass of the policy."""
    model, base = models("NB-LoRA")
    with lf.disable_adapters(model), torch.no_grad():
        reference = model(X)
    (model(X) - reference).square().sum().backward()
    assert torch.equal(reference, base)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_copy_made_in_the_context_has_its_adapters():
    model, _ = models("LoRA")
    output = model(X)
    with lf.disable_adapters(model):
        copied = copy.deepcopy(model)
        with pytest.raises(lf.ArgumentError, match="adapters disabled"):
            model[0].merge()
        with pytest.raises(lf.ArgumentError, match="adapters disabled"):
            lf.merge_(model)
        with pytest.raises(lf.ArgumentError, match="adapters disabled"):
            lf.unload_(model)
    assert torch.equal(copied(X), output)


def test_layers_that_peft_has_disabled_stay_disabled():
    model, base = models("fused")
    with model.disable_adapter():
        with lf.disable_adapters(model) as report:
            assert len(report.left) == 2
        assert torch.equal(model(X), base)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CONFIGS])
def test_the_context_of_peft_within_leaves_adapters_trained(kind):
    """TRL's reference model disables the adapters by PEFT, which does not enable those that were disabled before."""
    model, base = models(kind)
    before = snapshot(model)
    with lf.disable_adapters(model), model.disable_adapter():
        assert torch.equal(model(X), base)
    assert_unchanged(model, before)


def test_an_adapter_that_is_activated_within_is_trained():
    model, _ = models("fused")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0", "2"]))
    with lf.disable_adapters(model):
        model.set_adapter("other")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 and all(".other." in name for name in trained)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "a string"], ids=["no adapter", "no module"])
def test_disable_adapters_refuses_models_without_adapters(model):
    with pytest.raises(lf.ArgumentError, match="model"), lf.disable_adapters(model):
        pass
