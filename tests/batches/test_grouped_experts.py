"""The experts of one parameter on the grouped kernels, through the interpreter (natively on a CUDA machine). The
reference is plain torch in float64, which test_stacked_experts.py compares with PEFT and with separate pairs."""

import expert_models as experts
import pytest
import torch
from step_launches import LAUNCHES
from torch import nn

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.batches.pairs import Pair, find_pairs
from lora_fast.kernels.inspection import interpreter

pytestmark = pytest.mark.gpu

# LoRA-RITE runs in torch on every backend.
METHODS = {name: methods for name, methods in experts.METHODS.items() if "rite" not in name}
every_method = pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS.keys())


def trained(dtype, backend, methods, is_transposed, steps=4, **shape):
    """Returns every factor and weight after some steps, in float64. Gradients are computed in float64, then rounded."""
    model, wrappers = experts.experts_model(is_transposed, **shape)
    _, exact_wrappers = experts.experts_model(is_transposed, **shape)
    model.to(dtype)
    with lf.set_backend(backend):
        optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, weight_decay=0.1, methods=methods)
        for i in range(steps):
            for j, (wrapper, other) in enumerate(zip(wrappers, exact_wrappers, strict=True)):
                for p, q in zip(wrapper.parameters(), other.parameters(), strict=True):
                    q.data = p.data.double()
                experts.set_gradients(other, 100 * j + i)
                for p, q in zip(wrapper.parameters(), other.parameters(), strict=True):
                    p.grad = None if q.grad is None else q.grad.to(dtype)
            optimizer.step()
    return [p.detach().double() for p in model.parameters()]


def distance(tensors, references):
    """Returns the largest relative error in L2 norm."""
    return max((x - y).norm() / y.norm() for x, y in zip(tensors, references, strict=True)).item()


@every_method
@experts.both_layouts
def test_grouped_experts_follow_torch_in_float64(methods, is_transposed):
    exact = trained(torch.float64, "torch", methods, is_transposed, layers=2)
    eager = distance(trained(torch.float32, "torch", methods, is_transposed, layers=2), exact)
    ours = distance(trained(torch.float32, "triton", methods, is_transposed, layers=2), exact)
    assert ours <= 2 * eager + 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["pilora", "scalora"])
def test_experts_larger_than_a_chunk_follow_torch_in_float64(name):
    """d and r fill no block, and the partial sums of the experts are interleaved in memory."""
    shape = {"experts": 2, "r": 5, "d_out": 2100, "d_in": 70}
    exact, eager, ours = (
        trained(dtype, backend, METHODS[name], False, steps=1, **shape)
        for dtype, backend in ((torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton"))
    )
    assert distance(ours, exact) <= 2 * distance(eager, exact) + 16 * torch.finfo(torch.float32).eps


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts launches")
@pytest.mark.parametrize("name", LAUNCHES)
def test_128_experts_take_as_many_launches_as_one_pair(name, monkeypatch):
    methods, expected = LAUNCHES[name]
    model, (wrapper,) = experts.experts_model(experts=128, r=8, dtype=torch.float32, d_out=24, d_in=16)
    experts.set_gradients(wrapper, 0)
    with lf.set_backend("triton"):
        optimizer = lf.optim.LoRAAdamW(model, methods=methods)
        with monkeypatch.context() as patch:  # launches are counted and not executed
            patch.setattr(interpreter.InterpretedFunction, "run", lambda *args, **kwargs: None)
            optimizer.step()
            with interpreter.traffic() as counted:
                optimizer.step()
    assert counted.launches == [f"lora_{kernel}_kernel" for kernel in expected]


def test_experts_train_alike_beside_ordinary_pairs_of_their_rank():
    """Both are in one batch, whose r×r work is one launch, and each trains as it does alone."""
    apart, together = [], []
    for results, in_one_optimizer in ((apart, False), (together, True)):
        model, (wrapper,) = experts.experts_model(dtype=torch.float32)
        torch.manual_seed(1)
        pair = nn.Parameter(torch.randn(experts.R, 24)), nn.Parameter(torch.randn(16, experts.R))
        entries = find_pairs(model) + [Pair("pair", *pair)]
        members = [entries] if in_one_optimizer else [[entry] for entry in entries]
        with lf.set_backend("triton"):
            optimizers = [lf.optim.LoRAAdamW(pairs, lr=1e-2, methods=[M.PiLoRA()]) for pairs in members]
            for i in range(3):
                experts.set_gradients(wrapper, i)
                for p in pair:
                    p.grad = torch.ones_like(p) / (i + 1)
                for optimizer in optimizers:
                    optimizer.step()
        assert all(len(optimizer._batches) == 1 for optimizer in optimizers)
        results += [p.detach() for p in (*model.parameters(), *pair)]
    assert all(torch.equal(x, y) for x, y in zip(apart, together, strict=True))


@experts.both_layouts
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scalings_of_16_bit_factors_keep_the_effective_weights(is_transposed, backend):
    with lf.set_backend(backend):
        model, (wrapper,) = experts.experts_model(is_transposed, dtype=torch.float32)
        pair = [p for p in model.parameters() if p.requires_grad]
        for p in pair:
            p.data = p.data.bfloat16()
        experts.set_gradients(wrapper, 0)
        for p in pair:
            p.grad = p.grad.bfloat16() if p.grad is not None else None
        start, before = [p.detach().clone() for p in pair], experts.effective(wrapper)
        optimizer = lf.optim.LoRAAdamW(model, lr=0.0, methods=[M.ScaLoRA(interval=1)])
        for _ in range(3):
            optimizer.step()
        assert all((p != old).any() for p, old in zip(pair, start, strict=True))
        bound = 3 * 4 * torch.finfo(torch.float32).eps * before.abs().max()
        assert (experts.effective(wrapper) - before).abs().max() <= bound


@experts.both_layouts
@pytest.mark.parametrize("rounding", experts.ROUNDINGS)
def test_merges_into_16_bits_keep_the_effective_weights(is_transposed, rounding):
    with lf.set_backend("triton"):
        model, (wrapper,) = experts.experts_model(is_transposed, dtype=torch.float32)
        experts.set_gradients(wrapper, 0)
        weight = wrapper.get_param()
        weight.data = weight.data.bfloat16()
        start, before = weight.detach().clone(), experts.effective(wrapper)
        optimizer = lf.optim.LoRAAdamW(model, lr=0.0, methods=[M.ScaLoRA(interval=1, rounding=rounding)])
        for _ in range(3):
            optimizer.step()
        assert ((weight != start).double().mean(dim=(1, 2)) > 0.5).all()
        bound = 4 * torch.finfo(torch.bfloat16).eps * weight.abs().max()
        assert (experts.effective(wrapper) - before).abs().max() <= bound
