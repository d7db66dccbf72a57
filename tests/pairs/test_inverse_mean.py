"""The kernel of LoRA-Muon's matrices, through Triton's interpreter (natively on a CUDA machine): in registers up to
rank 64, in memory above. Results are compared with the twin in float64 on the same float32 Grams."""

import pytest
import torch
from launching import DEVICE, poisoned_empty, randn, size

from lora_fast.kernels.inspection import interpreter
from lora_fast.kernels.pairs import inverse_mean
from lora_fast.kernels.pairs.inverse_mean import muon
from lora_fast.ops.reference import pairs as twin

pytestmark = pytest.mark.gpu

FLOAT32 = torch.float32
EPS = torch.finfo(FLOAT32).eps
LEAST = 16 * EPS  # damping
R = 17
NAN_EXPECTED = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy warns in the interpreter


@pytest.fixture
def in_memory(monkeypatch):
    """Makes the kernel work on rank R in memory, as it does above rank 64, which takes longer to interpret."""
    monkeypatch.setattr(inverse_mean, "IN_REGISTERS", R - 1)


@pytest.fixture(params=["in registers", "in memory"])
def place(request):
    if request.param == "in memory":
        request.getfixturevalue("in_memory")


def spd(n, r, condition, seed=0):
    """Returns random SPD matrices with eigenvalues from 1 down to 1 / condition."""
    q = torch.linalg.qr(randn(n, r, r, seed=seed).double())[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64, device=DEVICE)
    return ((q * values) @ q.mT).float()


def exact(grams, lr_a, lr_b, damping):
    """Returns the twin's result in float64, with the kernel's least damping."""
    return twin.muon(*(gram.double() for gram in grams), lr_a, lr_b, max(damping, LEAST))


def check(grams, got, lr_a=2.0, lr_b=2.0, damping=0.0):
    """Checks ‖T^-½ (T' − T) T^-½‖₂ ≤ ε (32 + 4 κ) for every factor."""
    want = exact(grams, lr_a, lr_b, damping)
    values, q = torch.linalg.eigh(-want)
    root = (q * values.rsqrt()[:, None, :]) @ q.mT
    errors = torch.linalg.matrix_norm(root @ (got.double() - want) @ root, 2)
    ka, kb, kp, kq = (torch.linalg.eigvalsh(gram.double()).clamp(min=0) for gram in grams)
    for error, pair in zip(errors.chunk(2), ((ka, kq), (kb, kp)), strict=True):
        damped = [values + max(damping, LEAST) * values.sum(-1, keepdim=True) for values in pair]
        condition = torch.stack([values.amax(-1) / values.amin(-1) for values in damped]).amax(0)
        assert (error <= EPS * (32 + 4 * condition)).all(), (error.tolist(), condition.tolist())


BOUNDS = [(r, condition) for r in (1, 4, 17) for condition in (1.0, 1e2, 1e4, 1e6)]
BOUNDS += [pytest.param(33, condition, marks=pytest.mark.budget) for condition in (1.0, 1e2, 1e4)]


@pytest.mark.parametrize("r, condition", [*BOUNDS, (33, 1e6)])
def test_muon_is_within_its_error_bound(r, condition):
    grams = [spd(2, r, condition, seed) for seed in range(4)]
    with poisoned_empty():
        got = muon(*grams, 2.0, 2.0, 0.0)
    check(grams, got)


@pytest.mark.budget
def test_muon_is_within_its_error_bound_above_rank_64():
    grams = [spd(1, 65, 1e4, seed) for seed in range(4)]
    with poisoned_empty():
        got = muon(*grams, 0.2, 0.6, 3e-4)
    check(grams, got, 0.2, 0.6, 3e-4)


@pytest.mark.budget
@pytest.mark.parametrize("r", [64, 100])
def test_muon_is_within_its_error_bound_at_large_ranks(r):
    grams = [spd(1, r, 1e6, seed) for seed in range(4)]
    check(grams, muon(*grams, 2.0, 2.0, 0.0))


