"""Tests of DoRA's kernels against float64, in Triton's interpreter (natively on a CUDA machine)."""

from __future__ import annotations

import pytest
import torch
from launching import DEVICE, poisoned_empty, randn

from lora_fast.kernels import tiles
from lora_fast.kernels.linear import dora

pytestmark = pytest.mark.gpu

FLOAT32, HALF, BFLOAT16, FLOAT64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SCALING = 1.5


def largest_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the largest relative error of an element."""
    assert got.shape == exact.shape and got.dtype is FLOAT32
    return ((got.double() - exact) / exact).abs().max().item()


def exact_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight.double() + SCALING * b.double() @ a.double(), dim=1)


NORMS = {  # dtypes of W and of the factors, r, (d_out, d_in), whether W is stored transposed, spare columns, arch
    "float32": (FLOAT32, FLOAT32, 5, (70, 150), False, 0, 80),
    "float32 transposed": (FLOAT32, FLOAT32, 16, (64, 96), True, 0, 80),
    "float32, 16-bit factors": (FLOAT32, BFLOAT16, 7, (33, 70), False, 3, 80),
    "bfloat16": (BFLOAT16, BFLOAT16, 16, (64, 256), False, 0, 90),
    "bfloat16 transposed": (BFLOAT16, BFLOAT16, 17, (37, 131), True, 5, 90),
    "bfloat16, float32 factors": (BFLOAT16, FLOAT32, 8, (40, 300), False, 0, 90),
    "bfloat16 transposed, float32 factors": (BFLOAT16, FLOAT32, 33, (40, 72), True, 0, 90),
    "float16": (HALF, HALF, 3, (1, 37), False, 3, 89),
    "float16, float32 factors": (HALF, FLOAT32, 100, (37, 65), False, 0, 89),
    "rank 1": (BFLOAT16, FLOAT32, 1, (33, 1), False, 0, 90),
    "rank 256": (BFLOAT16, FLOAT32, 256, (33, 65), False, 3, 90),
    "rank 256, float32": (FLOAT32, FLOAT32, 256, (33, 40), True, 3, 90),
}


@pytest.mark.parametrize("dtype, factor, r, shape, transposed, padding, arch", NORMS.values(), ids=NORMS)
def test_norms_of_the_adapted_weight(dtype, factor, r, shape, transposed, padding, arch):
    """The product is of W's size, so that a factor that were rounded to 16 bits would show."""
    (d_out, d_in), matrix = shape, lambda rows, columns, dtype: randn(rows, columns + padding, dtype=dtype)[:, :columns]
    weight = matrix(d_in, d_out, dtype).t() if transposed else matrix(d_out, d_in, dtype)
    a, b = matrix(r, d_in, factor), (randn(d_out, r + padding, seed=1) / r**0.5).to(factor)[:, :r]
    operands = [tensor.clone() for tensor in (weight, a, b)]
    with tiles.assume(arch=None if DEVICE.type == "cuda" else arch), poisoned_empty():
        norms = dora.weight_norms(weight, a, b, SCALING)
        again = dora.weight_norms(weight, a, b, SCALING)
    assert all(map(torch.equal, operands, (weight, a, b))) and torch.equal(norms, again)
    allowed = 2e-5 if dtype is not FLOAT32 and factor is FLOAT32 else 1e-6
    assert largest_error(norms, exact_norms(weight, a, b)) < allowed


def test_norms_of_factors_with_other_strides_and_dtypes_of_their_own():
    weight, a, b = randn(33, 40, dtype=BFLOAT16), randn(40, 6).t(), randn(6, 33, dtype=BFLOAT16).t()
    norms = dora.weight_norms(weight, a, b, SCALING)
    assert largest_error(norms, exact_norms(weight, a, b)) < 2e-5


def test_norms_of_values_that_float16_cannot_hold():
    """Squares of a float16 weight are beyond float16, and float32 factors beside it may be, too."""
    weight, a, b = randn(5, 70, dtype=HALF) * 300, randn(3, 70) * 1e-9, randn(5, 3) * 1e12
    assert largest_error(dora.weight_norms(weight, a, b, SCALING), exact_norms(weight, a, b)) < 2e-5
    zero = torch.zeros_like(weight)
    assert dora.weight_norms(zero, zero[:3], b.mT[:, :5].mT[:, :3], SCALING).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_norms_of_a_weight_without_elements_are_zero(shape):
    weight, a, b = randn(*shape), randn(2, shape[1]), randn(shape[0], 2)
    assert torch.equal(dora.weight_norms(weight, a, b, 1.0), torch.zeros(shape[0], device=DEVICE))


