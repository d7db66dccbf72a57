"""LoRAAdamW's ``rounding`` and ``state_dtype``: on what the noise depends, what a state in float32 keeps, and what
happens to parameters without a pair. tests/methods/test_rounding.py holds the steps of the methods to float64."""

import copy
import pickle
import warnings

import expert_models
import pytest
import roundings
import torch
from adapter_pairs import bits, pairs, same, set_gradients, train
from torch import nn

import lora_fast as lf
from lora_fast import methods as M

BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
ALONE = {  # methods that treat each pair by itself, and κ given
    "plain": [],
    "scale-reg": [M.ScaleReg()],
    "pilora": [M.PiLoRA()],
    "balora": [M.BaLoRA()],
    "scalora": [M.ScaLoRA(kappa=30.0, interval=2)],
    "lora-muon": [M.LoRAMuon()],
    "ref-lora": [M.RefLoRA()],
}
every_method_alone = pytest.mark.parametrize("methods", ALONE.values(), ids=ALONE.keys())
SETTINGS = {"lr": 1e-2, "rounding": "stochastic"}


def step(optimizer, chosen, seed, resting=()):
    """Runs a step with the gradients of this seed, which each pair draws by itself."""
    for i, pair in enumerate(chosen):
        set_gradients([pair], 1000 * i + seed)
        if i in resting:
            pair[0].grad = pair[1].grad = None
    optimizer.step()


@BOTH
@every_method_alone
def test_noise_does_not_depend_on_other_pairs(methods, dtype):
    """Another pair of the same shape and one of another are added, or rest."""
    few, many, resting = pairs(dtype=dtype)[:2], pairs(dtype=dtype), pairs(dtype=dtype)
    optimizers = [lf.optim.LoRAAdamW(chosen, methods=methods, **SETTINGS) for chosen in (few, many, resting)]
    for seed in range(4):
        step(optimizers[0], few, seed)
        step(optimizers[1], many, seed)
        step(optimizers[2], resting, seed, resting=() if seed == 0 else (2, 3))
    assert same(bits(few), bits(many[:2])) and same(bits(few), bits(resting[:2]))


@BOTH
@every_method_alone
def test_noise_of_a_pair_counts_its_own_steps(methods, dtype):
    """A pair that rests in between continues as if there had been no step."""
    straight, interrupted = pairs(dtype=dtype)[:2], pairs(dtype=dtype)[:2]
    optimizers = [lf.optim.LoRAAdamW(chosen, methods=methods, **SETTINGS) for chosen in (straight, interrupted)]
    for seed in range(3):
        step(optimizers[0], straight, seed)
        step(optimizers[1], interrupted, seed)
        if seed == 1:
            step(optimizers[1], interrupted, 99, resting=(1,))
    assert same(bits(straight[1:]), bits(interrupted[1:]))
    assert not same(bits(straight[:1]), bits(interrupted[:1]))


def model_of(order, dtype):
    """Returns a model whose layers are registered in this order, with values that depend on their names."""
    model = nn.ModuleDict({name: nn.Linear(12, 10 + 2 * (name == "c"), bias=False) for name in order})
    lf.inject_(model.to(dtype), lf.LoRAConfig(r=4, alpha=8))
    for name, layer in model.items():
        generator = torch.Generator().manual_seed(ord(name))
        for p in (layer.lora_A, layer.lora_B):
            p.data = (torch.randn(p.shape, generator=generator) / 4).to(dtype)
    return model


@BOTH
@pytest.mark.parametrize("methods", [[], [M.ILoRA(lam=1.0)], [M.BaLoRA()]], ids=["plain", "ilora", "balora"])
def test_noise_follows_names_and_not_the_order_of_layers(methods, dtype):
    ends = []
    for order in ("abc", "cba"):
        model = model_of(order, dtype)
        optimizer = lf.optim.LoRAAdamW(model, methods=methods, **SETTINGS)
        for seed in range(3):
            for name, layer in model.items():
                generator = torch.Generator().manual_seed(100 * ord(name) + seed)
                for p in (layer.lora_A, layer.lora_B):
                    p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        ends.append([p.detach() for name in "abc" for p in (model[name].lora_A, model[name].lora_B)])
    assert same(*ends)


def decay_alone(chosen, methods, steps=3):
    """Runs steps with zero gradients: p ← p (1 − 2⁻¹⁰), which float32 computes alike on every backend, then rounded."""
    optimizer = lf.optim.LoRAAdamW(chosen, lr=2.0**-10, weight_decay=1.0, methods=methods, rounding="stochastic")
    for _ in range(steps):
        for a, b, *_ in chosen:
            a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        optimizer.step()


