"""What users do with results of layers over quantised weights, as they do with nn.Linear's, and with the weights."""

import pytest
import torch
from quantized_layers import D_IN, FORMATS, peft_model, quantized
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lora_fast as lf

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("shape", [(2, 5, D_IN), (D_IN,)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_result_may_be_changed_in_place(name, shape):
    model = peft_model(name, quantized(name))
    lf.fuse_(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    results = []
    for change in (lambda y: y.mul_(2.0), lambda y: y * 2.0):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = change(model(leaf))
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert model[0].fallback_reason is None
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["nf4", "torchao-int8"])
def test_a_bias_changed_between_the_calls_of_a_group_counts(name):
    model, x = nn.ModuleDict({key: quantized(name) for key in "qk"}), torch.randn(5, D_IN)
    lf.inject_(model, lf.LoRAConfig(r=2))
    for _ in range(2):  # the second call's q computes k, too
        read = x.clone().requires_grad_() * 1.0
        (model["q"](read) + model["k"](read)).sum().backward()
    read = x.clone().requires_grad_() * 1.0
    before = model["q"](read)
    with torch.no_grad():
        model["k"].bias.add_(1.0)
    torch.testing.assert_close(model["k"](read), before + 1.0)
    assert lf.groups(model).groups == []


@pytest.mark.parametrize("kept", ["", "clone"], ids=["every-result", "clones"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["nf4", "torchao-float8"])
def test_selective_checkpointing_may_keep_any_result(name, backend, kept):
    model = nn.Sequential(*peft_model(name, quantized(name)), nn.Tanh())
    lf.fuse_(model)
    policy = lambda _, op, *args, **kwargs: (
        CheckpointPolicy.MUST_SAVE if kept in str(op) else CheckpointPolicy.PREFER_RECOMPUTE
    )
    again = lambda x: checkpoint(
        model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    x = torch.randn(2, 5, D_IN)
    results = []
    with lf.set_backend(backend):
        for run in (model, again):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            run(leaf).square().sum().backward()
            results.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_librarys_own_tensor_is_no_weight_of_the_function(name):
    weight, a, b = quantized(name).weight, torch.zeros(2, D_IN), torch.zeros(3, 2)
    with pytest.raises(
        lf.ArgumentError, match="weight: expected a floating tensor or, of a quantised layer, lora_fast"
    ):
        lf.functional.lora_linear(torch.zeros(5, D_IN), weight, None, a, b, 1.0)
