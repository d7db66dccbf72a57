"""SingLoRALinear: one matrix for both factors, with a warm-up over the optimizer's steps."""

import copy

import pytest
import torch
from tiny import batch, llama, loss_of
from torch import nn

import lora_fast as lf

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"wide": (10, 6), "tall": (6, 10), "square": (8, 8)}


def layer_of(d_in=10, d_out=6, dtype=torch.float32, **settings) -> lf.SingLoRALinear:
    torch.manual_seed(0)
    return lf.SingLoRALinear(d_in, d_out, **{"r": 4, "alpha": 8, "dtype": dtype, "device": DEVICE} | settings)


def inputs(d_in=10, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(5, d_in, generator=torch.Generator().manual_seed(3), dtype=dtype).to(DEVICE).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_passes_gradcheck(shape):
    d_in, d_out = SHAPES[shape]
    layer, x = layer_of(d_in, d_out, torch.float64), inputs(d_in, torch.float64)
    call = lambda x, s: torch.func.functional_call(layer, {"free_s": s}, (x,))
    with lf.set_backend("torch"):
        assert torch.autograd.gradcheck(call, (x, layer.free_s))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_is_the_formula(shape, backend):
    """ΔW = (alpha / r) S[:d_out] S[:d_in]ᵀ, and dS the sum of both factors' gradients, padded."""
    d_in, d_out = SHAPES[shape]
    layer, x = layer_of(d_in, d_out), inputs(d_in)
    with lf.set_backend(backend):
        y = layer(x)
        y.pow(2).sum().backward()
    got, layer.free_s.grad = layer.free_s.grad, None
    s = layer.free_s
    plain = nn.functional.linear(x, layer.weight + 2 * s[:d_out] @ s[:d_in].T, layer.bias)
    plain.pow(2).sum().backward()
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(got, layer.free_s.grad)


def test_warm_up_follows_the_optimizer_s_steps():
    layer = layer_of(ramp_steps=4)
    optimizer = torch.optim.SGD([layer.free_s], lr=0.0)
    lf.count_steps_(layer, optimizer)
    x = inputs()
    full = (layer.weight + 2 * layer.free_s[:6] @ layer.free_s.T).detach()
    for share in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        expected = nn.functional.linear(x, torch.lerp(layer.weight, full, share), layer.bias)
        torch.testing.assert_close(layer(x), expected)
        layer(x).sum().backward()  # two micro-batches, one step
        optimizer.step()
    assert layer.state_dict()["steps"] == 6


def test_lora_adamw_counts_its_steps():
    model = llama().to(DEVICE)
    lf.inject_(model, lf.SingLoRAConfig(r=4, ramp_steps=2))
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = loss_of(model, batch().to(DEVICE))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[2]  # the first with the whole adapter
    assert all(layer.steps == 8 for layer in model.modules() if isinstance(layer, lf.SingLoRALinear))


def test_training_with_uncounted_steps_is_refused():
    layer = layer_of(ramp_steps=4)
    with pytest.raises(RuntimeError, match="count_steps_"):
        layer(inputs())
    layer.eval()(inputs())


def test_layer_with_warm_up_starts_as_its_linear():
    linear = nn.Linear(10, 6, device=DEVICE)
    layer = lf.SingLoRALinear.from_linear(linear, r=4, alpha=8, ramp_steps=3).eval()
    assert torch.equal(layer(inputs()), linear(inputs())) and layer.weight is linear.weight


def test_free_s_starts_at_the_scale_of_lora_s_a():
    """Entries of ±1/√(its longer side), whatever the rank: of ±1/√r, the adapter would drown the weight."""
    largest = layer_of(300, 200).free_s.abs().max().item()
    assert 0.95 * 300**-0.5 < largest <= 300**-0.5 * (1 + 1e-6)


def test_model_compiles_as_one_graph():
    layer = layer_of(ramp_steps=4)
    optimizer = torch.optim.SGD([layer.free_s], lr=0.1)
    lf.count_steps_(layer, optimizer)
    torch.compiler.reset()  # what other tests have compiled counts as a compilation of the same forward
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(inputs()), layer(inputs()))
            compiled(inputs()).sum().backward()
            optimizer.step()


def test_copies_merges_and_files_keep_the_adapter(tmp_path):
    model = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 10)).to(DEVICE)
    lf.inject_(model, lf.SingLoRAConfig(r=4, ramp_steps=0))
    x = inputs()
    with torch.no_grad():
        before = model(x)
        assert torch.equal(copy.deepcopy(model)(x), before)
        lf.save_adapter(model, tmp_path)
        lf.merge_(model)
        torch.testing.assert_close(model(x), before)
        lf.unmerge_(model)
        assert torch.equal(model(x), before)
        plain = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 10)).to(DEVICE)
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith(("weight", "bias"))})
        lf.load_adapter(plain, tmp_path)
        torch.testing.assert_close(plain(x), before)


@pytest.mark.parametrize(
    "name, value",
    [("r", 0), ("alpha", 0), ("ramp_steps", -1), ("ramp_steps", 1.5), ("dropout", 2.0)],
    ids=str,
)
def test_layer_refuses_bad_settings(name, value):
    with pytest.raises(lf.ArgumentError, match=rf"^{name}: expected .+, got "):
        layer_of(**{name: value})
    with pytest.raises(lf.ArgumentError, match=rf"^{name}: expected .+, got "):
        lf.SingLoRAConfig(**{name: value})
