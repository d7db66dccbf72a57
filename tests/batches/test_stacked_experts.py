"""The experts of one parameter (PEFT's target_parameters) are adapters of their own. The reference for the meaning of a
layer's factors is always PEFT: get_delta_factors, get_delta_weight."""

import copy

import pytest
import torch
from expert_models import (
    D_IN,
    D_OUT,
    METHODS,
    ROUNDINGS,
    E,
    R,
    both_layouts,
    directions,
    effective,
    experts_model,
    factors,
    matrices,
    peft,
    set_gradients,
)
from torch import nn

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.batches.pairs import find_pairs

every_method = pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS.keys())


def train(optimizer, wrappers, steps, first=0):
    for i in range(first, first + steps):
        for j, wrapper in enumerate(wrappers):
            set_gradients(wrapper, 100 * j + i)
        optimizer.step()


def separate_pairs(wrapper):
    """Returns the adapters of E experts as E ordinary pairs."""
    weights = matrices(wrapper, wrapper.get_param())
    pairs, scaling = factors(wrapper)
    return [(nn.Parameter(a), nn.Parameter(b), scaling, w) for (a, b), w in zip(pairs, weights, strict=True)]


def set_separate_gradients(pairs, full):
    for (a, b, scaling, _), g in zip(pairs, full, strict=True):
        a.grad, b.grad = scaling * b.detach().mT @ g, scaling * g @ a.detach().mT


@every_method
@both_layouts
def test_each_expert_trains_as_a_pair_of_its_own(methods, is_transposed):
    model, wrappers = experts_model(is_transposed, layers=2)
    pairs = [separate_pairs(wrapper) for wrapper in wrappers]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "methods": methods}
    ours = lf.optim.LoRAAdamW(model, **settings)
    reference = lf.optim.LoRAAdamW([pair for layer in pairs for pair in layer], **settings)
    start = [x for layer in pairs for pair in layer for x in (pair[0].detach().clone(), pair[1].detach().clone())]
    for i in range(7):
        train(ours, wrappers, 1, first=i)
        for j, (wrapper, layer) in enumerate(zip(wrappers, pairs, strict=True)):
            set_separate_gradients(layer, directions(wrapper, 100 * j + i))
        reference.step()
    for wrapper, layer in zip(wrappers, pairs, strict=True):
        weights = matrices(wrapper, wrapper.get_param())
        for (a, b), weight, (want_a, want_b, _, want_weight) in zip(factors(wrapper)[0], weights, layer, strict=True):
            for got, want in ((a, want_a), (b, want_b), (weight, want_weight)):
                torch.testing.assert_close(got, want.detach(), rtol=1e-8, atol=1e-10)
    end = [x for layer in pairs for pair in layer for x in pair[:2]]
    assert all((x - y).abs().max() > 1e-2 for x, y in zip(start, end, strict=True))


@every_method
def test_experts_resume_bitwise(methods):
    model, wrappers = experts_model(layers=2, dtype=torch.float32)
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods)
    train(optimizer, wrappers, 4)
    saved_model, saved = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    shapes = {p.shape for p in model.parameters() if p.requires_grad}
    assert {state["exp_avg"].shape for state in saved["state"].values()} == shapes
    train(optimizer, wrappers, 4, first=4)
    resumed = lf.optim.LoRAAdamW(saved_model, lr=1e-2, methods=methods)
    resumed.load_state_dict(saved)
    again = [module for module in saved_model.modules() if type(module).__name__ == "ParamWrapper"]
    train(resumed, again, 4, first=4)
    for (name, p), other in zip(model.named_parameters(), saved_model.parameters(), strict=True):
        assert torch.equal(p, other), name


@every_method
def test_copied_and_moved_experts_continue_bitwise(methods):
    """A deepcopy of model and optimizer, and parameters whose memory is replaced, train to bitwise equal parameters."""
    model, wrappers = experts_model(dtype=torch.float32)
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods)
    train(optimizer, wrappers, 3)
    other, theirs = copy.deepcopy((model, optimizer))
    copied = [module for module in other.modules() if type(module).__name__ == "ParamWrapper"]
    for p in model.parameters():
        p.data = p.data.clone()
    train(optimizer, wrappers, 3, first=3)
    train(theirs, copied, 3, first=3)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@every_method
def test_128_experts_of_rank_8_train(methods):
    model, wrappers = experts_model(experts=128, r=8, dtype=torch.float32, d_out=24, d_in=16)
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-3, methods=methods)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    train(optimizer, wrappers, 2)
    for p, q in zip((p for p in model.parameters() if p.requires_grad), before, strict=True):
        assert p.isfinite().all() and not torch.equal(p, q)
    assert len(lf.metrics.adapter_stats(model)) == 128


@pytest.mark.parametrize("experts, r, fits", [(32, 16, True), (2, 256, True), (2, 257, False)])
def test_largest_rank_is_that_of_one_expert(experts, r, fits):
    model, _ = experts_model(experts=experts, r=r)
    if fits:
        assert len(lf.optim.LoRAAdamW(model).param_groups[0]["params"]) == 2
    else:
        with pytest.raises(lf.ArgumentError, match=f"rank 1 to 256 for each of {experts} experts"):
            lf.optim.LoRAAdamW(model)


