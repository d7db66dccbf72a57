"""NBLoRALinear and models of such layers: the bound, gradients, one transform for all layers, and its cache."""

import copy
import io
import re
import threading
import time
import warnings
import weakref

import pytest
import torch
from budget import check, error
from exact_cayley import KINDS, exact_cayley, extreme_parameters
from nb_lora_models import NORMS, layers_of, scatter
from tiny import COPIES, assert_unchanged, batch, llama, loss_of, snapshot
from together import run_together
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fast as lf
from lora_fast.layers import factor_cache, nb_lora
from lora_fast.ops import cayley as cayley_op

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = torch.finfo(torch.float32).eps


def layer_of(norm="nuclear", dtype=torch.float32, **settings) -> lf.NBLoRALinear:
    torch.manual_seed(0)
    defaults = {"r": 4, "norm": norm, "bound": 1.5, "dtype": dtype, "device": DEVICE}
    return scatter(lf.NBLoRALinear(10, 12, **defaults | settings))


def stack_of(**settings) -> nn.Module:
    """Linear layers of several shapes with an activation between, each in a block of its own."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in [(10, 14), (14, 6), (6, 10)]]
    model = nn.Sequential(*blocks).to(DEVICE)
    lf.inject_(model, lf.NBLoRAConfig(**{"r": 4, "bound": 1.5} | settings))
    return scatter(model)


def trained(model) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, run=None, x=None) -> list[torch.Tensor]:
    model.zero_grad()
    x = inputs() if x is None else x
    (model if run is None else run)(x).pow(2).sum().backward()
    return [p.grad for p in trained(model)]


def inputs() -> torch.Tensor:
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(3)).to(DEVICE).requires_grad_()


def alone(model) -> nn.Module:
    """A copy in which every layer computes its own factors."""
    model = copy.deepcopy(model)
    model._forward_pre_hooks.clear()
    model._forward_hooks.clear()
    return model


def assert_equal(these, those) -> None:
    assert len(these) == len(those) and all(torch.equal(x, y) for x, y in zip(these, those, strict=True))


def assert_close(these, those) -> None:
    """Allows for another order of summation: one product for many layers, or several."""
    for x, y in zip(these, those, strict=True):
        assert (x - y).norm() <= 16 * EPS * y.norm()


@pytest.fixture
def transforms(monkeypatch) -> list[int]:
    """A list that gets the number of pairs of each call of the transform."""
    calls, compute = [], cayley_op.compute
    monkeypatch.setattr(cayley_op, "compute", lambda free: calls.append(len(free.a)) or compute(free))
    return calls


# ── the layer ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("learn_scale", [True, False], ids=["learnt", "fixed"])
@pytest.mark.parametrize("norm", NORMS)
def test_layer_passes_gradcheck(norm, learn_scale):
    layer = layer_of(norm, torch.float64, learn_scale=learn_scale)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert names == ["free_a", "free_b"] + ["free_scale"] * (learn_scale and norm != "spectral")
    x = inputs().detach().double().requires_grad_()

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    with lf.set_backend("torch"):
        assert torch.autograd.gradcheck(call, (x, *trained(layer)))


@pytest.mark.parametrize("norm", NORMS)
def test_layer_is_the_formula(norm):
    """y = x Wᵀ + bias + 2 ((x aᵀ)∘sv) bᵀ, with the norm of sv equal to the bound."""
    layer, x = layer_of(norm), inputs()
    power = {"spectral": 0.0, "frobenius": 0.5, "nuclear": 1.0}[norm]
    sv = 1.5 * torch.softmax(layer.free_scale / 2, 0) ** power
    a, b = lf.functional.cayley(layer.free_a, layer.free_b)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + 2 * (x @ a.T * sv) @ b.T)
    size = {"spectral": sv.max(), "frobenius": sv.norm(), "nuclear": sv.sum()}[norm]
    torch.testing.assert_close(size, torch.tensor(1.5, device=DEVICE))


@pytest.mark.parametrize("norm, bound", [("spectral", 1.0), ("frobenius", 2.0), ("nuclear", 4.0)])
def test_default_bound_makes_every_singular_value_one(norm, bound):
    layer = lf.NBLoRALinear(10, 12, r=4, norm=norm)
    assert layer.bound == bound
    _, scale = cayley_op.compute(
        cayley_op.Free([layer.free_a], [layer.free_b], [layer.free_scale], [bound], [layer.power])
    )[2:]
    torch.testing.assert_close(scale[0], torch.full((4,), 2.0))


@pytest.mark.parametrize("norm, order", [("spectral", 2), ("frobenius", "fro"), ("nuclear", "nuc")])
def test_bound_ratio_multiplies_the_weight_s_norm(norm, order):
    linear = nn.Linear(10, 12)
    layer = lf.NBLoRALinear.from_linear(linear, r=4, norm=norm, bound_ratio=0.25)
    assert layer.bound == pytest.approx(0.25 * torch.linalg.matrix_norm(linear.weight.double(), order).item(), rel=1e-9)


def test_layer_starts_as_its_linear():
    linear = nn.Linear(10, 12, device=DEVICE)
    layer = lf.NBLoRALinear.from_linear(linear, r=4, dropout=0.5)
    x = inputs()
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.weight.requires_grad


@pytest.mark.parametrize("dtype, adapter", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_adapter_is_float32_over_16_bit_weights(dtype, adapter):
    layer = lf.NBLoRALinear.from_linear(nn.Linear(10, 12, dtype=dtype), r=2)
    assert {getattr(layer, name).dtype for name in layer.TRAINABLE} == {adapter} and layer.weight.dtype == dtype
    assert layer(torch.randn(3, 10).to(dtype)).dtype == dtype
    layer.to(torch.bfloat16)(torch.randn(3, 10).bfloat16()).sum().backward()
    assert {getattr(layer, name).grad.dtype for name in layer.TRAINABLE} == {torch.bfloat16}


@pytest.mark.parametrize("r, d_in, d_out", [(10, 10, 12), (8, 10, 3), (1, 1, 1)], ids=["r = d_in", "r > d_out", "1×1"])
def test_layer_takes_the_extreme_ranks(r, d_in, d_out):
    layer = scatter(lf.NBLoRALinear(d_in, d_out, r=r, bound=1.5, dtype=torch.float64))
    x = torch.randn(3, d_in, dtype=torch.float64)
    a, b = layer.plain_factors()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight + b @ a, layer.bias))
    assert torch.linalg.matrix_norm(b @ a, "nuc") <= 1.5
    layer(x).sum().backward()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("name", ["free_a", "free_b", "free_scale"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_parameter_gives_nan_outputs(backend, name):
    layer = layer_of()
    with torch.no_grad():
        getattr(layer, name).flatten()[-1] = float("nan")
    with lf.set_backend(backend):
        assert layer(inputs()).isnan().all()


def papers_formula(layer, x) -> torch.Tensor:
    """The paper's layer under autograd: y = x Wᵀ + bias + 2 ((x aᵀ)∘sv) bᵀ."""
    a1, a2 = layer.free_a.split([layer.r, layer.in_features - layer.r], 1)
    eye = torch.eye(layer.r, dtype=x.dtype, device=x.device)
    inverse = torch.linalg.inv(eye + a1.T - a1 + a2 @ a2.T + layer.free_b.T @ layer.free_b)
    a, b = torch.cat([2 * inverse.T - eye, -2 * inverse.T @ a2], 1), -2 * layer.free_b @ inverse
    sv = layer.bound * torch.softmax(layer.free_scale / layer.r**0.5, 0) ** layer.power
    return nn.functional.linear(x, layer.weight, layer.bias) + 2 * (x @ a.T * sv) @ b.T


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "r, d_in, d_out", [(4, 10, 12), (9, 9, 20), (7, 13, 3)], ids=["plain", "r = d_in", "r > d_out"]
)
def test_layer_is_within_the_error_budget(r, d_in, d_out, norm, backend):
    """Output and all gradients against the paper's formula in float64; eager is that formula in float32."""
    layer = scatter(lf.NBLoRALinear(d_in, d_out, r=r, norm=norm, bound=1.5, device=DEVICE))
    draw = lambda *size: torch.randn(*size, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    x, dy = draw(5, d_in), draw(5, d_out)

    def run(layer, call, dtype):
        at = x.to(dtype).requires_grad_()
        y = call(layer, at)
        names = [name for name, p in layer.named_parameters() if p.requires_grad]
        return ["y", "dx", *names], [y, *torch.autograd.grad(y, (at, *trained(layer)), dy.to(dtype))]

    with lf.set_backend(backend):
        names, got = run(layer, lambda layer, x: layer(x), torch.float32)
    eager, exact = (
        run(copy.deepcopy(layer).to(dtype), papers_formula, dtype)[1] for dtype in (torch.float32, torch.float64)
    )
    for name, ours, theirs, true in zip(names, got, eager, exact, strict=True):
        check(name, ours, true, error(theirs, true), torch.float32)


# ── the bound ────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_bounded(*layers) -> None:
    """Asserts that the singular values of the last forward's ΔW are at most sv, both sorted, and that its norm is at
    most the bound, within 12 r ε (a aᵀ + bᵀb = I). The layers have one shape and norm."""
    a, b, _, scale = (
        torch.stack(parts).double() for parts in zip(*(layer.cache.values for layer in layers), strict=True)
    )
    (r, norm, bound), room = (getattr(layers[0], name) for name in ("r", "norm", "bound")), 12 * layers[0].r * EPS
    singular = torch.linalg.svdvals(b @ a)[:, :r]
    largest = scale.sort(descending=True).values / 2
    assert (singular <= largest + room * largest[:, :1]).all()
    size = {"spectral": singular.amax(1), "frobenius": singular.norm(dim=1), "nuclear": singular.sum(1)}[norm]
    assert (size <= bound * (1 + room)).all()


class SideBySide(nn.ModuleList):
    def forward(self, x):
        return torch.stack([layer(x) for layer in self])


@pytest.mark.parametrize("norm", NORMS)
def test_training_never_exceeds_the_bound(norm):
    """Trains for 250 steps towards a target far outside the bound, at learning rates from 4e-3 to 40. The bound is
    checked at each of the first 50 steps, in which the largest rates reach it, and at every third one after them."""
    rates = (4e-3, 0.4, 4.0, 40.0)
    layers = SideBySide(layer_of(norm) for _ in rates)
    nb_lora.share_factors_(layers)
    groups = [{"params": trained(layer), "lr": lr} for layer, lr in zip(layers, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, fused=True)
    x, target = inputs().detach(), 100 * torch.randn(5, 12, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    for i in range(250):
        (layers(x) - target).pow(2).mean((1, 2)).sum().backward()
        if i < 50 or i % 3 == 0:
            assert_bounded(*layers)
        optimizer.step()
        optimizer.zero_grad()
    layers(x)
    assert_bounded(*layers)
    used = [lf.metrics.bound_stats(layers)[str(i)].used for i in range(len(rates))]
    assert max(used) > 0.99  # without the bound, ΔW would have grown further


SIZES = {"spectral": lambda s: s[0], "frobenius": lambda s: s.norm(), "nuclear": lambda s: s.sum()}


def applied(layer, dtype=torch.float32) -> torch.Tensor:
    """Returns ΔW as the layer applies it: its output for the identity, with a zero weight."""
    with torch.no_grad():
        layer.weight.zero_()
        return layer(torch.eye(layer.in_features, dtype=dtype, device=DEVICE)).double()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("size", [10.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_bound_holds_for_large_parameters(kind, size, backend):
    for r, d_in, d_out in [(1, 24, 16), (4, 64, 48), (20, 64, 48)]:
        layer = lf.NBLoRALinear(d_in, d_out, r=r, norm="spectral", bound=1.0, bias=False, device=DEVICE)
        free = extreme_parameters(kind, size, r, d_in, d_out)
        with torch.no_grad():
            layer.free_a.copy_(free[0]), layer.free_b.copy_(free[1])
        with lf.set_backend(backend):
            got = applied(layer)
        a, b, _ = exact_cayley(*(x.double().to(DEVICE) for x in free))
        assert torch.linalg.matrix_norm(got, 2) <= 1 + 1e-5
        assert torch.linalg.matrix_norm(got - 2 * (b @ a).T, 2) <= 1e-3


def at_its_bound(norm, d_in, d_out, r, first_share=None) -> lf.NBLoRALinear:
    """Returns a layer whose exact ΔW has the norm of its bound, 0.5. Of the bound the first singular value has this
    share; all have equal ones where it is None."""
    layer = lf.NBLoRALinear(d_in, d_out, r=r, norm=norm, bound=0.5, bias=False, device=DEVICE)
    shares = torch.full((r,), 1 / r, dtype=torch.float64)
    if first_share is not None:
        shares[0], shares[1:] = first_share, (1 - first_share) / (r - 1)
    orthogonal = lambda d: torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(d)).double())[0]
    sigma = 0.5 * (1 - 1e-7) * shares ** nb_lora.NORMS[norm]
    layer.load_free_(*layer.free_parameters_for(orthogonal(d_in).T, orthogonal(d_out) * sigma))
    return layer


def share_under_autocast(layer, dtype) -> float:
    """Returns the share of its bound that the layer uses under autocast."""
    with torch.autocast(DEVICE.type, dtype):
        return layer.applied_bound / layer.bound


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast bfloat16", "autocast float16", "16-bit weight"])
@pytest.mark.parametrize("norm", NORMS)
def test_bound_holds_as_applied_in_16_bits(norm, kind):
    """Of the bound at most two per cent (bfloat16) are left free, for the nuclear norm of these sizes three."""
    autocast, dtype = "autocast" in kind, getattr(torch, kind.split()[-1], torch.bfloat16)
    left = (0.03 if norm == "nuclear" else 0.02) * torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    for d_in, d_out, r, first_share in [
        (192, 128, 8, None),
        (32, 96, 1, None),
        (64, 64, 32, None),
        (256, 80, 8, 0.999),
    ]:
        layer = at_its_bound(norm, d_in, d_out, r, first_share)
        if kind == "16-bit weight":
            layer.weight.data = layer.weight.data.to(dtype)
        elif not autocast:
            layer.to(dtype)
        with torch.autocast(DEVICE.type, dtype, enabled=autocast):
            got = applied(layer, layer.weight.dtype)
        used = SIZES[norm](torch.linalg.svdvals(got)).item() / 0.5
        assert used <= 1 and (used >= 1 - left or kind == "bfloat16"), (
            d_in,
            r,
            used,
        )  # its parameters are rounded, too


@pytest.mark.parametrize("norm", NORMS)
def test_bound_holds_in_16_bits_on_the_kernels(norm):
    for d_in, d_out, r, first in [(64, 48, 8, None), (64, 32, 4, 0.999)]:
        layer = at_its_bound(norm, d_in, d_out, r, first).to(torch.bfloat16)
        with lf.set_backend("triton"):
            got = applied(layer, torch.bfloat16)
        assert SIZES[norm](torch.linalg.svdvals(got)) <= 0.5


def test_factors_of_another_dtype_are_not_taken_from_the_cache(transforms):
    """Of evaluations in turns with and without autocast, by the model's hook and by a layer itself."""
    model, x = stack_of(), inputs().detach()
    layer = layers_of(model)[0]
    with torch.no_grad():
        wide = model(x), layer.factors()[1].clone()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            model(x)
            narrow = layer.factors()[1].clone()
        assert torch.equal(model(x), wide[0]) and torch.equal(layer.factors()[1], wide[1])
    torch.testing.assert_close(narrow, wide[1] * share_under_autocast(layer, torch.bfloat16))
    assert transforms == [3, 3, 3]


def test_autocast_within_a_models_forward_applies_the_bound(transforms):
    """As accelerate does: the hook runs before, so its factors are those for float32. They are not computed again."""
    model, x = stack_of(), inputs().detach()
    forward = model.forward

    def under_autocast(x):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return forward(x)

    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = gradients(model, x=x)
        y = model(x)
    model.forward = under_autocast
    transforms.clear()
    assert_close(gradients(model, x=x), expected)
    torch.testing.assert_close(model(x), y)
    assert transforms == [3, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_merging_warns_by_how_much_rounding_exceeds_the_bound(norm, dtype):
    layer = at_its_bound(norm, 96, 64, 4)
    torch.manual_seed(0)
    layer.weight.data = torch.randn(64, 96, device=DEVICE).to(dtype)
    before = layer.weight.double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.merge()
    if dtype is torch.float32:
        assert not caught and not layer.merge_note()
        return
    words = rf"rounding to the {str(dtype)[6:]} weight adds up to about (\S+) times the bound, 0.5, to the {norm} norm"
    (message,) = (re.search(words, str(warning.message)) for warning in caught)
    a, b = (x.double() for x in layer.plain_factors())
    errors = torch.linalg.svdvals(layer.weight.double() - before - b @ a)
    assert 0.7 * float(message[1]) <= SIZES[norm](errors).item() / 0.5 <= 1.1 * float(message[1])


# ── one transform for a model ────────────────────────────────────────────────────────────────────────────────────────


def test_model_forward_runs_one_transform(transforms):
    model = stack_of()
    expected = gradients(alone(model))
    transforms.clear()
    got = gradients(model)
    assert transforms == [3]
    assert_close(got, expected)
    assert all(layer.shared is None for layer in layers_of(model))


def test_model_forward_makes_one_autograd_node():
    model = stack_of()
    nodes = set()
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda layer, args: nodes.add(layer.shared.factors[0].grad_fn))
    model(inputs())
    assert len(nodes) == 1


def test_cache_is_valid_while_nothing_changes(transforms):
    model = stack_of()
    with torch.no_grad():
        first = model(inputs())
        assert torch.equal(model(inputs()), first) and transforms == [3]
        layers_of(model)[1].free_b.add_(1)
        changed = model(inputs())
        assert not torch.equal(changed, first) and transforms == [3, 1]
    with torch.inference_mode():
        assert torch.equal(model(inputs()), changed) and transforms == [3, 1]


CHANGES = {
    "in place": lambda layer: layer.free_a.mul_(2),
    "scale": lambda layer: layer.free_scale.add_(torch.arange(4.0, device=DEVICE)),
    "new memory": lambda layer: setattr(layer.free_a, "data", layer.free_a.data * 2),
    "new parameter": lambda layer: setattr(layer, "free_a", nn.Parameter(layer.free_a * 2)),
    "bound": lambda layer: setattr(layer, "bound", 3.0),
    "load_state_dict": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "behind the counter, then eval()": lambda layer: (layer.free_a.data.mul_(2), layer.eval()),
}


if DEVICE.type == "cpu":  # elsewhere the values are not compared, as that would wait for the device
    CHANGES |= {
        "behind the counter (EMA)": lambda layer: layer.free_a.data.mul_(2),
        "swapped values": lambda layer: layer.free_b.data.copy_(layer.free_b.data.flip(0)),
    }


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_cache_is_invalid_after_a_change(change):
    model = stack_of()
    before = model(inputs())
    CHANGES[change](layers_of(model)[0])
    after = model(inputs())
    assert not torch.equal(after, before)
    assert torch.equal(after, alone(model)(inputs()))


def test_cache_is_invalid_after_an_optimizer_without_counters():
    """An optimizer of another library may write through raw pointers; an evaluation after its step must see that."""
    model = stack_of()
    with torch.no_grad():
        model(inputs())
    gradients(model)
    for p in trained(model):
        p.data.sub_(p.grad)
    with torch.no_grad():
        assert torch.equal(model(inputs()), alone(model)(inputs()))


def test_gradient_accumulation_is_the_sum():
    model = stack_of()
    halves = inputs().detach().split([2, 3])
    expected = [
        sum(pair) for pair in zip(*([g.clone() for g in gradients(model, x=half)] for half in halves), strict=True)
    ]
    model.zero_grad()
    for half in halves:
        model(half).pow(2).sum().backward()
    assert_equal([p.grad for p in trained(model)], expected)


def test_two_forwards_before_one_backward_are_independent():
    model = stack_of()
    expected = [2 * g for g in gradients(model)]
    assert_close(gradients(model, lambda x: torch.cat([model(x), model(x)])), expected)


def test_backward_frees_the_graph():
    model = stack_of()
    nodes = []
    layer = layers_of(model)[0]
    layer.register_forward_pre_hook(lambda layer, args: nodes.append(weakref.ref(layer.shared.factors[0].grad_fn)))
    gradients(model)
    assert nodes[0]() is None
    assert all(x.grad_fn is None for layer in layers_of(model) for x in layer.cache.values)


def test_failed_forward_leaves_no_shared_factors(transforms):
    model = stack_of()
    with pytest.raises(lf.ArgumentError):
        model(torch.zeros(5, 9, device=DEVICE))
    assert all(layer.shared is None for layer in layers_of(model))
    gradients(model)
    assert transforms == [3, 3]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("region", ["blocks", "model"])
@pytest.mark.parametrize("hooked", [True, False], ids=["together", "alone"])
def test_activation_checkpointing_changes_no_bit(hooked, region, reentrant, transforms):
    model = stack_of()
    if not hooked:
        model = alone(model)
    expected = gradients(model)
    transforms.clear()
    if region == "model":
        got = gradients(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    else:
        plain = [type(block).forward.__get__(block) for block in model]
        for block, forward in zip(model, plain, strict=True):
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=reentrant)
        got = gradients(model)
        assert not hooked or transforms == [3]  # the second run takes the values of the first
    assert_close(got, expected) if hooked else assert_equal(got, expected)


def test_activation_checkpointing_works_in_transformers(transforms):
    ids, model = batch().to(DEVICE), llama().to(DEVICE)
    lf.inject_(model, lf.NBLoRAConfig(r=4))
    scatter(model).train()
    loss_of(model, ids).backward()
    expected = [p.grad for p in trained(model)]
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        model.zero_grad()
        model.gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
        loss_of(model, ids).backward()
        assert_close([p.grad for p in trained(model)], expected)
    assert transforms == [14] * 3


def test_generation_computes_the_factors_once(transforms):
    model = llama().to(DEVICE).eval()
    lf.inject_(model, lf.NBLoRAConfig(r=4))
    scatter(model)
    model.generate(batch().to(DEVICE), max_new_tokens=4, do_sample=False, use_cache=True)
    assert transforms == [14]


def test_submodule_called_by_itself_computes_its_factors(transforms):
    model = stack_of()
    whole = gradients(model)[3:6]
    hidden = model[0](inputs()).detach()
    transforms.clear()
    model.zero_grad()
    model[2](model[1](hidden)).pow(2).sum().backward()
    assert transforms == [1, 1]
    assert_close([p.grad for p in trained(model[1])], whole)
    model[1](hidden).sum().backward()  # a second backward works, because each call has its own graph


def test_frozen_layers_get_no_gradient():
    model = stack_of()
    expected = gradients(model)
    first, second, third = layers_of(model)
    for p in first.parameters():
        p.requires_grad_(False)
    second.free_a.requires_grad_(False)
    third.free_scale.requires_grad_(False)
    got = gradients(model)
    assert_close(got, [expected[4], expected[5], expected[6], expected[7]])
    assert first.cache.values[0].grad_fn is None and all(p.grad is None for p in first.parameters())


def test_cache_is_valid_while_all_layers_are_frozen(transforms):
    model = stack_of()
    for p in model.parameters():
        p.requires_grad_(False)
    for _ in range(2):
        x = inputs()
        model(x).sum().backward()
        assert x.grad is not None
    assert transforms == [3]


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
def test_model_compiles_as_one_graph(whole):
    model = stack_of() if whole else layer_of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_close(gradients(model, compiled), gradients(model))
    with torch.no_grad():
        assert torch.equal(compiled(inputs()), model(inputs()))
        scatter(model, seed=2)
        assert torch.equal(compiled(inputs()), model(inputs()))


def test_compiled_blocks_run_in_an_eager_model():
    model = stack_of()
    expected = gradients(model)
    for block in model:
        block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_close(gradients(model), expected)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_factors_in_float32(autocast):
    """Only the layer's products have the low precision. The scales leave room for it."""
    model = stack_of()
    with torch.no_grad():
        model(inputs())
        expected = [layer.cache.values for layer in layers_of(model)]
        model.train()
        with torch.autocast(DEVICE.type, autocast):
            assert model(inputs()).dtype == autocast
    for layer, (a, b, inverse, scale) in zip(layers_of(model), expected, strict=True):
        assert_equal(layer.cache.values[::2], (a, inverse))
        share = share_under_autocast(layer, autocast)
        torch.testing.assert_close(layer.cache.values[1::2], (b * share, scale * share))


# ── as a torch user expects ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_compute_their_own_factors(copied, transforms):
    model = stack_of()
    gradients(model)
    other = copied(model)
    assert all(layer.cache is None for layer in layers_of(other))
    with torch.no_grad():
        for p in trained(model):
            p.zero_()
    expected = gradients(alone(other))
    transforms.clear()
    assert_close(gradients(other), expected)
    assert transforms == [3]  # the copy's hook computes the copy's layers


def test_saved_files_contain_no_factors():
    model, file = stack_of(), io.BytesIO()
    gradients(model)
    torch.save(model, file)
    before = len(file.getvalue())
    for layer in layers_of(model):
        layer.cache = None
    file = io.BytesIO()
    torch.save(model, file)
    assert before <= len(file.getvalue())


def test_state_dict_has_the_free_parameters():
    layer, other = layer_of(), layer_of(bound=1.5)
    assert list(layer.state_dict()) == ["weight", "bias", "free_a", "free_b", "free_scale"]
    scatter(other, seed=2).load_state_dict(layer.state_dict())
    assert torch.equal(other(inputs()), layer(inputs()))


def test_unmerge_restores_the_merged_weight():
    model = stack_of()
    x, weights = inputs(), [layer.weight.clone() for layer in layers_of(model)]
    with torch.no_grad():
        before = model(x)
        assert len(lf.merge_(model).changed) == 3
        torch.testing.assert_close(model(x), before)
        lf.unmerge_(model)
        assert torch.equal(model(x), before)
    assert_equal([layer.weight for layer in layers_of(model)], weights)


def test_plain_adamw_trains_the_layer():
    model = stack_of()
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 9
    before = [p.detach().clone() for p in trained(model)]
    losses = []
    for _ in range(20):
        loss = model(inputs()).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not any(torch.equal(p, q) for p, q in zip(trained(model), before, strict=True))


@pytest.mark.parametrize("norm, order", [("spectral", 2), ("frobenius", "fro"), ("nuclear", "nuc")])
def test_bound_stats_report_the_used_share(norm, order):
    model = stack_of(norm=norm)
    stats = lf.metrics.bound_stats(model)
    assert len(stats) == 3
    for name, layer in model.named_modules():
        if name in stats:
            a, b = layer.plain_factors()
            value = torch.linalg.matrix_norm(b @ a, order).item()
            assert stats[name] == lf.metrics.BoundStats(norm, 1.5, stats[name].value, stats[name].value / 1.5)
            assert stats[name].value == pytest.approx(value, rel=1e-5) and 0 < stats[name].used <= 1


def test_methods_that_need_factors_are_refused():
    with pytest.raises(lf.ArgumentError, match=r"^methods: expected none for a model without trained LoRA factors"):
        lf.optim.LoRAAdamW(stack_of(), methods=[lf.methods.ILoRA()])


def test_inject_again_joins_the_same_transform(transforms):
    model = llama()
    lf.inject_(model, lf.NBLoRAConfig(r=4, target_modules=["q_proj"]))
    report = lf.inject_(model, lf.NBLoRAConfig(r=2, norm="spectral"))
    assert len(report.changed) == 12 and "already a NBLoRALinear" in report.reasons()
    model(batch())
    assert transforms == [14]


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name, value",
    [("r", 0), ("r", 11), ("r", 257), ("norm", "schatten"), ("bound", 0), ("bound", -1.0), ("bound", float("nan"))]
    + [("learn_scale", 1), ("dropout", 2.0)],
    ids=str,
)
def test_layer_refuses_bad_settings(name, value):
    with pytest.raises(lf.ArgumentError, match=rf"^{name}: expected .+, got "):
        lf.NBLoRALinear(10, 12, **{"r": 4, name: value})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")], ids=str)
def test_bound_ratio_refuses_weights_without_a_norm(value, norm):
    linear = nn.Linear(10, 14)
    nn.init.constant_(linear.weight, value)
    with pytest.raises(lf.ArgumentError, match=r"^bound_ratio: .*finite and above 0, got norm (0|nan|inf)$"):
        lf.NBLoRALinear.from_linear(linear, r=2, norm=norm, bound_ratio=0.1)
    assert linear.weight.requires_grad


def zeroed(model):
    nn.init.zeros_(model[1][0].weight)
    return model


@pytest.mark.parametrize(
    "change, config, message",
    [
        (zeroed, {"bound_ratio": 0.1}, r"^bound_ratio: .*above 0 \(1\.0\), got norm 0"),
        (lambda m: m.to("meta"), {"bound_ratio": 0.1}, r"^bound_ratio: .*data \(0\.0\), got .*meta"),
        (lambda m: m, {"r": 12}, r"^r: .*at most in_features, 10 \(0\.0\), got 12"),
        (lambda m: m, {"target_modules": ["1"]}, r"^target_modules: .*left .*Sequential, not torch.nn.Linear"),
    ],
    ids=["zero weight", "meta weight", "r > d_in", "not linear"],
)
def test_failed_inject_changes_nothing(change, config, message):
    blocks = [nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in [(10, 14), (14, 6)]]
    model = change(nn.Sequential(*blocks))
    before = snapshot(model)
    with pytest.raises(lf.ArgumentError, match=message):
        lf.inject_(model, lf.NBLoRAConfig(**{"r": 2} | config))
    if not next(model.parameters()).is_meta:
        assert_unchanged(model, before)
    assert not model._forward_pre_hooks


def test_threads_compute_the_same_as_alone(monkeypatch):
    """Threads with gradients and without share a model's layers, whose caches they replace, and switch often."""
    model, matches = stack_of(), factor_cache.CachedFactors.matches

    def matches_slowly(cache, layer) -> bool:
        result = matches(cache, layer)
        time.sleep(0)  # lets another thread run
        return result

    monkeypatch.setattr(factor_cache.CachedFactors, "matches", matches_slowly)
    x = inputs().detach()
    with torch.no_grad():
        expected = model(x)
    expected_gradients = torch.autograd.grad(model(x).sum(), trained(model))

    def evaluate() -> None:
        for i in range(60):
            with torch.no_grad():
                assert_close([model(x) if i % 2 else model[0](x)], [expected if i % 2 else first])

    def train() -> None:
        for _ in range(30):
            assert_close(torch.autograd.grad(model(x).sum(), trained(model)), expected_gradients)

    with torch.no_grad():
        first = model[0](x)
    run_together(evaluate, train, evaluate, train)
    assert all(layer.shared is None for layer in layers_of(model))


def test_evaluation_in_another_thread_takes_no_gradient_away():
    """It runs within the forward of a training step, between the transform and the layers."""
    model, x = stack_of(), inputs().detach()
    expected = torch.autograd.grad(model(x).sum(), trained(model))
    evaluating, done = threading.Event(), threading.Event()
    trainer, results = threading.get_ident(), []

    def meet(layer, args) -> None:
        if threading.get_ident() != trainer:
            evaluating.set()
            assert done.wait(10)
        elif not evaluating.is_set():
            worker.start()
            assert evaluating.wait(10)

    def evaluate() -> None:
        with torch.no_grad():
            results.append(model(x))

    layers_of(model)[0].register_forward_pre_hook(meet)
    worker = threading.Thread(target=evaluate)
    y = model(x)
    done.set()
    worker.join()
    assert_close(torch.autograd.grad(y.sum(), trained(model)), expected)
    assert_close(results, [y.detach()])


def test_cached_factors_belong_to_a_stream(monkeypatch):
    """Another stream's values may not have been computed yet."""
    layer, stream = layer_of(), [0]
    monkeypatch.setattr(factor_cache.device, "stream_on", lambda device: stream[0])
    with torch.no_grad():
        first = layer.factors()[0]
        assert layer.factors()[0] is first
        stream[0] = 1
        assert layer.factors()[0] is not first
