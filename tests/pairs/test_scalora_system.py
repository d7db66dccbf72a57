"""ScaLoRA's Hadamard system as a kernel, through Triton's interpreter (natively on a CUDA machine): against the twin in
float64, the conditions of the optimum, the theorem's cases, inactive coordinates, NaN and Inf, the scales."""

import pytest
import torch
import transcription as T
from budget import DRAWS, check, error
from launching import DEVICE, poisoned_empty
from triton.runtime.interpreter import InterpretedFunction

from lora_fast.kernels import limits
from lora_fast.kernels.inspection import interpreter
from lora_fast.kernels.pairs import scalora_scales, scalora_system
from lora_fast.ops.reference import scalora_solution as twin

pytestmark = [
    pytest.mark.gpu,
    # numpy warns about lanes whose values a kernel computes but does not select
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
]
EPS = torch.finfo(torch.float32).eps
COUNTED = pytest.mark.skipif(DEVICE.type == "cuda", reason="counted by the interpreter")


def pairs(n, r, kind="", seed=0):
    """Returns a, b and consistent gradients P, Q of n pairs, float64. kind "correlated": the constraints are mostly
    active; "singular": M does not have full rank; "rank 1": the gradient has rank 1."""
    generator = torch.Generator().manual_seed(100 * r + seed)

    def draw(*shape):
        return torch.randn(n, *shape, generator=generator, dtype=torch.float64)

    d_in, d_out = (max(1, r // 2), max(1, r // 2)) if kind == "singular" else (3 * r + 5, 2 * r + 7)
    a, b, g = draw(r, d_in), draw(d_out, r), draw(d_out, d_in)
    if kind in ("correlated", "singular"):
        a, b = a + 3 * a[:, :1], b + 2 * b[:, :, :1]
    if kind == "rank 1":
        g = draw(d_out, 1) @ draw(1, d_in)
    return a, b, b.mT @ g, g @ a.mT


def grams(a, b, p, q, scale=1.0):
    """Returns the float32 Grams, with gradients times ``scale``."""
    p, q = scale * p, scale * q
    return [x.float().to(DEVICE) for x in (a @ a.mT, b.mT @ b, p @ p.mT, q.mT @ q, p @ a.mT)]


def double(tensors):
    return [x.double() for x in tensors]


def only_active(x, active):
    """Returns x of the active coordinates, 0 for the others."""
    return torch.where(active, x, 0.0)


def twin_error(tensors, solver):
    """Returns the twin's largest error in float32, over gradient scales that change only the roundings."""
    errors = []
    for i in range(DRAWS):
        inputs = grams(*tensors, 1 + i / DRAWS)
        exact, active, _ = twin.scalora_solve(*double(inputs), solver)
        errors.append(error(only_active(twin.scalora_solve(*inputs, solver)[0], active), only_active(exact, active)))
    return max(errors)


def check_pairs(tensors, solver):
    inputs = grams(*tensors)
    with poisoned_empty():
        x, active, info = scalora_system.scalora_solve(*inputs, solver)
    exact, exact_active, exact_info = twin.scalora_solve(*double(inputs), solver)
    assert torch.equal(active, exact_active) and torch.equal(info, exact_info)
    assert x[~active].eq(0).all() and x.ge(0).all()
    check(solver, x, only_active(exact, active), twin_error(tensors, solver), torch.float32)
    return info


@pytest.mark.parametrize("kind", ["", "correlated", "rank 1"])
@pytest.mark.parametrize("solver", limits.SOLVERS)
def test_solution_matches_the_twin(solver, kind):
    info = check_pairs(pairs(3, 4, kind), solver)
    if solver != "scalar":
        assert info.any() == (kind != ""), "only the first kind has a valid unconstrained optimum"


@pytest.mark.parametrize(
    "r, solver, kind",
    [
        (1, "nnls", ""),
        (8, "nnls", "correlated"),
        (16, "nnls", "rank 1"),
        (17, "nnls", "correlated"),
        (32, "paper", ""),
        (33, "nnls", "rank 1"),
        (33, "paper", "correlated"),
        (65, "column", ""),
        (100, "scalar", ""),
        (128, "scalar", "correlated"),
    ],
)
def test_solution_matches_the_twin_at_every_rank(r, solver, kind):
    check_pairs(pairs(1, r, kind), solver)


def unit_system(inputs):
    """Returns the equilibrated system in float64 without its ridge: M, λ, and d with x = d z."""
    m, lam = twin._system(*double(inputs))
    d = m.diagonal(dim1=-2, dim2=-1).rsqrt()
    return d[:, :, None] * m * d[:, None, :], d * lam, d


@pytest.mark.parametrize("r, kind", [(4, "correlated"), (4, "singular"), (6, "singular"), (17, "correlated")])
def test_nnls_meets_the_conditions_of_the_optimum(r, kind):
    """Slopes are 0 where z > 0, else at most 0, by LAPACK's ratio; M may be singular."""
    inputs = grams(*pairs(2 if r < 17 else 1, r, kind))
    x, active, info = scalora_system.scalora_solve(*inputs, "nnls")
    assert info.any() and active.all()
    m, rhs, d = unit_system(inputs)
    z = x.double() / d
    slope = rhs - (m @ z[:, :, None])[:, :, 0]
    wrong = torch.where(z > 0, slope.abs(), slope.clamp(min=0))
    size = rhs.abs() + (m.abs() @ z[:, :, None])[:, :, 0]
    assert (wrong / size).max() <= 5 * 2 * r * EPS


def test_nnls_agrees_with_lawson_and_hanson():
    tensors = pairs(4, 5, "correlated", seed=1)
    inputs = grams(*tensors)
    x, _, info = scalora_system.scalora_solve(*inputs, "nnls")
    m, rhs, d = unit_system(inputs)
    ridge = twin.RIDGES[0] * torch.eye(10, dtype=torch.float64, device=DEVICE)
    exact = torch.stack([T.nnls(m[i] + ridge, rhs[i]) for i in range(4)]) * d
    assert info.any()
    check("x", x, exact, twin_error(tensors, "nnls"), torch.float32)
    assert torch.equal(x > 0, exact > 0)


# ka, kb, kp, kq, k of rank 1, so that M = [[kb kp, k²], [k², kq ka]] and λ = [kp, kq]; then α², β² for κ = 1.
THEOREM_3 = {
    "1: alpha alone": ((1, 1, 10, 1, 1), (1, 0)),
    "2: beta alone": ((1, 1, 1, 10, 1), (0, 1)),
    "3: both": ((1, 2, 2, 1, 1), (1 / 3, 2 / 3)),
    "4: collinear": ((1, 1, 1, 1, 1), (1, 0)),
    "4: collinear, no alpha": ((1, 0, 0, 1, 0), (0, 1)),
}


@pytest.mark.parametrize("numbers, want", THEOREM_3.values(), ids=THEOREM_3)
def test_scalar_solver_follows_theorem_3(numbers, want):
    inputs = [torch.tensor(float(number), device=DEVICE).view(1, 1, 1) for number in numbers]
    x, _, info = scalora_system.scalora_solve(*inputs, "scalar")
    torch.testing.assert_close(x[0].cpu(), torch.tensor(want, dtype=torch.float32), rtol=EPS, atol=0)
    assert info == 0


@pytest.mark.parametrize("solver", limits.SOLVERS)
def test_inactive_coordinates_are_zero(solver):
    """Pairs have b = 0 or a gradient of 0, and are padded to a larger rank."""
    a, b, p, q = pairs(3, 3)
    b[0], p[0] = 0, 0
    p[1], q[1] = 0, 0
    padded = [torch.nn.functional.pad(x, (0, 2, 0, 2)) for x in grams(a, b, p, q)]
    x, active, info = scalora_system.scalora_solve(*padded, solver)
    x, active = x.view(3, 2, 5), active.view(3, 2, 5)
    exact, exact_active, exact_info = twin.scalora_solve(*double(grams(a, b, p, q)), solver)
    assert active[:2, :, :3].tolist() == [[[False] * 3, [True] * 3], [[False] * 3] * 2]
    assert torch.equal(active[..., :3].flatten(1), exact_active) and torch.equal(info, exact_info)
    assert not active[..., 3:].any() and x[~active].eq(0).all()
    expected = only_active(exact, exact_active)
    check("x", x[..., :3], expected.view(3, 2, 3), twin_error((a, b, p, q), solver), torch.float32)


@pytest.mark.parametrize(
    "r, value, solver",
    [(2, value, solver) for value in (float("nan"), float("inf")) for solver in limits.SOLVERS]
    + [(33, float("nan"), "nnls"), (33, float("nan"), "scalar")],
)
def test_nan_and_inf_affect_only_their_pair(r, value, solver):
    """A NaN or Inf in any Gram, on the diagonal or off it, makes its pair's solution NaN and its scales 1, and changes
    no bit of the others."""
    places = [(i, j) for i in range(5) for j in (0, 1)] if r == 2 else [(4, 7)]
    inputs = grams(*pairs(1, r))
    clean = scalora_system.scalora_solve(*inputs, solver)
    inputs = [x.repeat(len(places) + 1, 1, 1) for x in inputs]
    for pair, (i, j) in enumerate(places):
        inputs[i][pair, 0, j] = value
    x, active, info = scalora_system.scalora_solve(*inputs, solver)
    assert x[:-1].isnan().all() and active[:-1].all() and info[:-1].eq(1).all()
    for got, want in zip((x, active, info), clean, strict=True):
        assert torch.equal(got[-1], want[0])
    scales = scalora_scales.scales(x, active, 2.0, torch.ones(len(x), device=DEVICE), 0.25, 4.0)
    for scale, neutral in zip(scales, (1, 1, 0), strict=True):
        assert scale[: len(places)].eq(neutral).all()
    assert scales[0][len(places)].isfinite().all()


@pytest.mark.parametrize("solver", ["nnls", "scalar"])
def test_loss_scaling_changes_no_bit(solver):
    tensors = pairs(2, 4, "correlated")
    inputs = grams(*tensors)
    want = scalora_system.scalora_solve(*inputs, solver)
    for power in (2.0**16, 2.0**-31, 2.0**40):
        scaled = [x * s for x, s in zip(inputs, (1, 1, power**2, power**2, power), strict=True)]
        for got, same in zip(scalora_system.scalora_solve(*scaled, solver), want, strict=True):
            assert torch.equal(got, same)
    x = scalora_system.scalora_solve(*grams(*tensors, 3.7), solver)[0]
    check("x", x, twin.scalora_solve(*double(inputs), solver)[0], twin_error(tensors, solver), torch.float32)


def test_same_inputs_give_the_same_bits():
    inputs = grams(*pairs(1, 6, "singular"))
    first, again = (scalora_system.scalora_solve(*inputs, "nnls")[0] for _ in range(2))
    assert torch.equal(first, again)


@COUNTED
@pytest.mark.parametrize("r, solver", [(4, "nnls"), (33, "scalar")])
def test_one_launch_reads_the_grams_once(r, solver):
    """The diagonals are read once more."""
    inputs = grams(*pairs(3, r))
    with interpreter.traffic() as counted:
        scalora_system.scalora_solve(*inputs, solver)
    assert counted.launches == ["lora_scalora_solve_kernel"]
    equilibration = 4 * 4 * r * 3 if solver == "scalar" else 0  # read from memory at rank 33
    assert counted.loaded == 4 * 3 * (5 * r * r + 4 * r) + equilibration


@COUNTED
@pytest.mark.parametrize("n", [0, 70_000])
def test_grid_fits_any_number_of_pairs(n, monkeypatch):
    grids = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, grid, **kwargs: grids.append(grid))
    x, active, info = scalora_system.scalora_solve(*torch.zeros(5, n, 2, 2, device=DEVICE), "nnls")
    scales = scalora_scales.scales(x, active, 1.0, torch.ones(n, device=DEVICE), 0.25, 4.0)
    assert x.shape == active.shape == (n, 4) and info.shape == (n,)
    assert [s.shape for s in scales] == [(2 * n, 2), (2 * n, 2), (n, 2)]
    assert grids == ([(n,), (-(-n * 2 // scalora_scales.BLOCK),)] if n else [])


@pytest.mark.parametrize("in_memory", [False, True], ids=["number", "in memory"])
@pytest.mark.parametrize("low, high", [(0.25, 4.0), (1e-3, None)])
def test_scales_match_the_formula(low, high, in_memory):
    n, r = 70, 5
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(n, 2 * r, generator=generator)).exp().to(DEVICE)
    x[3, 2], x[5, 1] = 0, float("nan")
    active = (torch.rand(n, 2 * r, generator=generator) < 0.8).to(DEVICE)
    active[3, 2], active[5, 1] = True, True
    scaling = torch.rand(n, generator=generator).to(DEVICE)

    def kappa_argument(kappa):
        return torch.tensor(kappa, dtype=torch.float64, device=DEVICE) if in_memory else kappa

    with poisoned_empty():
        scale_p, scale_g, residual_scale = scalora_scales.scales(x, active, kappa_argument(0.7), scaling, low, high)
    want = torch.where(active & x.isfinite(), (x.double() / 0.7).sqrt().clamp(low, high), 1.0)
    alpha, beta = want[:, :r], want[:, r:]
    torch.testing.assert_close(scale_p.double(), torch.cat([alpha, beta]), rtol=EPS, atol=0)
    assert torch.equal(scale_g, torch.cat([scale_p[n:], scale_p[:n]]))
    exact = scaling.double()[:, None] * (1 - alpha * beta)
    size = scaling.double()[:, None] * (1 + alpha * beta)
    assert (residual_scale.double() - exact).abs().le(2 * EPS * size).all()
    assert scale_p[5, 1] == scale_g[n + 5, 1] == 1
    for kappa in (0.0, -1.0, float("nan")):
        scale_p, scale_g, residual_scale = scalora_scales.scales(x, active, kappa_argument(kappa), scaling, low, high)
        assert scale_p.eq(1).all() and scale_g.eq(1).all() and residual_scale.eq(0).all()


BAD = {
    "solver": (lambda g: scalora_system.scalora_solve(*g, "best"), "solver"),
    "rank": (lambda g: scalora_system.scalora_solve(*torch.zeros(5, 1, 129, 129), "nnls"), "r from 1 to 128"),
    "square": (lambda g: scalora_system.scalora_solve(*torch.zeros(5, 1, 2, 3), "nnls"), "ka"),
    "shape": (lambda g: scalora_system.scalora_solve(*g[:4], g[4][:1], "nnls"), "k: expected"),
    "dtype": (lambda g: scalora_system.scalora_solve(g[0], g[1].double(), *g[2:], "nnls"), "kb: expected"),
    "strides": (lambda g: scalora_system.scalora_solve(*g[:2], g[2].mT, *g[3:], "nnls"), "kp: expected contiguous"),
    "active": (
        lambda g: scalora_scales.scales(torch.ones(2, 4), torch.ones(2, 4), 1.0, torch.ones(2), 0.1, 2),
        "active",
    ),
    "kappa": (
        lambda g: scalora_scales.scales(
            torch.ones(2, 4), torch.ones(2, 4).bool(), torch.ones(1), torch.ones(2), 0.1, 2
        ),
        "kappa",
    ),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_arguments_are_named_in_assertions(call, message):
    with pytest.raises(AssertionError, match=message):
        call(grams(*pairs(2, 3)))