@both_layouts
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, "nearest")] + [(torch.bfloat16, x) for x in ROUNDINGS])
def test_scalora_keeps_the_effective_weights_of_experts(is_transposed, dtype, rounding):
    """The learning rate is 0. The factors are float64, over weights of either dtype."""
    model, (wrapper,) = experts_model(is_transposed)
    weight = wrapper.get_param()
    set_gradients(wrapper, 0)
    weight.data = weight.data.to(dtype)
    start, before = weight.detach().clone(), effective(wrapper)
    optimizer = lf.optim.LoRAAdamW(model, lr=0.0, methods=[M.ScaLoRA(interval=1, rounding=rounding)])
    for _ in range(3):
        optimizer.step()
    changed = (weight != start).double().mean(dim=(1, 2))
    assert (changed > 0.5).all()
    assert (effective(wrapper) - before).abs().max() <= 4 * torch.finfo(dtype).eps * weight.abs().max()


def test_compensated_merges_into_experts_resume_bitwise():
    """The compensation has the layout of the weight, (E, d_in, d_out) here, and is saved in the state dict."""
    method = M.ScaLoRA(interval=2, rounding="compensated")
    model, (wrapper,) = experts_model(is_transposed=True, dtype=torch.float32)
    set_gradients(wrapper, 0)
    wrapper.get_param().data = wrapper.get_param().data.bfloat16()
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[method])
    optimizer.step()
    other, theirs = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    assert theirs["state"][1]["merge_residual"].shape == wrapper.get_param().shape
    resumed = lf.optim.LoRAAdamW(other, lr=1e-2, methods=[method])
    resumed.load_state_dict(theirs)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad
    for _ in range(4):
        optimizer.step()
        resumed.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_saving_refuses_experts_that_scalora_changed(tmp_path):
    model, wrappers = experts_model()
    lf.save_adapter(model, tmp_path / "before")
    optimizer = lf.optim.LoRAAdamW(model, lr=0.0, methods=[M.ScaLoRA(keep="terms")])
    train(optimizer, wrappers, 1)
    for exact in (False, True):
        with pytest.raises(lf.CheckpointError, match=r"merge_and_unload.*of 4 experts, matrices"):
            lf.save_adapter(model, tmp_path / "after", exact=exact)
    assert not (tmp_path / "after").exists()


def test_experts_are_not_stacked_with_pairs_of_equal_shape():
    """A pair of rank E·r and a pair of E experts of rank r have factors of equal shape."""
    model, (wrapper,) = experts_model(r=2)
    alone, (other,) = experts_model(r=2)
    a, b = nn.Parameter(torch.randn(E * 2, D_IN).double()), nn.Parameter(torch.randn(D_OUT, E * 2).double())
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[M.BaLoRA()])
    optimizer.add_param_group({"params": [(a, b, 2.0)]})
    reference = lf.optim.LoRAAdamW(alone, lr=1e-2, methods=[M.BaLoRA()])
    for i in range(3):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        train(optimizer, [wrapper], 1, first=i)
        train(reference, [other], 1, first=i)
    torch.testing.assert_close(a @ a.mT, b.mT @ b)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)


def test_experts_take_gradients_in_another_memory_order():
    """torch.func returns such gradients. torch's fused AdamW would read them in memory order."""
    (model, (wrapper,)), (other, _) = experts_model(), experts_model()
    optimizers = [lf.optim.LoRAAdamW(x, lr=1e-2, methods=[M.ILoRA()]) for x in (model, other)]
    set_gradients(wrapper, 0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.mT.contiguous().mT
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_matrix_is_an_ordinary_pair():
    model = nn.ModuleDict({"layer": nn.Linear(D_IN, D_OUT, bias=False)})
    config = peft.LoraConfig(r=R, target_modules=[], target_parameters=["layer.weight"])
    model = peft.get_peft_model(model, config)
    (pair,) = find_pairs(model)
    assert (pair.experts, pair.rank, pair.product_names) == (1, R, [pair.name])
    assert pair.weight is model.base_model.model["layer"].get_param() and pair.unmergeable is None


@pytest.mark.parametrize("method", [M.BaLoRA(), M.ScaLoRA(interval=1)], ids=["balora", "scalora"])
def test_mixtral_keeps_its_outputs_at_learning_rate_0(method):
    """Nested PEFT wrappers of one module adapt its two parameters of experts."""
    model, ids = mixtral(), torch.arange(24)[None]
    optimizer = lf.optim.LoRAAdamW(model, lr=0.0, methods=[method])
    before = model(ids).logits.detach()
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert (model(ids).logits - before).norm() <= 1e-5 * before.norm()


def test_fusing_and_merging_leave_results_unchanged(tmp_path):
    """Experts are fused, and left by merge_. PEFT loads the adapter that is saved afterwards."""
    model, ids = mixtral(), torch.arange(24)[None]
    with torch.no_grad():
        before = model(ids).logits
        report = lf.fuse_(model)
        experts = [name for name in report.changed if ".experts" in name]
        assert len(experts) == 2 and len(report.changed) == 3
        torch.testing.assert_close(model(ids).logits, before)
        assert set(experts) <= set(lf.merge_(model).left)
        torch.testing.assert_close(model(ids).logits, before)
        lf.unmerge_(model)
        lf.save_adapter(model, tmp_path)
        again = peft.PeftModel.from_pretrained(mixtral().unload(), tmp_path)
        torch.testing.assert_close(again(ids).logits, before)


def mixtral():
    """Returns a tiny random Mixtral with adapters on q_proj and on both parameters of its experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        num_local_experts=E,
    )
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = peft.LoraConfig(r=R, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets)
    model = peft.get_peft_model(MixtralForCausalLM(config), options)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model