DECAYS = {"flat": [], "rows": [M.ILoRA(lam=0.0)], "matrices": [M.ScaledAdamW()], "muon": [M.LoRAMuon()]}
DECAYS["added"] = [M.ScaleReg(lam=0.0)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECAYS)
def test_noise_is_the_same_on_both_backends(name):
    methods, dtype = DECAYS[name], (torch.bfloat16, torch.float16)[list(DECAYS).index(name) % 2]
    shapes = [(12, 20, 4), (9, 7, 3), (20, 12, 4)]
    torchs, ours, start = (pairs(dtype=dtype, shapes=shapes) for _ in range(3))
    decay_alone(torchs, methods, steps=2)
    with lf.set_backend("triton"):
        decay_alone(ours, methods, steps=2)
    assert same(bits(torchs), bits(ours)) and not same(bits(torchs), bits(start))


@pytest.mark.gpu
@pytest.mark.parametrize("methods", [[], [M.ILoRA(lam=0.0)]], ids=["plain", "ilora"])
def test_noise_of_experts_is_the_same_on_both_backends(methods):
    ends = []
    for backend in ("torch", "triton"):
        model, _ = expert_models.experts_model(dtype=torch.bfloat16)
        with lf.set_backend(backend):
            settings = {"lr": 2.0**-10, "weight_decay": 1.0, "rounding": "stochastic", "methods": methods}
            optimizer = lf.optim.LoRAAdamW(model, **settings)
            for _ in range(2):
                for p in model.parameters():
                    p.grad = torch.zeros_like(p) if p.requires_grad else None
                optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert same(*ends)


@BOTH
@pytest.mark.parametrize("methods", [[], [M.LoRAPlus(4.0)]], ids=["plain", "lora+"])
def test_auto_without_a_pairing_method_rounds_to_nearest(methods, dtype):
    ends = []
    for rounding in ("auto", "nearest"):
        chosen = pairs(dtype=dtype)
        train(optimizer := lf.optim.LoRAAdamW(chosen, methods=methods, rounding=rounding), chosen, 3)
        ends.append(bits(chosen, optimizer))
    assert same(*ends)


@BOTH
def test_auto_with_a_pairing_method_rounds_its_factors_stochastically(dtype):
    ends = {}
    for rounding in ("auto", "stochastic", "nearest"):
        chosen, other = pairs(dtype=dtype), nn.Parameter(torch.linspace(-1, 1, 33).to(dtype))
        optimizer = lf.optim.LoRAAdamW(chosen, methods=[M.ILoRA()], rounding=rounding)
        optimizer.add_param_group({"params": [("head", other)]})
        other.grad = torch.ones_like(other)
        train(optimizer, chosen, 3)
        ends[rounding] = bits(chosen), other.detach()
    assert same(ends["auto"][0], ends["stochastic"][0]) and not same(ends["auto"][0], ends["nearest"][0])
    assert torch.equal(ends["auto"][1], ends["nearest"][1]) and not torch.equal(ends["auto"][1], ends["stochastic"][1])


@BOTH
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(33,), (3, 5, 7), ()], ids=str)
def test_unpaired_parameters_are_rounded_by_the_numbers_of_their_names(shape, state_dtype, dtype):
    generator = torch.Generator().manual_seed(0)
    head = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = lf.optim.LoRAAdamW(
        pairs(dtype=dtype), lr=2.0**-10, weight_decay=1.0, rounding="stochastic", state_dtype=state_dtype
    )
    optimizer.add_param_group({"params": [("model.head", head)]})
    for number in (1, 2, 3):
        exact = head.detach().double() * (1 - 2.0**-10)
        head.grad = torch.zeros_like(head)
        optimizer.step()
        numbers = roundings.factor_noise("model.head", head.shape, number, flat=True)
        exact = exact.float().double()  # AdamW multiplies in float32
        assert torch.equal(head.detach().double(), roundings.to_neighbour(exact, dtype, numbers))
    assert optimizer.state[head]["exp_avg"].dtype == (state_dtype or dtype)


@BOTH
@pytest.mark.parametrize("methods", [[], [M.ILoRA()]], ids=["plain", "ilora"])
def test_stochastic_rounding_keeps_small_steps_on_average(methods, dtype):
    """A hundred steps of a hundredth of a unit: to nearest nothing moves."""
    unit = torch.finfo(dtype).eps
    moved = {}
    for rounding in ("nearest", "stochastic"):
        a, b = nn.Parameter(torch.full((4, 500), 1.25, dtype=dtype)), nn.Parameter(torch.zeros(8, 4, dtype=dtype))
        settings = {"lr": unit / 100, "eps": 1e-30, "rounding": rounding, "state_dtype": torch.float32}
        optimizer = lf.optim.LoRAAdamW([(a, b)], methods=[M.ILoRA(lam=0.0)] if methods else [], **settings)
        for _ in range(100):
            a.grad, b.grad = torch.ones_like(a), torch.zeros_like(b)
            optimizer.step()
        moved[rounding] = ((1.25 - a.detach().double()).mean() / unit).item()
    assert moved["nearest"] == 0
    # Each of 2,000 entries moves by a binomial number of units with the mean 1 and the standard deviation 1.
    assert abs(moved["stochastic"] - 1) < 5 / 2000**0.5


