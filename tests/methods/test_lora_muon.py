"""LoRA-Muon: its step is that of the singular value decomposition and stays bounded where Grams are singular. On a
small regression one learning rate is the best at all ranks."""

import math

import pytest
import torch
from torch import nn

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.ops.reference import pairs as twin

FLOAT32, FLOAT64 = torch.float32, torch.float64


RHO = M.LoRAMuon().damping


def draw(*shape, seed=0, dtype=FLOAT64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64).to(dtype)


def move(a, b, moment_a, moment_b, lr_a, lr_b, damping=0.0):
    """Returns Δa and Δb of a step."""
    grams = a @ a.mT, b.mT @ b, moment_a @ moment_a.mT, moment_b.mT @ moment_b
    for_b, for_a = twin.muon(*grams, lr_a, lr_b, damping).chunk(2)
    return for_a @ moment_a, moment_b @ for_b


def orthogonal_factor(x, r):
    """Returns U Vᵀ of the r largest singular values of x (…, m, n)."""
    u, _, vt = torch.linalg.svd(x)
    return u[..., :r] @ vt[..., :r, :]


@pytest.mark.parametrize("r", [1, 4, 16])
def test_step_is_the_orthogonal_factor_of_the_products_momentum(r):
    """The parts of the product's momentum are m_b (a aᵀ)⁻¹ a and b (bᵀb)⁻¹ m_a. They are the gradient of the product,
    projected on the row space of a and on the column space of b."""
    a, b = draw(3, r, 40), draw(3, 30, r, seed=1)
    moment_a, moment_b = draw(3, r, 40, seed=2), draw(3, 30, r, seed=3)
    da, db = move(a, b, moment_a, moment_b, 0.1, 0.3)
    factor_b = orthogonal_factor(moment_b @ torch.linalg.solve(a @ a.mT, a), r)
    factor_a = orthogonal_factor(b @ torch.linalg.solve(b.mT @ b, moment_a), r)
    assert (db @ a + 0.15 * factor_b).abs().max() <= 1e-12
    assert (b @ da + 0.05 * factor_a).abs().max() <= 1e-12
    for change, half in ((db @ a, 0.15), (b @ da, 0.05)):
        assert torch.linalg.svdvals(change)[:, :r].sub(half).abs().max() <= 1e-12


def test_first_order_of_the_step_does_not_depend_on_the_split():
    """Momenta are gradients here. Those of earlier steps would belong to another split."""
    start_a, start_b, g, x = draw(1, 4, 30), draw(1, 20, 4, seed=1), draw(1, 20, 30, seed=2), draw(4, 4, seed=3)
    changes = []
    for a, b in ((start_a, start_b), (torch.linalg.solve(x, start_a), start_b @ x)):
        da, db = move(a, b, b.mT @ g, g @ a.mT, 0.1, 0.1)
        changes.append(db @ a + b @ da)
    assert (changes[0] - changes[1]).abs().max() <= 1e-12


def optimizer_on(a, b, **settings):
    pair = nn.Parameter(a), nn.Parameter(b)
    return pair, lf.optim.LoRAAdamW([pair], methods=[M.LoRAMuon()], **{"lr": 0.1, **settings})


def set_gradients(pair, g):
    a, b = pair
    a.grad, b.grad = (b.detach().T @ g.to(b.dtype)), g.to(a.dtype) @ a.detach().T


def test_a_does_not_move_while_b_is_zero():
    start = draw(4, 30, dtype=FLOAT32)
    (a, b), optimizer = optimizer_on(start.clone(), torch.zeros(20, 4))
    set_gradients((a, b), draw(20, 30, seed=1))
    optimizer.step()
    assert torch.equal(a.detach(), start) and torch.linalg.matrix_rank(b.detach()) == 4
    set_gradients((a, b), draw(20, 30, seed=2))
    optimizer.step()
    assert not torch.equal(a.detach(), start)


def degenerate(case, dtype):
    """Returns a, b and the gradient of the product."""
    a, b, g = draw(8, 30, dtype=dtype), draw(20, 8, seed=1, dtype=dtype), draw(20, 30, seed=2, dtype=dtype)
    if case == "rank 1":
        a, b = a[:1].repeat(8, 1), b[:, :1].repeat(1, 8)
    if case == "zero rows":
        a[:3], b[:, 5:] = 0, 0
    if case == "gradient of rank 2":
        g = g[:, :2] @ g[:2]
    if case == "b is zero, gradient of rank 2":
        b, g = torch.zeros_like(b), g[:, :2] @ g[:2]
    if case == "no gradient":
        g = torch.zeros_like(g)
    if case == "all zero":
        a, b, g = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(g)
    if case == "tiny gradient":
        g = g * 1e-15
    return a, b, g


