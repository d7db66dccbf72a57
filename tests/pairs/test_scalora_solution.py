"""ScaLoRA in plain torch: its scales are the optimum of the paper's objective, and its merges round as they promise."""

import itertools
import math

import pytest
import torch
import transcription as T
from method_runs import layer_with_gradients

from lora_fast import functional as F


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(layer, g, kappa, alpha, beta):
    """Returns ‖G/L − η s² (G aᵀ diag(β²) a + b diag(α²) bᵀG)‖² times L², with κ = L η s²."""
    a, b = layer.a, layer.b
    moved = g @ a.T @ torch.diag(beta**2) @ a + b @ torch.diag(alpha**2) @ b.T @ g
    return (g - kappa * moved).square().sum().item()


CASES = [
    layer_with_gradients(seed, correlated=correlated)
    for seed, correlated in itertools.product(range(12), (False, True))
]


def test_nnls_minimises_the_objective():
    """The references are projected gradient descent on the objective, and the transcription's active set."""
    constrained = 0
    m, lam = map(torch.stack, zip(*(T.system(layer, da, db)[:2] for layer, _, da, db in CASES), strict=True))
    descent, rate = torch.full_like(lam, 1e-3), 1 / torch.linalg.eigvalsh(m)[:, -1:]
    for _ in range(20_000):
        descent = (descent - rate * ((m @ descent[..., None])[..., 0] - lam / 3.0)).clamp(min=0)
    for (layer, g, da, db), x in zip(CASES, descent, strict=True):
        alpha, beta, info = F.scalora_scaling(layer.a, layer.b, da, db, layer.s, kappa=3.0)
        ours = objective(layer, g, 3.0, alpha, beta)
        assert ours <= objective(layer, g, 3.0, *x.sqrt().chunk(2)) * (1 + 1e-6)
        want = (T.scalora_x(layer, da, db)[0] / 3.0).sqrt()
        torch.testing.assert_close(torch.cat([alpha, beta]), want, rtol=1e-5, atol=1e-5)
        constrained += int(info)
    assert 4 <= constrained <= 20


@pytest.mark.parametrize("d", [1, 2, 4])
def test_nnls_solves_singular_systems(d):
    """M is singular by dimension. The scales are finite in float32, too, and the objective is as small to a
    thousandth."""
    for seed in range(30):
        layer, g, *_ = layer_with_gradients(seed, r=4, d_in=d, d_out=d)
        objectives = {}
        for dtype in (torch.float32, torch.float64):
            a, b = layer.a.to(dtype), layer.b.to(dtype)
            da, db = layer.s * b.T @ g.to(dtype), layer.s * g.to(dtype) @ a.T
            alpha, beta, _ = F.scalora_scaling(a, b, da, db, layer.s, kappa=3.0)
            assert alpha.isfinite().all() and beta.isfinite().all()
            objectives[dtype] = objective(layer, g, 3.0, alpha.double(), beta.double())
        assert objectives[torch.float32] <= objectives[torch.float64] + 1e-3 * g.square().sum()


def test_scales_are_nan_where_grams_are_not_finite():
    layer, g, *_ = layer_with_gradients(0)
    da, db = layer.s * layer.b.T @ g, layer.s * g @ layer.a.T
    da[0, 0] = float("nan")
    for solver in ("nnls", "paper", "column", "scalar"):
        alpha, beta, info = F.scalora_scaling(layer.a, layer.b, da, db, layer.s, 3.0, solver)
        assert alpha.isnan().all() and beta.isnan().all() and info == 1


def test_solvers_agree_where_the_column_solution_is_valid():
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
    """Returns a pair for each case of Theorem 3. Its rank is 1, so that the block sums are the entries."""
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
def test_scalar_solution_is_the_best_of_a_grid(number):
    layer, g = scalar_case(number)
    da, db = T.gradients(layer, g)
    alpha, beta, _ = F.scalora_scaling(layer.a, layer.b, da, db, 1.0, kappa=2.0, solver="scalar")
    ours = objective(layer, g, 2.0, alpha, beta)
    grid = torch.linspace(0, 1.2, 49, dtype=torch.float64).sqrt()
    best = min(objective(layer, g, 2.0, x[None], y[None]) for x in grid for y in grid)
    assert ours <= best * (1 + 1e-9) + 1e-15
    zero = {1: (False, True), 2: (True, False), 3: (False, False), 4: (False, True)}[number]
    assert ((alpha == 0).all().item(), (beta == 0).all().item()) == zero


def test_scales_of_columns_are_1_where_b_is_zero():
    layer, _, _, _ = layer_with_gradients(0)
    layer.b = torch.zeros_like(layer.b)
    da, db = T.gradients(layer, torch.randn(7, 9, generator=generator(5), dtype=torch.float64))
    for solver in ("nnls", "paper", "scalar"):
        alpha, beta, _ = F.scalora_scaling(layer.a, layer.b, da, db, 1.0, 1.0, solver)
        assert (alpha == 1).all() and (beta != 1).all() and torch.isfinite(beta).all()
    assert all((x == 1).all() for x in F.scalora_scaling(layer.a, layer.b, 0 * da, 0 * db, 1.0, 1.0)[:2])


def test_scales_do_not_depend_on_loss_scaling():
    for layer, _, da, db in CASES[:6]:
        a, b, da, db = (x.float() for x in (layer.a, layer.b, da, db))
        want = F.scalora_scaling(a, b, da, db, 1.0, 2.0)
        for factor in (2.0**16, 2.0**-40, 2.0**40):
            got = F.scalora_scaling(a, b, da * factor, db * factor, 1.0, 2.0)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_stochastic_rounding_goes_to_a_neighbour():
    x = torch.tensor([1.0, 1.001, -3.3, 0.0, 3e-7, -2.9e-8, 6e-5, 60000.0, math.inf, math.nan])
    for dtype in (torch.bfloat16, torch.float16):
        zeros, b = torch.zeros(1, 10, dtype=dtype), torch.ones(1, 1)
        merged = [F.add_low_rank_(zeros.clone(), x[None], b, 1.0, "stochastic", seed)[0] for seed in range(300)]
        rounded = torch.stack(merged).double()
        spacing = torch.maximum(x.abs() * torch.finfo(dtype).eps, torch.tensor(2.0**-24)).double()
        assert ((rounded - x.double()).abs()[:, :8] <= spacing[:8]).all()
        assert (((rounded.mean(0) - x.double()) / spacing).abs()[:8] <= 0.15).all()
        assert rounded[:, 0].unique().tolist() == [1.0] and rounded[0, 8] == math.inf and rounded[:, 9].isnan().all()


def test_nearest_rounding_loses_small_merges_and_stochastic_does_not():
    weight = (torch.randn(64, 64, generator=generator()) / 8).to(torch.bfloat16)
    b, a = torch.randn(64, 4, generator=generator(1)) / 8, torch.randn(4, 64, generator=generator(2)) / 8
    change = 0.001 * (b @ a).double()
    shares = {}
    for rounding in ("nearest", "stochastic"):
        merged = [F.add_low_rank_(weight.clone(), a, b, 0.001, rounding, seed).double() for seed in range(200)]
        moved = torch.stack(merged).mean(0) - weight.double()
        shares[rounding] = ((moved * change).sum() / change.square().sum()).item()
        if rounding == "nearest":
            assert (merged[0] == weight.double()).double().mean() > 0.88
    assert abs(shares["stochastic"] - 1) < 0.1 < abs(shares["nearest"] - 1)
