"""A step changes parameters where they are, as torch's optimizers do: code that saves models takes parameters of one
storage for tied weights, and parameters that are tied by their memory stay tied."""

import pytest
import torch
from adapter_pairs import pairs, set_gradients
from expert_models import METHODS, experts_model
from safetensors.torch import load_file, save_model
from torch import nn

import lora_fast as lf
from lora_fast import methods as M

BOTH_BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
SHAPES = [(12, 20, 4), (12, 20, 4), (9, 16, 4)]


@BOTH_BACKENDS
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS.keys())
def test_parameters_keep_their_own_memory(methods, backend):
    chosen = pairs(shapes=SHAPES)
    factors = [p for a, b, *_ in chosen for p in (a, b)]
    places = [(p.data_ptr(), p.untyped_storage().nbytes()) for p in factors]
    with lf.set_backend(backend):
        optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods)
        for step in range(2):
            set_gradients(chosen, step)
            optimizer.step()
    assert [(p.data_ptr(), p.untyped_storage().nbytes()) for p in factors] == places


@BOTH_BACKENDS
def test_step_after_one_that_failed_uses_the_present_factors_and_gradients(backend, monkeypatch):
    chosen = pairs(shapes=SHAPES)
    factors = [p for a, b, *_ in chosen for p in (a, b)]
    optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-3, methods=[M.ILoRA(lam=1e-9)])
    with lf.set_backend(backend), monkeypatch.context() as patch:
        patch.setattr(M.ILoRA, "after", lambda method, batch: (batch.grams(), 1 / 0))
        set_gradients(chosen, 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    for p in factors:
        p.data.zero_()
    with lf.set_backend(backend):
        optimizer.step()
    assert all(0 < p.abs().max() < 2e-3 for p in factors)


def test_safetensors_saves_every_parameter_after_a_step_with_a_method(tmp_path):
    model = nn.ModuleList([lf.LoRALinear(16, 16, r=4, alpha=8) for _ in range(3)])
    optimizer = lf.optim.LoRAAdamW(model, methods=[M.ILoRA()])
    sum(layer(torch.ones(2, 16)).square().sum() for layer in model).backward()
    optimizer.step()
    save_model(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], p) for name, p in model.state_dict().items())


def tied():
    """Returns two pairs, and a parameter that is the first one's a transposed, in the same memory. PEFT's
    ``ensure_weight_tying`` makes such factors of ``lm_head`` and the embedding."""
    chosen = pairs(shapes=SHAPES[:2])
    (_, b, *others), second = chosen
    table = nn.Parameter(torch.linspace(-1, 1, 80).view(20, 4))
    return [(nn.Parameter(table.data.T), b, *others), second], table


@BOTH_BACKENDS
@pytest.mark.parametrize("methods", [[], [M.ScaleReg(lam=1e-12)], [M.ILoRA(lam=1e-12)]], ids=["plain", "reg", "ilora"])
def test_factor_that_shares_another_parameters_memory_trains_as_in_torchs_adamw(methods, backend):
    (ours, table), (theirs, other) = tied(), tied()
    parameters = [*(p for a, b, *_ in theirs for p in (a, b)), other]
    optimizer = lf.optim.LoRAAdamW(ours, lr=1e-2, weight_decay=0.1, methods=methods)
    optimizer.add_param_group({"params": [table]})
    reference = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        for chosen, tie in ((ours, table), (theirs, other)):
            set_gradients(chosen, step)
            tie.grad = torch.cos(torch.arange(80.0) + step).view(20, 4)
        with lf.set_backend(backend):
            optimizer.step()
        reference.step()
    assert torch.equal(ours[0][0], table.T) and ours[0][0].data_ptr() == table.data_ptr()
    for p, q in zip([*(p for a, b, *_ in ours for p in (a, b)), table], parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_experts_factor_keeps_a_tie_to_another_parameter():
    (model, (wrapper,)), (straight, (other,)) = experts_model(), experts_model()
    for layer in (wrapper, other):
        for p in (layer.lora_A.default.weight, layer.lora_B.default.weight):
            p.grad = torch.cos(torch.arange(p.numel()).double()).view(p.shape)
    a = wrapper.lora_A.default.weight
    a.data = a.data.T.contiguous().T
    tie = a.data.T
    for x in (model, straight):
        optimizer = lf.optim.LoRAAdamW(x, lr=1e-2, methods=[M.ILoRA(), M.ScaledAdamW(damping=1e-2)])
        for _ in range(3):
            optimizer.step()
    assert torch.equal(tie.T, a) and torch.equal(a, other.lora_A.default.weight)


def test_two_factors_in_one_memory_are_refused():
    (a, b, *_), (_, d, *_) = pairs(shapes=SHAPES[:2])
    with pytest.raises(lf.ArgumentError, match=r"model\[1\]\.lora_A: .*a view of the memory of model\[0\]\.lora_A"):
        lf.optim.LoRAAdamW([(a, b), (nn.Parameter(a.data), d)])
