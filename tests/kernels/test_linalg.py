"""SPD solves, and inverses without pivoting, through Triton's interpreter (natively on a CUDA machine): in registers up
to rank 64, blocked in memory above."""

import pytest
import torch
from launching import DEVICE, poisoned_empty, randn, size
from triton.runtime.interpreter import InterpretedFunction

from lora_fast.kernels.inspection import interpreter
from lora_fast.kernels.linalg import inverse
from lora_fast.kernels.linalg import spd as solve
from lora_fast.ops.reference import pairs as twin

pytestmark = pytest.mark.gpu

FLOAT32 = torch.float32
EPS = torch.finfo(FLOAT32).eps
COUNTED = pytest.mark.skipif(DEVICE.type == "cuda", reason="counted by the interpreter")
NAN_EXPECTED = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # of numpy
R = 20


@pytest.fixture
def in_memory(monkeypatch):
    """Makes the kernels work on rank R in memory, as they do above rank 64, which takes longer to interpret."""
    for module in (solve, inverse):
        monkeypatch.setattr(module, "IN_REGISTERS", R - 1)


@pytest.fixture(params=["in registers", "in memory"])
def place(request):
    if request.param == "in memory":
        request.getfixturevalue("in_memory")


def norm(matrices):
    """Returns 1-norms in float64."""
    return matrices.double().abs().sum(-2).amax(-1)


def spd(n, r, condition, seed=0):
    """Returns random SPD matrices with eigenvalues from 1 down to 1 / condition."""
    q = torch.linalg.qr(randn(n, r, r, seed=seed).double())[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64, device=DEVICE)
    return ((q * values) @ q.mT).float()


def eye(n, r):
    return torch.eye(r, device=DEVICE).expand(n, r, r)


def lapack_ratio(matrices, x, rhs):
    """Returns the largest ‖b − A x‖ / (‖A‖ ‖x‖ r ε)."""
    residual = rhs.double() - matrices.double() @ x.double()
    return (norm(residual) / (norm(matrices) * norm(x) * matrices.shape[-1] * EPS)).max().item()


# ---- SPD systems


@pytest.mark.parametrize(
    "r, n, k", [(1, 3, 3), (2, 5, 70), (7, 10, 3), (16, 4, 70), (33, 2, 3), (64, 1, 70), (65, 1, 1), (80, 1, 130)]
)
def test_spd_solve_meets_lapacks_ratio(r, n, k):
    matrices, rhs = spd(n, r, 1e6, seed=k), randn(n, r, k)
    with poisoned_empty():
        x, info = solve.spd_solve(matrices, rhs)
    assert info.eq(0).all() and lapack_ratio(matrices, x, rhs) <= 5


