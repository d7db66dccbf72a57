"""The step's operations: solves, ScaLoRA's scaling and merge, BaLoRA's balancing, statistics."""

import itertools
import math

import pytest
import tiny
import torch
import transcription as T
from torch import nn

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.checks import ArgumentError

F = lf.functional


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spd(count, r, condition, seed=0, dtype=torch.float64):
    """Symmetric matrices with eigenvalues from 1 down to 1 / condition."""
    q, _ = torch.linalg.qr(torch.randn(count, r, r, generator=generator(seed), dtype=torch.float64))
    values = condition ** -torch.linspace(0, 1, r, dtype=torch.float64) if r > 1 else torch.ones(1, dtype=torch.float64)
    m = (q * values) @ q.mT
    return (0.5 * (m + m.mT)).to(dtype)


@pytest.mark.parametrize("r, condition", [(1, 1.0), (4, 1e6), (16, 1e6), (16, 1e2), (33, 1e4)])
def test_spd_solve_by_lapacks_ratio(r, condition):
    m = spd(2_500, r, condition, dtype=torch.float32)
    rhs = torch.randn(2_500, r, 3, generator=generator(1))
    x, info = F.spd_solve(m, rhs)
    assert (info == 0).all()
    m, rhs, x = m.double(), rhs.double(), x.double()
    norm = torch.linalg.matrix_norm(m, 1)
    residual = torch.linalg.vector_norm(rhs - m @ x, ord=1, dim=1).amax(-1)
    ratio = residual / (norm * torch.linalg.vector_norm(x, ord=1, dim=1).amax(-1) * r * torch.finfo(torch.float32).eps)
    assert ratio.max() <= 5


def test_one_bad_matrix_leaves_its_neighbours():
    m, rhs = spd(9, 5, 100.0, dtype=torch.float32), torch.randn(9, 5, 2, generator=generator(1))
    want, _ = F.spd_solve(m, rhs)
    for bad in (-torch.eye(5), torch.zeros(5, 5), torch.full((5, 5), math.nan)):
        m[4] = bad
        x, info = F.spd_solve(m, rhs)
        assert (info != 0).tolist() == [i == 4 for i in range(9)]
        assert x[4].isnan().all() and torch.equal(x[info == 0], want[info == 0])
    m[4] = 0
    assert torch.allclose(F.spd_solve(m, rhs, damping=0.5)[0][4], 2 * rhs[4])


@pytest.mark.parametrize("count", [0, 1, 70_000])
def test_batches(count):
    m, rhs = spd(1, 4, 10.0, dtype=torch.float32).expand(count, 4, 4), torch.ones(count, 4, 1)
    x, info = F.spd_solve(m, rhs)
    inverse = F.small_inverse(m + torch.eye(4))
    assert x.shape == (count, 4, 1) and info.shape == (count,) and inverse.shape == (count, 4, 4)
    assert torch.equal(x, x[:1].expand_as(x)) and torch.equal(inverse, inverse[:1].expand_as(inverse))


def test_small_inverse():
    skew = torch.randn(50, 8, 8, generator=generator(2)) * 5
    m = torch.eye(8) + spd(50, 8, 10.0, seed=3, dtype=torch.float32) + skew - skew.mT
    error = torch.linalg.matrix_norm(m.double() @ F.small_inverse(m).double() - torch.eye(8), 1)
    assert error.max() <= 12 * 8 * torch.finfo(torch.float32).eps * 10


