"""ScaLoRA in an optimizer step: effective weights stay, κ is calibrated, weights that cannot take a merge are
refused."""

import math

import pytest
import tiny
import torch
from method_runs import layer_with_gradients
from torch import nn

import lora_fast as lf
from lora_fast import methods as M


def scalora_on_a_pair(weight_dtype, lr=0.0, **options):
    layer, _, da, db = layer_with_gradients(1, r=4, d_in=64, d_out=48)
    a, b = nn.Parameter(layer.a.float() / 8), nn.Parameter(layer.b.float() / 8)
    weight = (layer.w / 8).to(weight_dtype)
    a.grad, b.grad = da.float(), db.float()
    return a, b, weight, lf.optim.LoRAAdamW([(a, b, 2.0, weight)], lr=lr, methods=[M.ScaLoRA(limit=None, **options)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scaling_keeps_the_effective_weight(dtype):
    a, b, weight, optimizer = scalora_on_a_pair(dtype)
    before, start, old_a = weight.double() + 2.0 * (b @ a).double(), weight.clone(), a.detach().clone()
    optimizer.step()
    after = weight.double() + 2.0 * (b @ a).double()
    assert (after - before).abs().max() <= 4 * torch.finfo(torch.float32).eps * before.abs().max()
    assert not torch.equal(weight, start) and (a / old_a - 1).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend, scalings", [("torch", 50), ("triton", 3)])
def test_scalings_of_16_bit_factors_keep_the_effective_weight(backend, scalings, dtype):
    """Rounding the scaled factors moves the product. What it moves by is merged, too."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    a, b = nn.Parameter((draw(5, 32) / 6).to(dtype)), nn.Parameter((draw(24, 5) / 20).to(dtype))
    weight, product = (draw(24, 32) / 6).float(), lambda: 2.0 * b.detach().double() @ a.detach().double()
    before, start = weight.double() + product(), product()
    with lf.set_backend(backend):
        optimizer = lf.optim.LoRAAdamW([(a, b, 2.0, weight)], lr=0.0, methods=[M.ScaLoRA(interval=1)])
        for _ in range(scalings):
            full = draw(24, 32)
            a.grad, b.grad = (2 * b.double().T @ full).to(a.dtype), (2 * full @ a.double().T).to(b.dtype)
            optimizer.step()
    moved = (weight.double() + product() - before).norm() / start.norm()
    assert moved <= scalings * 2 * torch.finfo(torch.float32).eps * before.norm() / start.norm()
    assert (product() - start).norm() > 0.1 * start.norm()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pair_that_is_not_finite_changes_no_weight_and_no_other_pair(backend, dtype, value):
    def train(bad):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator) / 4
        pairs = []
        for _ in range(3):
            a, b = nn.Parameter(draw(4, 16).to(dtype)), nn.Parameter(draw(12, 4).to(dtype))
            pairs.append((a, b, 2.0, draw(12, 16)))
        optimizer = lf.optim.LoRAAdamW(pairs, lr=1e-3, methods=[M.ScaLoRA(interval=1, kappa=5.0)])
        for step in range(3):
            for a, b, *_ in pairs:
                a.grad, b.grad = draw(4, 16).to(dtype), draw(12, 4).to(dtype)
            if bad and step == 1:
                pairs[0][1].grad[2, 0] = value
            optimizer.step()
        return pairs

    with lf.set_backend(backend):
        (bad, *others), (clean, *others_alone) = train(bad=True), train(bad=False)
    assert bad[1].isnan().any() and bad[3].isfinite().all() and not torch.equal(bad[3], clean[3])
    for pair, alone in zip(others, others_alone, strict=True):
        assert all(torch.equal(x, y) for x, y in zip((*pair[:2], pair[3]), (*alone[:2], alone[3]), strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scaling_saturates_float16_factors(backend):
    """A factor that grew to infinity would put infinity into the frozen weight."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    a, b = nn.Parameter(draw(4, 16).half() / 1000), nn.Parameter((2e4 + 1e4 * draw(12, 4).abs()).half())
    weight = draw(12, 16)
    before = weight.double() + b.detach().double() @ a.detach().double()
    a.grad, b.grad = draw(4, 16).half(), draw(12, 4).half()
    with lf.set_backend(backend):
        lf.optim.LoRAAdamW([(a, b, 1.0, weight)], lr=0.0, methods=[M.ScaLoRA(kappa=1e-12, interval=1)]).step()
    after = weight.double() + b.detach().double() @ a.detach().double()
    assert b.isfinite().all() and b.abs().max() == torch.finfo(torch.float16).max
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_merges_are_exact_on_average(dtype):
    ends, weights = [], {}
    for seed in range(400):
        a, b, weight, optimizer = scalora_on_a_pair(dtype, kappa=20.0, seed=seed)
        start, exact = weight.double(), weight.double() + 2.0 * (b @ a).double()
        optimizer.step()
        exact = exact - 2.0 * (b @ a).double()
        ends.append(weight.double())
    change = exact - start
    mean = torch.stack(ends).mean(0) - start
    spacing = torch.finfo(dtype).eps * exact.abs().max().item()
    assert (mean - change).abs().mean() <= spacing / 400**0.5
    for rounding in ("nearest", "compensated"):
        a, b, weight, optimizer = scalora_on_a_pair(dtype, kappa=20.0, rounding=rounding)
        optimizer.step()
        weights[rounding] = weight.double()
    residual = optimizer.state[b]["merge_residual"].double()
    assert torch.equal(weights["nearest"], weights["compensated"])
    assert (weights["compensated"] + residual - exact).abs().max() <= torch.finfo(dtype).eps ** 2 * exact.abs().max()


def test_kappa_is_calibrated_at_the_first_scaling():
    a, b, _, optimizer = scalora_on_a_pair(torch.float32)
    old = a.detach().clone()
    a.grad.zero_(), b.grad.zero_()
    optimizer.step()
    assert torch.equal(a, old) and optimizer.param_groups[0]["method_state"]["kappa"] == 0
    a, b, _, optimizer = scalora_on_a_pair(torch.float32)
    optimizer.step()
    beta = (a / old)[:, 0]
    assert beta.log().mean().abs() < 1e-5 and optimizer.param_groups[0]["method_state"]["kappa"] > 0


def test_scalora_refuses_weights_that_cannot_take_a_merge():
    a, b = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(5, 4))
    a2, b2, w = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(5, 4)), torch.ones(5, 6)
    cases = {
        "quantised": [(a, b, 1.0, torch.ones(5, 6, dtype=torch.int8))],
        "got none": [(a, b)],
        "a weight of its own": [(a, b, 1.0, w), (a2, b2, 1.0, w)],
        "a frozen": [(a, b, 1.0, nn.Parameter(w))],
        "one weight held by": tiny.injected_llama(tied=True, target_modules=["lm_head"]),
    }
    for message, model in cases.items():
        with pytest.raises(lf.ArgumentError, match=message):
            lf.optim.LoRAAdamW(model, methods=[M.ScaLoRA()])