@pytest.mark.parametrize("r, n", [(1, 5), (8, 5), (21, 3), (64, 1), (96, 1), (130, 1)])
def test_spd_inverse_meets_lapacks_ratio(r, n):
    """Grams without full rank are definite by their damping alone."""
    thin, damping = randn(n, r, max(1, r // 2)), 1e-2
    matrices = thin @ thin.mT
    with poisoned_empty():
        x = solve.spd_inverse(matrices, damping)
    assert lapack_ratio(matrices + damping * eye(n, r), x, eye(n, r)) <= 5


@NAN_EXPECTED
def test_spd_inverse_retries_grams_that_rounding_left_indefinite(place):
    """More damping makes an eigenvalue of -½ r ε tr positive, but not one of -1. Other matrices keep their damping."""
    matrices = spd(3, R, 1e3)
    q = torch.linalg.qr(randn(R, R).double())[0]
    for i, smallest in ((1, -0.5 * R * EPS), (2, -1.0)):
        values = torch.full((R,), (1.0 - smallest) / (R - 1), dtype=torch.float64, device=DEVICE)  # of trace 1
        values[-1] = smallest
        matrices[i] = ((q * values) @ q.mT).float()
    ridge = R * EPS * matrices[1].diagonal().sum()
    x = solve.spd_inverse(matrices, 0.0)
    assert (solve.spd_solve(matrices[1:], randn(2, R, 1))[1] != 0).all()
    assert lapack_ratio(matrices[1] + ridge * eye(1, R), x[1:2], eye(1, R)) <= 5
    assert x[2].isnan().all() and torch.equal(x[:1], solve.spd_inverse(matrices[:1], 0.0))
    assert torch.equal(twin.spd_inverse(matrices, 0.0).isnan(), x.isnan())


@NAN_EXPECTED
def test_spd_solve_flags_only_the_indefinite_matrices(place):
    matrices, rhs = spd(4, R, 1e3), randn(4, R, 1)
    clean, _ = solve.spd_solve(matrices[:1], rhs[:1])
    matrices[1, 4, 4] = -1.0
    matrices[2, 7, 2] = matrices[2, 2, 7] = float("nan")
    matrices[3] = 0.0
    x, info = solve.spd_solve(matrices, rhs)
    assert info.tolist() == [0, 5, 8, 1]  # the order of the leading minor; the eighth contains the NaN
    assert x[1:].isnan().all() and torch.equal(x[:1], clean)


# ---- Inverses without pivoting


def cayley_matrices(n, r, skew, seed=0):
    """Returns a1 (n, r, r), a2 (n, r, 5), b (n, 7, r) and M = I + a1ᵀ − a1 + a2 a2ᵀ + bᵀb in float32."""
    a1, a2, b = randn(n, r, r, seed=seed), randn(n, r, 5, seed=seed), randn(n, 7, r, seed=seed)
    a1 *= skew / (a1.mT - a1).abs().amax().clamp(min=1)
    return a1, a2, b, eye(n, r) + (a1.mT - a1) + a2 @ a2.mT + b.mT @ b


def cayley_defect(a1, a2, b, w):
    """Returns ‖a aᵀ + bᵀb − I‖₁ of the factors that the inverses w give, in float64."""
    a2, b, w = a2.double(), b.double(), w.double()
    a = torch.cat([2 * w.mT - eye(*w.shape[:2]), -2 * w.mT @ a2], -1)
    b = -2 * b @ w
    return norm(a @ a.mT + b.mT @ b - eye(*w.shape[:2]))


@pytest.mark.parametrize("skew", [1.0, 100.0])
@pytest.mark.parametrize("r, n", [(1, 3), (2, 20), (9, 20), (16, 20), (33, 2), (64, 1), (65, 1), (100, 1)])
def test_small_inverse_is_within_12_r_eps(r, n, skew):
    """NB-LoRA's orthogonality and the inverse itself are within 12 r ε."""
    a1, a2, b, matrices = cayley_matrices(n, r, skew)
    with poisoned_empty():
        w = inverse.small_inverse(matrices)
    assert cayley_defect(a1, a2, b, w).max() <= 12 * r * EPS
    exact = torch.linalg.inv(matrices.double())
    assert (norm(w - exact) <= 12 * r * EPS * norm(exact)).all()


@pytest.mark.budget
@pytest.mark.parametrize("r", [129, 200, 256])
def test_inverses_are_accurate_at_large_ranks(r):
    a1, a2, b, matrices = cayley_matrices(1, r, 100.0)
    assert cayley_defect(a1, a2, b, inverse.small_inverse(matrices)).max() <= 12 * r * EPS
    matrices = spd(1, r, 1e6)
    assert lapack_ratio(matrices, solve.spd_inverse(matrices, 0.0), eye(1, r)) <= 5


def test_small_inverse_keeps_a_nan_in_its_matrix(place):
    matrices = cayley_matrices(2, R, 1.0)[-1]
    clean = inverse.small_inverse(matrices[:1])
    matrices[1, 2, 2] = float("nan")
    got = inverse.small_inverse(matrices)
    assert got[1].isnan().any() and torch.equal(got[:1], clean)


# ---- Batches


@pytest.mark.parametrize("n", [0, 1])
def test_batch_takes_one_launch_each(n, place):
    matrices = 2 * eye(n, R)
    with interpreter.traffic() as counted:
        x, info = solve.spd_solve(matrices, randn(n, R, 2))
        inverses = solve.spd_inverse(matrices, 0.5)
        w = inverse.small_inverse(matrices)
    assert x.shape == (n, R, 2) and info.shape == (n,) and inverses.shape == w.shape == (n, R, R)
    if DEVICE.type == "cpu":
        assert len(counted.launches) == (3 if n else 0)


def test_few_programs_give_the_bits_of_single_inverses(monkeypatch, in_memory):
    """Programs that work in memory loop over the matrices."""
    for module in (solve, inverse):
        monkeypatch.setattr(module, "SLOTS", 2)
    matrices = spd(3, R, 1e3)
    together, one_by_one = solve.spd_inverse(matrices, 0.5), [solve.spd_inverse(m[None], 0.5)[0] for m in matrices]
    assert torch.equal(together, torch.stack(one_by_one))
    together, one_by_one = inverse.small_inverse(matrices), [inverse.small_inverse(m[None])[0] for m in matrices]
    assert torch.equal(together, torch.stack(one_by_one))


def test_inverses_of_seventy_thousand_matrices(monkeypatch):
    """These are more than 65,535, the limit of a grid's other axes. In the interpreter only the grid is checked."""
    if DEVICE.type == "cuda":
        matrices = (2 * torch.eye(2, device=DEVICE)).expand(70_000, 2, 2).contiguous()
        assert torch.equal(inverse.small_inverse(matrices), matrices / 4)
        assert torch.equal(solve.spd_inverse(matrices, 0.0), matrices / 4)
        return
    grids = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, grid, **kwargs: grids.append(grid))
    for r in (2, 65):
        matrices = torch.empty(70_000, r, r)
        solve.spd_inverse(matrices, 0.0)
        inverse.small_inverse(matrices)
    assert grids == [(70_000, 1), (70_000,), (solve.SLOTS,), (solve.SLOTS,)]


def test_same_inputs_give_the_same_bits(place):
    matrices, rhs = spd(1, R, 1e6), randn(1, R, 3)
    run = lambda: (solve.spd_solve(matrices, rhs)[0], inverse.small_inverse(matrices + eye(1, R)))
    assert all(torch.equal(x, again) for x, again in zip(run(), run(), strict=True))


@COUNTED
def test_traffic_in_registers_is_minimal():
    """A matrix is read once, its inverse written once."""
    matrices = spd(5, R, 10)
    for run, extra in ((lambda: solve.spd_inverse(matrices, 0.0), 5 * 4), (lambda: inverse.small_inverse(matrices), 0)):
        with interpreter.traffic() as counted:
            run()
        assert (counted.loaded, counted.stored) == (size(matrices), size(matrices) + extra)


@COUNTED
def test_traffic_in_memory_is_bounded(in_memory):
    """Most of the traffic stays in a cache. With blocks of 16 rows, every operand of a product over the whole matrix
    takes r³/16 numbers (a sixth of an operand for U, one for the two solves; three for Gauss-Jordan, two for the
    refinement), and there are some passes over the matrix."""
    r = 48
    matrices = spd(1, r, 10)
    for run, operands, passes in (
        (lambda: solve.spd_inverse(matrices, 0.0), 7 / 6, 8),
        (lambda: inverse.small_inverse(matrices), 5, 14),
    ):
        with interpreter.traffic() as counted:
            run()
        assert counted.total <= 4 * (operands * r**3 / 16 + passes * r**2)


@pytest.mark.parametrize("shape, dtype", [((2, 3, 4), FLOAT32), ((1, 257, 257), FLOAT32), ((2, 3, 3), torch.float64)])
def test_assertion_names_bad_matrices(shape, dtype):
    matrices = torch.ones(shape, dtype=dtype, device=DEVICE)
    for run in (lambda m: solve.spd_solve(m, m), lambda m: solve.spd_inverse(m, 0.0), inverse.small_inverse):
        with pytest.raises(AssertionError, match="matrices: expected float32"):
            run(matrices)


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 1), (1, 3, 1)])
def test_assertion_names_a_bad_right_hand_side(shape):
    with pytest.raises(AssertionError, match="rhs: expected float32"):
        solve.spd_solve(torch.ones(2, 3, 3, device=DEVICE), torch.ones(shape, device=DEVICE))