SCALES = {  # dtype of u, of the bias, shape of u, spare columns
    "float32": (FLOAT32, FLOAT32, (33, 40), 0),
    "float32 without bias": (FLOAT32, None, (3, 5, 300), 0),
    "float16": (HALF, HALF, (2, 35, 64), 0),
    "bfloat16, float32 bias": (BFLOAT16, FLOAT32, (70, 257), 7),
    "bfloat16": (BFLOAT16, BFLOAT16, (1, 1), 0),
    "one token": (BFLOAT16, None, (4096,), 0),
    "partial sums": (BFLOAT16, None, (290, 70), 2),
    "float32 partial sums": (FLOAT32, None, (3, 150, 35), 1),
    "float16, float32 bias": (HALF, FLOAT32, (5, 1030), 0),
}


def rounded_once(exact: torch.Tensor, got: torch.Tensor, dtype: torch.dtype, size: torch.Tensor) -> bool:
    """Returns whether a result is one rounding of the exact one, apart from float32 rounding of terms of ``size``."""
    assert got.dtype is dtype and got.shape == exact.shape and got.is_contiguous()
    to = torch.finfo(dtype)
    allowed = exact.abs().clamp(min=to.smallest_normal) * (to.eps / 2) + 2 * torch.finfo(FLOAT32).eps * size
    return bool(((got.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype, of_bias, shape, padding", SCALES.values(), ids=SCALES)
def test_column_scale_and_its_gradients(dtype, of_bias, shape, padding):
    draw = lambda seed: randn(*shape[:-1], shape[-1] + padding, seed=seed, dtype=dtype)[..., : shape[-1]]
    u, dy, scale = draw(0), draw(1), randn(shape[-1], seed=2)
    bias = None if of_bias is None else randn(shape[-1], seed=3, dtype=of_bias)
    operands = [tensor.clone() for tensor in (u, dy, scale)]
    with poisoned_empty():
        y = dora.column_scale(u, scale, bias)
        du, dscale = dora.column_scale_backward(dy, u, scale, True, True)
        alone = dora.column_scale_backward(dy, u, scale, False, True)
        du_alone = dora.column_scale_backward(dy, u, scale, True, False)
    assert all(map(torch.equal, operands, (u, dy, scale)))
    scaled = scale.double() * u.double()
    plus = torch.zeros_like(scaled) if bias is None else bias.double().expand_as(scaled)
    assert rounded_once(scaled + plus, y, dtype, scaled.abs() + plus.abs())
    exact_du = scale.double() * dy.double()
    assert rounded_once(exact_du, du, dtype, exact_du.abs())
    products = (dy.double() * u.double()).reshape(-1, shape[-1])
    assert dscale.dtype is FLOAT32 and dscale.shape == (shape[-1],)
    assert ((dscale.double() - products.sum(0)).abs() <= 4e-7 * products.abs().sum(0)).all()
    assert alone[0] is None and torch.equal(alone[1], dscale)
    assert du_alone[1] is None and torch.equal(du_alone[0], du)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,)])
def test_column_scale_of_no_elements(shape):
    u, scale = randn(*shape), randn(shape[-1])
    assert dora.column_scale(u, scale, scale).shape == u.shape
    du, dscale = dora.column_scale_backward(u, u, scale, True, True)
    assert du.shape == u.shape and torch.equal(dscale, torch.zeros_like(scale))


def test_values_that_are_not_finite_stay_in_their_column():
    u = randn(40, 24, dtype=HALF)
    u[3, 2], u[4, 5] = torch.nan, torch.inf
    y = dora.column_scale(u, torch.full((24,), 2.0, device=DEVICE), None)
    assert torch.equal(y.isfinite(), u.isfinite())
    _, dscale = dora.column_scale_backward(torch.ones_like(u), u, torch.ones(24, device=DEVICE), True, True)
    assert (~dscale.isfinite()).nonzero().flatten().tolist() == [2, 5]
