"""The kernels of iLoRA and scale regularization against their twins in float64, through Triton's interpreter (natively
on a CUDA machine)."""

import pytest
import torch
from budget import check, error

from lora_fast.kernels.pairs import regularizers
from lora_fast.ops.reference import pairs as reference

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # numpy warns about a pair of zeros
FLOAT32 = torch.float32


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make_grams(n, r, seed=0):
    a, b = randn(n, r, 2 * r + 3, seed=seed), randn(n, 3 * r + 1, r, seed=seed + 1)
    return a @ a.mT, b.mT @ b


@pytest.mark.parametrize("in_memory", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("r", [1, 3, 64, 100])
def test_imbalance_matches_the_twin(r, in_memory):
    ka, kb = make_grams(3, r)
    kb[1], ka[1] = 0, 0
    rho, lrs = torch.tensor([0.1, 0.5, 2.0]), (1e-2, 1e3)  # b's rate is so large that h is clipped
    lrs = tuple(torch.tensor(lr) for lr in lrs) if in_memory else lrs
    got = regularizers.imbalance(ka, kb, rho, *lrs, 0.5)
    exact = reference.imbalance(ka.double(), kb.double(), rho.double(), 1e-2, 1e3, 0.5)
    check("matrices", got, exact, error(reference.imbalance(ka, kb, rho, 1e-2, 1e3, 0.5), exact), FLOAT32)
    assert got[[1, 4]].eq(0).all() and got.isfinite().all()


@pytest.mark.parametrize("r", [1, 3, 100])
def test_scale_reg_matches_the_twin(r):
    ka, kb = make_grams(3, r)
    ka[1], kb[2] = 0, 0
    sizes = torch.tensor([100.0, 50.0, 7.0]), torch.tensor([3.0, 5.0, 11.0])
    got = regularizers.scale_reg(ka, kb, *sizes, 0.01, 1e-6)
    exact = reference.scale_reg(ka.double(), kb.double(), *(x.double() for x in sizes), 0.01, 1e-6)
    check("c", got, exact, error(reference.scale_reg(ka, kb, *sizes, 0.01, 1e-6), exact), FLOAT32)
    assert got[[1, 4]].eq(0).all()


def test_nan_affects_only_its_pair():
    ka, kb = make_grams(3, 5)
    clean = regularizers.imbalance(ka, kb, torch.ones(3), 0.1, 0.1, 0.5)
    ka[1, 2, :] = ka[1, :, 2] = float("nan")
    got = regularizers.imbalance(ka, kb, torch.ones(3), 0.1, 0.1, 0.5)
    assert got[[1, 4], 2].isnan().all() and torch.equal(got[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])
    got = regularizers.scale_reg(ka, kb, torch.ones(3), torch.ones(3), 0.01, 1e-6)
    assert got.isnan().tolist() == [False, True, False] * 2


def test_regularizers_accept_no_pairs():
    empty = torch.empty(0, 4, 4)
    assert regularizers.imbalance(empty, empty, torch.empty(0), 0.1, 0.1, 0.5).shape == (0, 4, 4)
    assert regularizers.scale_reg(empty, empty, torch.empty(0), torch.empty(0), 0.1, 0.1).shape == (0,)
