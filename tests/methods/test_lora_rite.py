"""LoRA-RITE runs in torch on both backends. iLoRA after it changes its product in second order."""

import copy
from itertools import islice

import proportion
import pytest
import torch
import transcription as T
from adapter_pairs import bits, pairs, same, set_gradients, train
from method_runs import Ours, distance, gradient_stream, layers, run
from torch import nn

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.batches.pairs import Pair

WIDE = [(3, 32, 8), (1, 32, 4), (32, 1, 4), (32, 3, 8), (4, 9, 4), (3, 9, 4), (9, 3, 4), (1, 9, 1), (1, 1, 1)]


@pytest.mark.parametrize("ratio, order", [(1.0, 2), (0.5, 1)], ids=["equal shares", "b half of a"])
def test_ilora_after_lora_rite_moves_the_product_by_its_formula(ratio, order):
    """iLoRA changes b a by exactly −h (1 − ρ) b D a − h² ρ b D² a, with h = lr λ and D = a aᵀ − ρ bᵀb of RITE's
    factors. The change is of second order in h for ρ = 1."""
    lr = 1e-2
    rite = run(Ours, torch.float64, [M.LoRARITE()], steps=1, lr=lr, weight_decay=0.0)
    moved = {}
    for lam in (1e-3, 1e-4):
        both = run(Ours, torch.float64, [M.LoRARITE(), M.ILoRA(lam=lam, rho=ratio)], steps=1, lr=lr, weight_decay=0.0)
        h = lr * lam
        for x, y in zip(rite.layers, both.layers, strict=True):
            d = x.a @ x.a.T - ratio * x.b.T @ x.b
            change = y.b @ y.a - x.b @ x.a
            exact = -h * (1 - ratio) * x.b @ d @ x.a - h * h * ratio * x.b @ d @ d @ x.a
            assert (change - exact).norm() <= 1e-14 * (x.b @ x.a).norm()
            assert (y.a @ y.a.T - ratio * y.b.T @ y.b).norm() < d.norm()
        moved[lam] = max((y.b @ y.a - x.b @ x.a).norm().item() for x, y in zip(rite.layers, both.layers, strict=True))
    assert moved[1e-3] / moved[1e-4] == pytest.approx(10**order, rel=1e-2)


def test_ilora_after_lora_rite_keeps_the_product_of_20_steps():
    """iLoRA changes the split of the product, on which RITE's later steps do not depend. With ρ = 1, the product of 20
    steps changes in second order only, while the imbalance falls."""
    settings = {"steps": 20, "lr": 1e-2, "weight_decay": 0.0}
    plain = run(Ours, torch.float64, [M.LoRARITE()], **settings)
    pulled = run(Ours, torch.float64, [M.LoRARITE(), M.ILoRA(lam=1e-2, rho=1.0)], **settings)
    for x, y in zip(plain.layers, pulled.layers, strict=True):
        imbalance = [(layer.a @ layer.a.T - layer.b.T @ layer.b).norm() for layer in (x, y)]
        assert (y.b @ y.a - x.b @ x.a).norm() <= 1e-4 * (x.b @ x.a).norm() and imbalance[1] < imbalance[0]