def test_muon_is_within_its_error_bound_without_full_rank(place):
    """The Grams have rank 1, half the rank, zero rows, are equal, or have a scale of 1e-20."""
    rank_1, half = (randn(1, R, k) for k in (1, R // 2))
    rank_1, half, full = rank_1 @ rank_1.mT, half @ half.mT, spd(1, R, 10.0)
    rows = full.clone()
    rows[:, :5], rows[:, :, :5] = 0.0, 0.0
    grams = [
        torch.cat(row)
        for row in zip(
            (rank_1, rank_1, rank_1, rank_1),
            (half, full, half, 1e-20 * full),
            (rows, rows, full, rows),
            (half, half, half, half),
            strict=True,
        )
    ]
    with poisoned_empty():
        got = muon(*grams, 2.0, 2.0, 0.0)
    check(grams, got)


@NAN_EXPECTED
def test_zero_and_nan_grams_affect_only_their_factor(place):
    grams = [spd(2, R, 10.0, seed) for seed in range(4)]
    clean = muon(*grams, 2.0, 2.0, 3e-4)
    _, kb, _, kq = grams
    kb[0], kq[1, 3, 4] = 0.0, float("nan")
    got = muon(*grams, 2.0, 2.0, 3e-4)
    assert got[2].eq(0).all() and got[1].isnan().all()
    assert all(torch.equal(got[i], clean[i]) for i in (0, 3))
    assert torch.equal(twin.muon(*grams, 2.0, 2.0, 3e-4).isnan(), got.isnan())


def test_learning_rates_apply_to_their_side(place):
    """Numbers and tensors give the same bits; a rate of 0 gives 0."""
    grams = [spd(1, R, 10.0, seed) for seed in range(4)]
    for_b, for_a = muon(*grams, 0.1, 0.4, 3e-4).chunk(2)
    check(grams, torch.cat([for_b, for_a]), 0.1, 0.4, 3e-4)
    in_memory = muon(*grams, torch.tensor(0.1, device=DEVICE), 0.4, 3e-4)
    assert torch.equal(in_memory, torch.cat([for_b, for_a]))
    assert muon(*grams, 0.0, 0.0, 3e-4).eq(0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_batch_takes_one_launch(n, place):
    grams = [spd(n, R, 10.0)] * 4
    with interpreter.traffic() as counted:
        assert muon(*grams, 0.1, 0.1, 0.0).shape == (2 * n, R, R)
    if DEVICE.type == "cpu":
        assert len(counted.launches) == n


def test_one_program_gives_the_bits_of_many(monkeypatch, in_memory):
    """Programs that work in memory loop over the factors."""
    grams = [spd(1, R, 1e3, seed) for seed in range(4)]
    together = muon(*grams, 0.1, 0.2, 0.0)
    monkeypatch.setattr(inverse_mean, "SLOTS", 1)
    assert torch.equal(together, muon(*grams, 0.1, 0.2, 0.0))


def test_same_inputs_give_the_same_bits():
    grams = [spd(2, R, 1e3, seed) for seed in range(4)]
    assert torch.equal(muon(*grams, 0.1, 0.2, 0.0), muon(*grams, 0.1, 0.2, 0.0))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counted by the interpreter")
def test_traffic_in_registers_is_minimal():
    """Each Gram is read once, its diagonal once more, and each matrix is written once."""
    grams = [spd(3, R, 10.0, seed) for seed in range(4)]
    with interpreter.traffic() as counted:
        matrices = muon(*grams, 0.1, 0.1, 0.0)
    assert counted.loaded == size(*grams) + 4 * 3 * R * 4 and counted.stored == size(matrices)


@pytest.mark.parametrize("shape, dtype", [((2, 3, 4), FLOAT32), ((1, 257, 257), FLOAT32), ((2, 3, 3), torch.float64)])
def test_muon_names_bad_grams(shape, dtype):
    bad, good = torch.ones(shape, dtype=dtype, device=DEVICE), torch.ones(2, 3, 3, device=DEVICE)
    with pytest.raises(AssertionError, match="ka: expected float32"):
        muon(bad, bad, bad, bad, 0.1, 0.1, 0.0)
    with pytest.raises(AssertionError, match="kq: expected contiguous"):
        muon(good, good, good, bad, 0.1, 0.1, 0.0)