def case(seed, r=4, d_in=9, d_out=7, s=2.0, correlated=False):
    """A pair in float64, the gradient of its effective weight, and its consistent factor gradients."""
    g = generator(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    a, b, full = draw(r, d_in), draw(d_out, r), draw(d_out, d_in)
    if correlated:  # the column solution then has negative entries
        a, b = a + 3 * a[:1], b + 2 * b[:, :1]
    layer = T.Layer(a, b, s, draw(d_out, d_in))
    return layer, full, *T.gradients(layer, full)


def objective(layer, g, kappa, alpha, beta):
    """‖G/L − η s² (G aᵀ diag(β²) a + b diag(α²) bᵀG)‖² times L², with κ = L η s²."""
    a, b = layer.a, layer.b
    moved = g @ a.T @ torch.diag(beta**2) @ a + b @ torch.diag(alpha**2) @ b.T @ g
    return (g - kappa * moved).square().sum().item()


CASES = [case(seed, correlated=correlated) for seed, correlated in itertools.product(range(12), (False, True))]


def test_nnls_is_the_optimum():
    """Against projected gradient descent on the objective itself, and the transcription's active set."""
    constrained = 0
    for layer, g, da, db in CASES:
        alpha, beta, info = F.scalora_scaling(layer.a, layer.b, da, db, layer.s, kappa=3.0)
        ours = objective(layer, g, 3.0, alpha, beta)
        m, lam, _ = T.system(layer, da, db)
        x, rate = torch.full_like(lam, 1e-3), 1 / torch.linalg.eigvalsh(m)[-1]
        for _ in range(20_000):
            x = (x - rate * (m @ x - lam / 3.0)).clamp(min=0)
        assert ours <= objective(layer, g, 3.0, *x.sqrt().chunk(2)) * (1 + 1e-6)
        want = (T.scalora_x(layer, da, db)[0] / 3.0).sqrt()
        torch.testing.assert_close(torch.cat([alpha, beta]), want, rtol=1e-5, atol=1e-5)
        constrained += int(info)
    assert 4 <= constrained <= 20


@pytest.mark.parametrize("d", [1, 2, 4])
def test_nnls_of_singular_systems(d):
    """Where M is singular by dimension, float32 too finds scales that are finite, and to a thousandth as good."""
    for seed in range(30):
        layer, g, *_ = case(seed, r=4, d_in=d, d_out=d)
        worth = {}
        for dtype in (torch.float32, torch.float64):
            a, b = layer.a.to(dtype), layer.b.to(dtype)
            da, db = layer.s * b.T @ g.to(dtype), layer.s * g.to(dtype) @ a.T
            alpha, beta, _ = F.scalora_scaling(a, b, da, db, layer.s, kappa=3.0)
            assert alpha.isfinite().all() and beta.isfinite().all()
            worth[dtype] = objective(layer, g, 3.0, alpha.double(), beta.double())
        assert worth[torch.float32] <= worth[torch.float64] + 1e-3 * g.square().sum()


def test_grams_that_are_not_finite_give_nan():
    layer, g, *_ = case(0)
    da, db = layer.s * layer.b.T @ g, layer.s * g @ layer.a.T
    da[0, 0] = float("nan")
    for solver in ("nnls", "paper", "column", "scalar"):
        alpha, beta, info = F.scalora_scaling(layer.a, layer.b, da, db, layer.s, 3.0, solver)
        assert alpha.isnan().all() and beta.isnan().all() and info == 1


def test_column_and_paper():
    for layer, g, da, db in CASES:
        results = {
            solver: F.scalora_scaling(layer.a, layer.b, da, db, layer.s, 3.0, solver)
            for solver in ("nnls", "column", "paper", "scalar")
        }
        values = {solver: objective(layer, g, 3.0, *result[:2]) for solver, result in results.items()}
        if results["column"][2] == 0:
            assert all(
                torch.equal(results["nnls"][i], results[other][i]) for i in (0, 1) for other in ("column", "paper")
            )
        else:
            assert (results["column"][0] == 1).all() and (results["column"][1] == 1).all()
            assert torch.equal(results["paper"][0], results["scalar"][0])
        assert values["nnls"] <= min(values.values()) * (1 + 1e-9)


def scalar_case(number):
    """Pairs for each case of Theorem 3: rank 1, so that the block sums are the entries."""
    e = torch.eye(4, dtype=torch.float64)
    a, b = e[:1], e[:, :1]
    if number == 4:  # the gradient is the factors' own product: the two terms are collinear
        g = b @ a
    elif number == 3:
        g = b @ a + b @ e[1:2] + e[:, 2:3] @ a
    else:  # strong in one factor's span, and against the other's share
        g = b @ a + (3 * b @ e[1:2] if number == 1 else 3 * e[:, 2:3] @ a)
    return T.Layer(a, b, 1.0, torch.zeros(4, 4, dtype=torch.float64)), g


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_scalar_cases(number):
    layer, g = scalar_case(number)
    da, db = T.gradients(layer, g)
    alpha, beta, _ = F.scalora_scaling(layer.a, layer.b, da, db, 1.0, kappa=2.0, solver="scalar")
    ours = objective(layer, g, 2.0, alpha, beta)
    grid = torch.linspace(0, 1.2, 49, dtype=torch.float64).sqrt()
    best = min(objective(layer, g, 2.0, x[None], y[None]) for x in grid for y in grid)
    assert ours <= best * (1 + 1e-9) + 1e-15
    zero = {1: (False, True), 2: (True, False), 3: (False, False), 4: (False, True)}[number]
    assert ((alpha == 0).all().item(), (beta == 0).all().item()) == zero


def test_b_of_zero_keeps_its_columns():
    layer, _, _, _ = case(0)
    layer.b = torch.zeros_like(layer.b)
    da, db = T.gradients(layer, torch.randn(7, 9, generator=generator(5), dtype=torch.float64))
    for solver in ("nnls", "paper", "scalar"):
        alpha, beta, _ = F.scalora_scaling(layer.a, layer.b, da, db, 1.0, 1.0, solver)
        assert (alpha == 1).all() and (beta != 1).all() and torch.isfinite(beta).all()
    assert all((x == 1).all() for x in F.scalora_scaling(layer.a, layer.b, 0 * da, 0 * db, 1.0, 1.0)[:2])


def test_loss_scaling_changes_no_bit_of_the_scales():
    for layer, _, da, db in CASES[:6]:
        a, b, da, db = (x.float() for x in (layer.a, layer.b, da, db))
        want = F.scalora_scaling(a, b, da, db, 1.0, 2.0)
        for factor in (2.0**16, 2.0**-40, 2.0**40):
            got = F.scalora_scaling(a, b, da * factor, db * factor, 1.0, 2.0)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_lists_are_their_parts():
    layers = [case(0), case(1, r=3), case(2), case(3, r=1, d_in=5)]
    lists = [[x[0].a for x in layers], [x[0].b for x in layers], [x[2] for x in layers], [x[3] for x in layers]]
    alpha, beta, _ = F.scalora_scaling(*lists, 2.0, 3.0)
    balanced = F.hyperbalance(*lists[:2])
    grams = F.gram(lists[0], dim=1)
    for i, (a, b, da, db) in enumerate(zip(*lists, strict=True)):
        torch.testing.assert_close(
            torch.cat(F.scalora_scaling(a, b, da, db, 2.0, 3.0)[:2]), torch.cat([alpha[i], beta[i]])
        )
        torch.testing.assert_close(F.hyperbalance(a, b)[0], balanced[0][i])
        torch.testing.assert_close(grams[i], a @ a.T)
    torch.testing.assert_close(F.gram(lists[1], dim=0)[1], lists[1][1].T @ lists[1][1])


def scalora(weight_dtype, lr=0.0, **options):
    layer, _, da, db = case(1, r=4, d_in=64, d_out=48)
    a, b = nn.Parameter(layer.a.float() / 8), nn.Parameter(layer.b.float() / 8)
    weight = (layer.w / 8).to(weight_dtype)
    a.grad, b.grad = da.float(), db.float()
    return a, b, weight, lf.optim.LoRAAdamW([(a, b, 2.0, weight)], lr=lr, methods=[M.ScaLoRA(limit=None, **options)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scaling_leaves_the_effective_weight(dtype):
    a, b, weight, optimizer = scalora(dtype)
    before, start, old_a = weight.double() + 2.0 * (b @ a).double(), weight.clone(), a.detach().clone()
    optimizer.step()
    after = weight.double() + 2.0 * (b @ a).double()
    assert (after - before).abs().max() <= 4 * torch.finfo(torch.float32).eps * before.abs().max()
    assert not torch.equal(weight, start) and (a / old_a - 1).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_loses_nothing_on_average(dtype):
    ends, kept = [], {}
    for seed in range(400):
        a, b, weight, optimizer = scalora(dtype, kappa=20.0, seed=seed)
        start, exact = weight.double(), weight.double() + 2.0 * (b @ a).double()
        optimizer.step()
        exact = exact - 2.0 * (b @ a).double()
        ends.append(weight.double())
    change = exact - start
    mean = torch.stack(ends).mean(0) - start
    spacing = torch.finfo(dtype).eps * exact.abs().max().item()
    assert (mean - change).abs().mean() <= spacing / 400**0.5
    for rounding in ("nearest", "compensated"):
        a, b, weight, optimizer = scalora(dtype, kappa=20.0, rounding=rounding)
        optimizer.step()
        kept[rounding] = weight.double()
    residual = optimizer.state[b]["merge_residual"].double()
    assert torch.equal(kept["nearest"], kept["compensated"])
    assert (kept["compensated"] + residual - exact).abs().max() <= torch.finfo(dtype).eps ** 2 * exact.abs().max()


def test_stochastic_rounding_goes_to_a_neighbour():
    x = torch.tensor([1.0, 1.001, -3.3, 0.0, 3e-7, -2.9e-8, 6e-5, 60000.0, math.inf, math.nan])
    for dtype in (torch.bfloat16, torch.float16):
        zeros, one = torch.zeros(1, 10, dtype=dtype), torch.ones(1, 1)
        merged = [F.add_low_rank_(zeros.clone(), x[None], one, 1.0, "stochastic", seed)[0] for seed in range(300)]
        seen = torch.stack(merged).double()
        spacing = torch.maximum(x.abs() * torch.finfo(dtype).eps, torch.tensor(2.0**-24)).double()
        assert ((seen - x.double()).abs()[:, :8] <= spacing[:8]).all()
        assert (((seen.mean(0) - x.double()) / spacing).abs()[:8] <= 0.15).all()
        assert seen[:, 0].unique().tolist() == [1.0] and seen[0, 8] == math.inf and seen[:, 9].isnan().all()


def test_nearest_loses_small_merges_and_stochastic_does_not():
    weight = (torch.randn(64, 64, generator=generator()) / 8).to(torch.bfloat16)
    b, a = torch.randn(64, 4, generator=generator(1)) / 8, torch.randn(4, 64, generator=generator(2)) / 8
    change = 0.001 * (b @ a).double()
    kept = {}
    for rounding in ("nearest", "stochastic"):
        merged = [F.add_low_rank_(weight.clone(), a, b, 0.001, rounding, seed).double() for seed in range(200)]
        moved = torch.stack(merged).mean(0) - weight.double()
        kept[rounding] = ((moved * change).sum() / change.square().sum()).item()
        if rounding == "nearest":
            assert (merged[0] == weight.double()).double().mean() > 0.88
    assert abs(kept["stochastic"] - 1) < 0.1 < abs(kept["nearest"] - 1)


def test_gradients_of_a_layer_are_consistent():
    x, w = torch.randn(30, 12, generator=generator()), torch.randn(9, 12, generator=generator(1))
    a, b = (torch.randn(*shape, generator=generator(2)).requires_grad_() for shape in ((4, 12), (9, 4)))
    F.lora_linear(x, w, None, a, b, 2.0).square().sum().backward()
    torch.testing.assert_close(a.detach() @ a.grad.T, b.grad.T @ b.detach(), rtol=1e-4, atol=1e-2)


def test_kappa_is_calibrated_at_the_first_scaling():
    a, b, _, optimizer = scalora(torch.float32)
    old = a.detach().clone()
    a.grad.zero_(), b.grad.zero_()
    optimizer.step()
    assert torch.equal(a, old) and optimizer.param_groups[0]["method_state"]["kappa"] == 0
    a, b, _, optimizer = scalora(torch.float32)
    optimizer.step()
    beta = (a / old)[:, 0]
    assert beta.log().mean().abs() < 1e-5 and optimizer.param_groups[0]["method_state"]["kappa"] > 0


def test_weights_that_cannot_take_a_merge():
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
        with pytest.raises(ArgumentError, match=message):
            lf.optim.LoRAAdamW(model, methods=[M.ScaLoRA()])


def test_scalora_trains_a_model():
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


@pytest.mark.parametrize("gauge", ["symmetric", "svd", "svd_signed"])
def test_hyperbalance(gauge):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for seed in range(10):
            layer, *_ = case(seed, r=4, d_in=20, d_out=30)
            a, b = layer.a.to(dtype) / 50, layer.b.to(dtype) * 3
            new_a, new_b = F.hyperbalance(a, b, gauge)
            want = b.double() @ a.double()
            assert (new_b.double() @ new_a.double() - want).norm() <= tolerance * want.norm()
            ka, kb = new_a @ new_a.T, new_b.T @ new_b
            assert (ka - kb).norm() <= tolerance * ka.norm()
            if gauge != "symmetric":
                assert (ka - ka.diagonal().diag()).norm() <= tolerance * ka.norm()
    assert torch.equal(F.hyperbalance(a, torch.zeros_like(b), gauge)[0], a)
    thin = b.clone()
    thin[:, 2:] = thin[:, :2]  # rank 2 of 4: the product stays
    new_a, new_b = F.hyperbalance(a, thin, gauge)
    assert (new_b @ new_a - thin @ a).norm() <= 1e-3 * (thin @ a).norm()


def test_adapter_stats():
    model = tiny.injected_llama()
    stats = lf.metrics.adapter_stats(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, lf.LoRALinear)}
    assert list(stats) == list(layers)
    for name, layer in layers.items():
        a, b, got = layer.lora_A.double(), layer.lora_B.double(), stats[name]
        sigma = torch.linalg.svdvals(layer.scaling * b @ a)[: layer.r]
        sa, sb = torch.linalg.svdvals(a), torch.linalg.svdvals(b)
        want = [
            *(a.norm(), b.norm(), a.square().mean().sqrt() / b.square().mean().sqrt()),
            *(sigma.norm(), sigma[0], sigma.sum(), (sigma > 0.005).sum(), sigma.norm() ** 2 / sigma[0] ** 2),
            *((a @ a.T - b.T @ b).norm(), (a @ a.T - layer.r / len(b) * b.T @ b).norm()),
            (sa[0] ** 2 + sb[0] ** 2) / min(sa[-1], sb[-1]) ** 2,
        ]
        for field, value in zip(vars(got).values(), want, strict=True):
            assert field == pytest.approx(value.item(), rel=1e-4), name
    assert lf.metrics.adapter_stats(tiny.llama()) == {}


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: F.gram([torch.ones(2)], 1), "tensors"),
        (lambda: F.gram([torch.ones(2, 2)], 2), "dim"),
        (lambda: F.spd_solve(torch.ones(2, 3), torch.ones(2, 3, 1)), "matrices"),
        (lambda: F.spd_solve(torch.ones(2, 3, 3), torch.ones(2, 4, 1)), "rhs"),
        (lambda: F.spd_solve(torch.ones(2, 3, 3), torch.ones(2, 3, 1), -1.0), "damping"),
        (lambda: F.hyperbalance(torch.ones(2, 3), torch.ones(4, 3)), "b"),
        (lambda: F.hyperbalance(torch.ones(2, 3), torch.ones(4, 2), "polar"), "gauge"),
        (lambda: F.scalora_scaling(*[torch.ones(2, 2)] * 4, 1.0, 0.0), "kappa"),
        (lambda: F.scalora_scaling(*[torch.ones(2, 2)] * 3, torch.ones(3, 2), 1.0, 1.0), "db"),
        (lambda: F.add_low_rank_(torch.ones(3, 3), torch.ones(2, 3), torch.ones(4, 2), 1.0), "weight"),
        (
            lambda: F.add_low_rank_(torch.ones(4, 3, dtype=torch.int8), torch.ones(2, 3), torch.ones(4, 2), 1.0),
            "weight",
        ),
    ],
)
def test_wrong_arguments(call, argument):
    with pytest.raises(ArgumentError, match=rf"^{argument}(\[0\])?: expected"):
        call()