@pytest.mark.parametrize("methods", [[M.LoRARITE()], [M.LoRARITE(), M.ILoRA()]], ids=["lora-rite", "lora-rite ilora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lora_rite_is_bitwise_equal_on_both_backends(dtype, methods):
    """Its stacks are plain torch everywhere, so float64 is not refused on the Triton backend."""
    ends = []
    for backend in ("torch", "triton"):
        chosen = pairs(dtype=dtype)
        with lf.set_backend(backend):
            train(lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods), chosen, 3)
        ends.append(bits(chosen))
    assert same(*ends)


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_rank_may_exceed_the_widths(shape):
    """The transcription's QR decompositions have min(r, d) columns. From b = 0, its pseudo-inverses divide by rounding
    errors where the rank exceeds d_in."""
    for zero_b in (False, True) if shape[1] >= shape[2] else (False,):
        start = lambda zero_b=zero_b: layers(torch.float64, shapes=[shape], zero_b=zero_b)
        exact, ours = (kind(start(), [M.LoRARITE()], lr=1e-3, weight_decay=0.1) for kind in (T.Run, Ours))
        for gradients in islice(gradient_stream([shape]), 20):
            exact.step(gradients)
            ours.step(gradients)
        assert distance(ours, exact) <= 1e-8


@pytest.mark.parametrize("kind", proportion.KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_product_moves_in_proportion_where_factors_lack_full_rank(dtype, kind):
    sizes = proportion.SIZES if dtype != torch.bfloat16 else [size for size in proportion.SIZES if size[2] > 1]
    for size in sizes:
        for rank in (None, 1):
            assert proportion.largest_move([M.LoRARITE()], size, kind, dtype, 12, rank) < 100, (size, rank)


def test_nearly_equal_columns_are_not_divided_by_rounding_errors():
    nearly_equal = lambda b: b[:, :1] * (1 + 1e-7 * b)
    for dtype in (torch.float32, torch.float64):
        assert proportion.largest_move([M.LoRARITE()], (256, 128, 16), nearly_equal, dtype, 12) < 100


def test_state_has_the_smaller_of_rank_and_width_and_resumes_bitwise():
    straight = pairs(shapes=WIDE)
    whole = lf.optim.LoRAAdamW(straight, lr=1e-2, methods=[M.LoRARITE()])
    train(whole, straight, 3)
    state = whole.state[straight[0][0]]  # a of d_out 3, d_in 32, r 8
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == {"step": (), "exp_avg": (3, 32), "second_moment": (3, 3), "basis": (3, 3)}
    assert whole.state[straight[3][1]]["exp_avg"].shape == (32, 3)
    resumed = [(nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone()), s, w) for a, b, s, w in straight]
    after = lf.optim.LoRAAdamW(resumed, lr=1e-2, methods=[M.LoRARITE()])
    after.load_state_dict(copy.deepcopy(whole.state_dict()))
    for optimizer, chosen in ((whole, straight), (after, resumed)):
        train(optimizer, chosen, 3, first=3)
    assert same(bits(straight, whole), bits(resumed, after))
    wrong = copy.deepcopy(whole.state_dict())
    wrong["state"][0]["second_moment"] = torch.zeros(8, 8)
    before = bits(resumed, after)
    with pytest.raises(
        lf.ArgumentError, match=r"moments of shape \(3, 3\) \(second_moment of model\[0\]\.lora_A\), got \(8, 8\)"
    ):
        after.load_state_dict(wrong)
    assert same(before, bits(resumed, after))


def test_experts_may_have_a_rank_above_their_width():
    """Three experts in one pair of parameters step as three pairs do, and resume bitwise."""
    experts, d_out, d_in, r = 3, 2, 9, 4
    single = pairs(shapes=[(d_out, d_in, r)] * experts)
    merged_a = lambda xs: torch.cat([x.detach() for x in xs])
    merged_b = lambda xs: torch.stack([x.detach() for x in xs], -1).flatten(
        1
    )  # column r·E of an expert every E columns
    a, b = nn.Parameter(merged_a([p[0] for p in single])), nn.Parameter(merged_b([p[1] for p in single]))
    build = lambda a, b: lf.optim.LoRAAdamW([Pair("experts", a, b, 2.0, experts=experts)], methods=[M.LoRARITE()])
    together, alone = build(a, b), lf.optim.LoRAAdamW(single, methods=[M.LoRARITE()])
    for i in range(4):
        set_gradients(single, i)
        a.grad, b.grad = merged_a([p[0].grad for p in single]), merged_b([p[1].grad for p in single])
        if i == 3:
            copied = [nn.Parameter(p.detach().clone()) for p in (a, b)]
            resumed = build(*copied)
            resumed.load_state_dict(copy.deepcopy(together.state_dict()))
            for p, q in zip(copied, (a, b), strict=True):
                p.grad = q.grad
            resumed.step()
        together.step(), alone.step()
    torch.testing.assert_close(a.detach(), merged_a([p[0] for p in single]))
    torch.testing.assert_close(b.detach(), merged_b([p[1] for p in single]))
    assert torch.equal(copied[0], a) and torch.equal(copied[1], b)
