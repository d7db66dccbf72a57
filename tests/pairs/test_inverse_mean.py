"""LoRA-Muon's matrices through Triton's interpreter (natively on a CUDA machine): in registers up to rank 64, in memory
above. The truth is the twin in float64, of the same float32 Grams."""

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
NAN_MEANT = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's


@pytest.fixture
def in_memory(monkeypatch):
    """Matrices of rank R are worked on in memory, as those above 64 are, which take longer to interpret."""
    monkeypatch.setattr(inverse_mean, "IN_REGISTERS", R - 1)


@pytest.fixture(params=["in registers", "in memory"])
def place(request):
    if request.param == "in memory":
        request.getfixturevalue("in_memory")


def spd(n, r, condition, seed=0):
    """Random SPD matrices with eigenvalues from 1 down to 1 / condition."""
    q = torch.linalg.qr(randn(n, r, r, seed=seed).double())[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64, device=DEVICE)
    return ((q * values) @ q.mT).float()


def exact(grams, lr_a, lr_b, damping):
    """The twin's result in float64; it may have no more damping than the kernel."""
    return twin.muon(*(gram.double() for gram in grams), lr_a, lr_b, max(damping, LEAST))


def check(grams, got, lr_a=2.0, lr_b=2.0, damping=0.0):
    """‖T^-½ (T' − T) T^-½‖₂ ≤ ε (32 + 4 κ) of every factor."""
    want = exact(grams, lr_a, lr_b, damping)
    values, q = torch.linalg.eigh(-want)
    root = (q * values.rsqrt()[:, None, :]) @ q.mT
    errors = torch.linalg.matrix_norm(root @ (got.double() - want) @ root, 2)
    ka, kb, kp, kq = (torch.linalg.eigvalsh(gram.double()).clamp(min=0) for gram in grams)
    for error, pair in zip(errors.chunk(2), ((ka, kq), (kb, kp)), strict=True):
        damped = [values + max(damping, LEAST) * values.sum(-1, keepdim=True) for values in pair]
        condition = torch.stack([values.amax(-1) / values.amin(-1) for values in damped]).amax(0)
        assert (error <= EPS * (32 + 4 * condition)).all(), (error.tolist(), condition.tolist())


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("r", [1, 4, 17, 33])
def test_muon(r, condition):
    grams = [spd(2, r, condition, seed) for seed in range(4)]
    with poisoned_empty():
        got = muon(*grams, 2.0, 2.0, 0.0)
    check(grams, got)


def test_rank_above_64():
    grams = [spd(1, 65, 1e4, seed) for seed in range(4)]
    with poisoned_empty():
        got = muon(*grams, 0.2, 0.6, 3e-4)
    check(grams, got, 0.2, 0.6, 3e-4)


@pytest.mark.budget
@pytest.mark.parametrize("r", [64, 100])
def test_large_ranks(r):
    grams = [spd(1, r, 1e6, seed) for seed in range(4)]
    check(grams, muon(*grams, 2.0, 2.0, 0.0))


def test_grams_without_full_rank(place):
    """Rank 1, half the rank, zero rows, equal Grams, a scale of 1e-20: as good as the damping lets it be."""
    one, half = (randn(1, R, k) for k in (1, R // 2))
    one, half, full = one @ one.mT, half @ half.mT, spd(1, R, 10.0)
    rows = full.clone()
    rows[:, :5], rows[:, :, :5] = 0.0, 0.0
    grams = [torch.cat(row) for row in zip(
        (one, one, one, one), (half, full, half, 1e-20 * full), (rows, rows, full, rows), (half, half, half, half),
        strict=True,
    )]  # fmt: skip
    with poisoned_empty():
        got = muon(*grams, 2.0, 2.0, 0.0)
    check(grams, got)


@NAN_MEANT
def test_zero_and_nan_stay_in_their_factor(place):
    grams = [spd(2, R, 10.0, seed) for seed in range(4)]
    clean = muon(*grams, 2.0, 2.0, 3e-4)
    _, kb, _, kq = grams
    kb[0], kq[1, 3, 4] = 0.0, float("nan")
    got = muon(*grams, 2.0, 2.0, 3e-4)
    assert got[2].eq(0).all() and got[1].isnan().all()
    assert all(torch.equal(got[i], clean[i]) for i in (0, 3))
    assert torch.equal(twin.muon(*grams, 2.0, 2.0, 3e-4).isnan(), got.isnan())


def test_learning_rates(place):
    """b's matrices have b's, a's have a's; numbers and tensors give the same bits; 0 gives 0."""
    grams = [spd(1, R, 10.0, seed) for seed in range(4)]
    for_b, for_a = muon(*grams, 0.1, 0.4, 3e-4).chunk(2)
    check(grams, torch.cat([for_b, for_a]), 0.1, 0.4, 3e-4)
    in_memory = muon(*grams, torch.tensor(0.1, device=DEVICE), 0.4, 3e-4)
    assert torch.equal(in_memory, torch.cat([for_b, for_a]))
    assert muon(*grams, 0.0, 0.0, 3e-4).eq(0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_batches(n, place):
    """One launch."""
    grams = [spd(n, R, 10.0)] * 4
    with interpreter.traffic() as counted:
        assert muon(*grams, 0.1, 0.1, 0.0).shape == (2 * n, R, R)
    if DEVICE.type == "cpu":
        assert len(counted.launches) == n


def test_more_factors_than_programs(monkeypatch, in_memory):
    """In memory, programs go through the factors: the same bits with one program as with one for each."""
    grams = [spd(1, R, 1e3, seed) for seed in range(4)]
    together = muon(*grams, 0.1, 0.2, 0.0)
    monkeypatch.setattr(inverse_mean, "SLOTS", 1)
    assert torch.equal(together, muon(*grams, 0.1, 0.2, 0.0))


def test_same_inputs_same_bits():
    grams = [spd(2, R, 1e3, seed) for seed in range(4)]
    assert torch.equal(muon(*grams, 0.1, 0.2, 0.0), muon(*grams, 0.1, 0.2, 0.0))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counted by the interpreter")
def test_traffic():
    """In registers: each Gram is read once, its diagonal once more, and each matrix is written once."""
    grams = [spd(3, R, 10.0, seed) for seed in range(4)]
    with interpreter.traffic() as counted:
        matrices = muon(*grams, 0.1, 0.1, 0.0)
    assert counted.loaded == size(*grams) + 4 * 3 * R * 4 and counted.stored == size(matrices)


@pytest.mark.parametrize("shape, dtype", [((2, 3, 4), FLOAT32), ((1, 257, 257), FLOAT32), ((2, 3, 3), torch.float64)])
def test_bad_grams_are_named(shape, dtype):
    bad, good = torch.ones(shape, dtype=dtype, device=DEVICE), torch.ones(2, 3, 3, device=DEVICE)
    with pytest.raises(ValueError, match="ka: expected float32"):
        muon(bad, bad, bad, bad, 0.1, 0.1, 0.0)
    with pytest.raises(ValueError, match="kq: expected contiguous"):
        muon(good, good, good, bad, 0.1, 0.1, 0.0)