@pytest.mark.parametrize("dtype, methods", [(torch.bfloat16, []), (torch.float16, []), (torch.bfloat16, [M.ILoRA()])])
def test_second_moments_in_float32_follow_smaller_gradients(dtype, methods):
    """After a tenfold drop of the gradients the second moment falls as in float64. In 16 bits it stalls, as torch's
    does, because β₂ v is rounded back to v."""
    chosen = pairs(dtype=dtype)[:1]
    parameters = chosen[0][:2]
    optimizer = lf.optim.LoRAAdamW(chosen, lr=0.0, methods=methods, state_dtype=torch.float32)
    narrow = torch.optim.AdamW([p for pair in pairs(dtype=dtype)[:1] for p in pair[:2]], lr=0.0, fused=True)
    exact = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    generator = torch.Generator().manual_seed(0)
    for i in range(500):
        for v, p, q in zip(exact, parameters, narrow.param_groups[0]["params"], strict=True):
            p.grad = ((1 + torch.rand(p.shape, generator=generator)) * (0.3 if i < 100 else 0.03)).to(dtype)
            q.grad = p.grad
            v.mul_(0.999).add_(0.001 * p.grad.double() ** 2)
        optimizer.step()
        narrow.step()
    for p, q, v in zip(parameters, narrow.param_groups[0]["params"], exact, strict=True):
        got = optimizer.state[p]["exp_avg_sq"]
        assert got.dtype == torch.float32 and ((got - v) / v).abs().max() < 1e-3
        assert dtype != torch.bfloat16 or (narrow.state[q]["exp_avg_sq"] / v).min() > 1.3


def test_state_in_16_bits_is_torchs():
    """float16's second moments underflow at small gradients, as in torch."""
    ours, theirs = pairs(dtype=torch.float16), pairs(dtype=torch.float16)
    optimizer = lf.optim.LoRAAdamW(ours, lr=1e-2)
    reference = torch.optim.AdamW([p for pair in theirs for p in pair[:2]], lr=1e-2, weight_decay=0.0, fused=True)
    for seed in range(3):
        for chosen in (ours, theirs):
            set_gradients(chosen, seed, scale=1e-5)
        optimizer.step(), reference.step()
    assert same(bits(ours), bits(theirs))
    assert any((optimizer.state[p]["exp_avg_sq"] == 0).any() for pair in ours for p in pair[:2])


@pytest.mark.parametrize("rounding", ["up", None, True, "compensated"])
def test_unknown_rounding_is_refused(rounding):
    with pytest.raises(lf.ArgumentError, match=r"^rounding: expected one of auto, nearest, stochastic"):
        lf.optim.LoRAAdamW(pairs(), rounding=rounding)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float64, torch.int32, "float32", 32])
def test_unknown_state_dtype_is_refused(state_dtype):
    with pytest.raises(lf.ArgumentError, match=r"^state_dtype: expected None or torch\.float32"):
        lf.optim.LoRAAdamW(pairs(), state_dtype=state_dtype)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("methods", [[], [M.BaLoRA()]], ids=["plain", "balora"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_copies_of_the_optimizer_keep_rounding_and_state_dtype(rounding, methods, copied):
    chosen = pairs(dtype=torch.bfloat16)
    settings = {"lr": 1e-2, "rounding": rounding, "state_dtype": torch.float32}
    train(optimizer := lf.optim.LoRAAdamW(chosen, methods=methods, **settings), chosen, 2)
    twin, pairs_of_twin = copied((optimizer, chosen))
    train(optimizer, chosen, 3, first=2)
    train(twin, pairs_of_twin, 3, first=2)
    assert same(bits(chosen, optimizer), bits(pairs_of_twin, twin))
    assert twin.state[pairs_of_twin[0][0]]["exp_avg"].dtype == torch.float32


def test_float16_second_moments_are_warned_of_once_and_only_where_they_are():
    def pair(dtype):
        a, b = nn.Parameter(torch.randn(2, 4).to(dtype)), nn.Parameter(torch.randn(4, 2).to(dtype))
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        return a, b

    def warned(optimizer):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(), optimizer.step()
        return len([w for w in caught if "float16" in str(w.message)])

    half, head = pair(torch.float16), nn.Parameter(torch.randn(3).half())
    head.grad = torch.randn_like(head)
    assert warned(lf.optim.LoRAAdamW([half])) == warned(lf.optim.LoRAAdamW([half], methods=[M.ILoRA()])) == 1
    assert warned(lf.optim.LoRAAdamW([pair(torch.bfloat16)])) == 0
    assert warned(lf.optim.LoRAAdamW([half], state_dtype=torch.float32)) == 0
    muon = lf.optim.LoRAAdamW([half], methods=[M.LoRAMuon()])
    assert warned(muon) == 0
    muon.add_param_group({"params": [head]})
    assert warned(muon) == 1