def test_scalora_trains_a_model_and_changes_all_base_weights():
    model = tiny.peft_llama()
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[M.ScaLoRA(interval=2)])
    losses = []
    for _ in range(6):
        loss = tiny.loss_of(model, tiny.batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_gradients_of_a_layer_satisfy_what_scalora_assumes():
    """The equations need a daᵀ = dbᵀ b, which holds for factors of one product."""
    generator = lambda seed: torch.Generator().manual_seed(seed)
    x, w = torch.randn(30, 12, generator=generator(0)), torch.randn(9, 12, generator=generator(1))
    a, b = (torch.randn(*shape, generator=generator(2)).requires_grad_() for shape in ((4, 12), (9, 4)))
    lf.functional.lora_linear(x, w, None, a, b, 2.0).square().sum().backward()
    torch.testing.assert_close(a.detach() @ a.grad.T, b.grad.T @ b.detach(), rtol=1e-4, atol=1e-2)


def test_captured_step_on_torch_rounds_with_the_generator_that_graphs_advance(monkeypatch):
    """A generator with a seed of its own cannot be captured, and its numbers would repeat at every replay."""
    monkeypatch.setattr(lf.backend, "is_capturing", lambda device: True)
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        _, _, weight, optimizer = scalora_on_a_pair(torch.bfloat16, kappa=20.0, interval=1)
        with lf.set_backend("torch"):
            optimizer.step()
        weights.append(weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", ["injected", "fused"])
@pytest.mark.parametrize("methods", [(), (M.ILoRA(),), (M.ScaLoRA(interval=2),)], ids=["plain", "ilora", "scalora"])
def test_only_methods_that_change_weights_refuse_a_step_while_merged(kind, methods):
    """Unmerging restores the weight of before, so that ScaLoRA's change of it would be lost. It refuses also the steps
    between its merges."""

    def build():
        model = tiny.injected_llama() if kind == "injected" else tiny.peft_llama(targets=["q_proj", "up_proj"])
        if kind == "fused":
            lf.fuse_(model)
        return model, lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods)

    (model, optimizer), (other, reference) = build(), build()
    for seed in range(3):
        for each in (model, other):
            tiny.loss_of(each, tiny.batch(seed)).backward()
        lf.merge_(model)
        if methods and methods[0].changes_weights:
            before, steps = tiny.snapshot(model), str(optimizer.state_dict()["state"])
            with pytest.raises(
                lf.ArgumentError, match=r"q_proj\S*\.weight: expected a weight without a merged adapter"
            ):
                optimizer.step()
            tiny.assert_unchanged(model, before)
            assert str(optimizer.state_dict()["state"]) == steps
            lf.unmerge_(model)
        optimizer.step(), reference.step()
        lf.unmerge_(model, allow_empty=True)
        optimizer.zero_grad(), reference.zero_grad()
    tiny.assert_same_tensors(tiny.snapshot(model)["bits"], tiny.snapshot(other)["bits"])


def test_a_merged_layer_without_gradients_does_not_stop_the_step_of_others():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lf.inject_(model, lf.LoRAConfig(r=2))
    optimizer = lf.optim.LoRAAdamW(model, methods=[M.ScaLoRA()])
    model[1](torch.ones(1, 8)).sum().backward()
    model[0].merge()
    optimizer.step()
    model[0].unmerge()
    assert model[1].lora_B.any() and not model[0].lora_B.any()
