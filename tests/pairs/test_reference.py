"""The torch twins of the adapter step's ops: solves and inverses by residuals, batch by batch."""

import math

import pytest
import torch

from lora_fast import functional as F
from lora_fast.ops.reference import pairs as reference


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spd(count, r, condition, seed=0, dtype=torch.float64):
    """Symmetric matrices with eigenvalues from 1 down to 1 / condition."""
    q, _ = torch.linalg.qr(torch.randn(count, r, r, generator=generator(seed), dtype=torch.float64))
    values = condition ** -torch.linspace(0, 1, r, dtype=torch.float64) if r > 1 else torch.ones(1, dtype=torch.float64)
    m = (q * values) @ q.mT
    return (0.5 * (m + m.mT)).to(dtype)


@pytest.mark.parametrize("r, condition", [(1, 1.0), (4, 1e6), (16, 1e6), (16, 1e2), (33, 1e4)])
def test_spd_solve_has_a_small_residual(r, condition):
    m = spd(2_500, r, condition, dtype=torch.float32)
    rhs = torch.randn(2_500, r, 3, generator=generator(1))
    x, info = F.spd_solve(m, rhs)
    assert (info == 0).all()
    m, rhs, x = m.double(), rhs.double(), x.double()
    norm = torch.linalg.matrix_norm(m, 1)
    residual = torch.linalg.vector_norm(rhs - m @ x, ord=1, dim=1).amax(-1)
    ratio = residual / (norm * torch.linalg.vector_norm(x, ord=1, dim=1).amax(-1) * r * torch.finfo(torch.float32).eps)
    assert ratio.max() <= 5  # LAPACK's own test allows 30


def test_spd_solve_isolates_a_matrix_that_is_not_positive_definite():
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
def test_solves_take_batches_of_any_size(count):
    m, rhs = spd(1, 4, 10.0, dtype=torch.float32).expand(count, 4, 4), torch.ones(count, 4, 1)
    x, info = F.spd_solve(m, rhs)
    inverse = F.small_inverse(m + torch.eye(4))
    assert x.shape == (count, 4, 1) and info.shape == (count,) and inverse.shape == (count, 4, 4)
    assert torch.equal(x, x[:1].expand_as(x)) and torch.equal(inverse, inverse[:1].expand_as(inverse))


def test_small_inverse_has_a_small_residual():
    skew = torch.randn(50, 8, 8, generator=generator(2)) * 5
    m = torch.eye(8) + spd(50, 8, 10.0, seed=3, dtype=torch.float32) + skew - skew.mT
    error = torch.linalg.matrix_norm(m.double() @ F.small_inverse(m).double() - torch.eye(8), 1)
    assert error.max() <= 12 * 8 * torch.finfo(torch.float32).eps * 10


def test_inverse_mean_solves_its_equations():
    """T X T = Y⁻¹ and T Y T = X⁻¹."""
    x, y = (torch.randn(5, 6, 20, generator=generator(i), dtype=torch.float64) for i in range(2))
    x, y = x @ x.mT, y @ y.mT
    t = reference.inverse_mean(x, y, 0.0)
    eye = torch.eye(6, dtype=torch.float64)
    assert (t @ x @ t @ y - eye).abs().max() <= 1e-12 and (t @ y @ t @ x - eye).abs().max() <= 1e-12