CASES = [
    "rank 1", "zero rows", "gradient of rank 2", "b is zero, gradient of rank 2", "no gradient", "all zero",
    "tiny gradient",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_step_is_bounded_where_grams_are_singular(case, dtype):
    """In each of ten steps, ‖Δb a‖ and ‖b Δa‖ are at most η/2, ‖Δa‖ at most η / (2 √ρ ‖b‖) and ‖Δb‖ likewise."""
    lr, slack = 0.1, 1.0 + 100 * torch.finfo(dtype).eps
    start_a, start_b, g = degenerate(case, dtype)
    (a, b), optimizer = optimizer_on(start_a, start_b, lr=lr)

    def norm(x):
        return torch.linalg.matrix_norm(x, 2).item()

    for _ in range(10):
        old_a, old_b = a.detach().double(), b.detach().double()
        set_gradients((a, b), g)
        optimizer.step()
        da, db = a.detach().double() - old_a, b.detach().double() - old_b
        rounding = torch.finfo(dtype).eps * max(norm(old_a), norm(old_b), norm(da), norm(db)) * 10
        assert da.isfinite().all() and db.isfinite().all()
        assert norm(db @ old_a) <= slack * lr / 2 + rounding * norm(old_a)
        assert norm(old_b @ da) <= slack * lr / 2 + rounding * norm(old_b)
        assert norm(da) * old_b.norm() <= slack * lr / (2 * math.sqrt(RHO)) + rounding * old_b.norm()
        assert norm(db) * old_a.norm() <= slack * lr / (2 * math.sqrt(RHO)) + rounding * old_a.norm()


def test_nan_stays_in_its_pair():
    pairs = [(nn.Parameter(draw(4, 30, seed=i)), nn.Parameter(draw(20, 4, seed=i + 9))) for i in range(3)]
    alone = [tuple(nn.Parameter(x.detach().clone()) for x in pair) for pair in pairs]
    for chosen, nan in ((pairs, True), (alone, False)):
        optimizer = lf.optim.LoRAAdamW(chosen, lr=0.1, methods=[M.LoRAMuon()])
        for i, pair in enumerate(chosen):
            set_gradients(pair, draw(20, 30, seed=i))
        chosen[1][0].grad[2, 3] = math.nan if nan else 0.0
        optimizer.step()
    assert pairs[1][0].isnan().all() and not pairs[1][1].isnan().any()
    for i in (0, 2):
        assert all(torch.equal(x, y) for x, y in zip(pairs[i], alone[i], strict=True))


def test_state_is_half_of_adamws():
    pair, optimizer = optimizer_on(draw(4, 30), draw(20, 4))
    set_gradients(pair, draw(20, 30))
    optimizer.step()
    assert all(set(optimizer.state[p]) == {"step", "exp_avg"} for p in pair)
    assert sum(optimizer.state[p]["exp_avg"].numel() for p in pair) == sum(p.numel() for p in pair)


def test_learning_rate_may_be_a_tensor():
    ends = []
    for lr in (0.05, torch.tensor(0.05)):
        (a, b), optimizer = optimizer_on(draw(4, 30), draw(20, 4), lr=lr, weight_decay=0.5)
        set_gradients((a, b), draw(20, 30))
        optimizer.step()
        ends.append((a, b))
    assert all(torch.allclose(x, y, rtol=1e-7, atol=1e-8) for x, y in zip(*ends, strict=True))


RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def regression(r, lr, method, decay=1.0, size=96, steps=60, tokens=64):
    """Returns ‖b a − target‖²/2 after training on noise-free samples. The target's singular values are 1/i^decay."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    values = 1 / torch.arange(1, size + 1) ** decay
    target = torch.linalg.qr(draw(size, size))[0] * values @ torch.linalg.qr(draw(size, size))[0]
    a, b = nn.Parameter(draw(r, size) / size**0.5), nn.Parameter(torch.zeros(size, r))
    optimizer = lf.optim.LoRAAdamW([(a, b)], lr=lr, methods=[method])
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / steps)
        optimizer.zero_grad()
        (((b @ a - target) @ draw(size, tokens)).square().sum() / (2 * tokens)).backward()
        optimizer.step()
    return (b @ a - target).square().sum().item() / 2


def losses_and_best_rates(decay):
    losses = {r: [regression(r, lr, M.LoRAMuon(), decay) for lr in RATES] for r in (4, 16, 64)}
    print({r: [f"{loss:.4f}" for loss in by_rate] for r, by_rate in losses.items()})
    return losses, {r: RATES[by_rate.index(min(by_rate))] for r, by_rate in losses.items()}


def test_best_learning_rate_is_the_same_at_ranks_4_16_and_64():
    """Five rates, half a decade apart, decay linearly. On the problem of the next test, the best rate is not the
    same."""
    losses, best = losses_and_best_rates(decay=1.0)
    assert set(best.values()) == {0.1}
    assert min(losses[64]) < min(losses[16]) < min(losses[4])


def test_best_learning_rate_falls_with_rank_for_slowly_falling_values():
    _, best = losses_and_best_rates(decay=0.5)
    assert best[4] == 0.1 and best[64] == 0.03


def test_damping_keeps_the_second_order_of_steps_small():
    losses = {damping: regression(64, 0.1, M.LoRAMuon(damping=damping)) for damping in (1e-6, RHO, 1e-3)}
    print({damping: f"{loss:.3f}" for damping, loss in losses.items()})
    assert losses[1e-3] < losses[RHO] < 0.1 * losses[1e-6]
