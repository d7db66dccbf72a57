"""Tests of DoRA's kernels against float64, in Triton's interpreter (natively on a CUDA machine)."""

from __future__ import annotations

import pytest
import torch
from launching import DEVICE, poisoned_empty, randn, size

from lora_fast.kernels import dora, tiles
from lora_fast.kernels.inspection import interpreter

pytestmark = pytest.mark.gpu

FLOAT32, HALF, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
SCALING = 1.5


def largest_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the largest relative error of an element."""
    assert got.shape == exact.shape
    return ((got.double() - exact) / exact).abs().max().item()


def exact_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight.double() + SCALING * b.double() @ a.double(), dim=1)


def allowed_error(dtype: torch.dtype, factor: torch.dtype) -> float:
    """Returns the error of products of halves, or of the sums, and of the rounding to the factors' dtype."""
    return (2e-5 if dtype is not FLOAT32 and factor is FLOAT32 else 3e-7) + torch.finfo(factor).eps / 2


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
    exact = exact_norms(weight, a, b)
    assert norms.dtype is factor and largest_error(norms, exact) < allowed_error(dtype, factor)


def test_norms_of_factors_with_other_strides_and_dtypes_of_their_own():
    weight, a, b = randn(33, 40, dtype=BFLOAT16), randn(40, 6).t(), randn(6, 33, dtype=BFLOAT16).t()
    norms = dora.weight_norms(weight, a, b, SCALING)
    assert largest_error(norms, exact_norms(weight, a, b)) < 2e-5


def test_norms_of_values_that_float16_cannot_hold():
    """Squares of a float16 weight are beyond float16, and float32 factors beside it may be, too."""
    weight, a, b = randn(5, 70, dtype=HALF) * 300, randn(3, 70) * 1e-9, randn(5, 3) * 1e12
    assert largest_error(dora.weight_norms(weight, a, b, SCALING), exact_norms(weight, a, b)) < 2e-5
    assert dora.weight_norms(torch.zeros_like(weight), torch.zeros_like(a), b, SCALING).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_norms_of_a_weight_without_elements_are_zero(shape):
    weight, a, b = randn(*shape), randn(2, shape[1]), randn(shape[0], 2)
    assert torch.equal(dora.weight_norms(weight, a, b, 1.0), torch.zeros(shape[0], device=DEVICE))


SCALES = {  # dtypes of u, of the bias and of magnitude and norms, shape of u, spare columns
    "float32": (FLOAT32, FLOAT32, FLOAT32, (33, 40), 0),
    "float32 without bias": (FLOAT32, None, FLOAT32, (3, 5, 300), 0),
    "float16": (HALF, HALF, HALF, (2, 35, 64), 0),
    "bfloat16, float32 bias": (BFLOAT16, FLOAT32, FLOAT32, (70, 257), 7),
    "bfloat16": (BFLOAT16, BFLOAT16, BFLOAT16, (1, 1), 0),
    "one token": (BFLOAT16, None, FLOAT32, (4096,), 0),
    "partial sums": (BFLOAT16, None, BFLOAT16, (590, 70), 2),
    "float32 partial sums": (FLOAT32, None, FLOAT32, (3, 250, 35), 1),
    "float16, float32 bias": (HALF, FLOAT32, FLOAT32, (5, 1030), 0),
}


def rounded_once(exact: torch.Tensor, got: torch.Tensor, dtype: torch.dtype, size: torch.Tensor) -> bool:
    """Returns whether a result is one rounding of the exact one, apart from float32 rounding of terms of ``size``."""
    assert got.dtype is dtype and got.shape == exact.shape and got.is_contiguous()
    to = torch.finfo(dtype)
    allowed = exact.abs().clamp(min=to.smallest_normal) * (to.eps / 2) + 4e-7 * size
    return bool(((got.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype, of_bias, of_scale, shape, padding", SCALES.values(), ids=SCALES)
def test_column_scale_and_its_gradients(dtype, of_bias, of_scale, shape, padding):
    d_out = shape[-1]
    draw = lambda seed: randn(*shape[:-1], d_out + padding, seed=seed, dtype=dtype)[..., :d_out]
    u, dy = draw(0), draw(1)
    magnitude, norms = randn(d_out, seed=2, dtype=of_scale), randn(d_out, seed=4).abs().add(0.5).to(of_scale)
    bias = None if of_bias is None else randn(2 * d_out, seed=3, dtype=of_bias)[::2]
    operands = u, dy, magnitude, norms
    before = [tensor.clone() for tensor in operands]
    with poisoned_empty():
        y = dora.column_scale(u, magnitude, norms, bias)
        du, dm = dora.column_scale_backward(dy, u, magnitude, norms, True, True)
        alone = dora.column_scale_backward(dy, u, magnitude, norms, False, True)
        du_alone = dora.column_scale_backward(dy, u, magnitude, norms, True, False)
    assert all(map(torch.equal, operands, before))
    scale = magnitude.double() / norms.double()
    scaled, exact_du = scale * u.double(), scale * dy.double()
    plus = torch.zeros_like(scaled) if bias is None else bias.double().expand_as(scaled)
    assert rounded_once(scaled + plus, y, dtype, scaled.abs() + plus.abs())
    assert rounded_once(exact_du, du, dtype, exact_du.abs())
    products = (dy.double() * u.double()).reshape(-1, d_out) / norms.double()
    assert rounded_once(products.sum(0), dm, of_scale, products.abs().sum(0))
    assert alone[0] is None and torch.equal(alone[1], dm)
    assert du_alone[1] is None and torch.equal(du_alone[0], du)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,)])
def test_column_scale_of_no_elements(shape):
    u, vector = randn(*shape), randn(shape[-1])
    assert dora.column_scale(u, vector, vector, vector).shape == u.shape
    du, dm = dora.column_scale_backward(u, u, vector, vector, True, True)
    assert du.shape == u.shape and torch.equal(dm, torch.zeros_like(vector))


def test_values_that_are_not_finite_stay_in_their_column():
    u, one = randn(40, 24, dtype=HALF), torch.ones(24, device=DEVICE)
    u[3, 2], u[4, 5] = torch.nan, torch.inf
    assert torch.equal(dora.column_scale(u, one, one, None).isfinite(), u.isfinite())
    _, dm = dora.column_scale_backward(torch.ones_like(u), u, one, one, True, True)
    assert (~dm.isfinite()).nonzero().flatten().tolist() == [2, 5]


def test_launches_and_bytes():
    """The scale is one launch each way, and one more for partial sums. Each tensor is read and written once."""
    if DEVICE.type == "cuda":
        pytest.skip("counted by the interpreter, which a CUDA machine does not use")
    u, vector = randn(600, 256, dtype=BFLOAT16), randn(256)
    with interpreter.traffic() as forward:
        dora.column_scale(u, vector, vector, vector)
    with interpreter.traffic() as backward:
        dora.column_scale_backward(u, u, vector, vector)
    assert list(forward.launches) == ["lora_column_scale_kernel"]
    assert list(backward.launches) == ["lora_column_scale_backward_kernel", "lora_sum_partials_kernel"]
    assert forward.total <= 1.2 * size(u, u, vector, vector, vector)
    assert backward.total <= 1.2 * size(u, u, u, vector, vector, vector)
    with interpreter.traffic() as backward:
        dora.column_scale_backward(randn(512, 4096), randn(512, 4096), randn(4096), randn(4096))
    assert list(backward.launches) == ["lora_column_scale_backward_kernel"]


# dtypes of x and of the factors, (n_tokens, d_in, d_out), r, bias, arch, thin products
LAYERS = {
    "float32": (FLOAT32, FLOAT32, (37, 24, 40), 4, True, 80, None),
    "bfloat16, float32 factors": (BFLOAT16, FLOAT32, (70, 64, 136), 8, True, 90, None),
    "bfloat16": (BFLOAT16, BFLOAT16, (300, 64, 72), 17, False, 90, None),
    "float16, float32 factors": (HALF, FLOAT32, (19, 33, 41), 3, True, 89, None),
    "partial sums": (BFLOAT16, FLOAT32, (600, 40, 35), 2, True, 90, None),
    "rank 100": (BFLOAT16, FLOAT32, (40, 40, 72), 100, False, 90, None),
    "one token": (FLOAT32, FLOAT32, (1, 8, 16), 1, True, 90, None),
    "by cuBLAS": (BFLOAT16, FLOAT32, (70, 64, 136), 8, True, 90, "cublas"),
    "bfloat16 by cuBLAS": (BFLOAT16, BFLOAT16, (40, 33, 72), 17, False, 90, "cublas"),
}


@pytest.mark.parametrize("dtype, factor, shape, r, has_bias, arch, thin", LAYERS.values(), ids=LAYERS)
def test_a_layer_and_its_gradients(dtype, factor, shape, r, has_bias, arch, thin):
    """Gradients of float32 factors beside 16 bits have errors of products of halves alone. One magnitude is 0."""
    n_tokens, d_in, d_out = shape
    x, dy, weight = randn(n_tokens, d_in, dtype=dtype), randn(n_tokens, d_out, seed=1, dtype=dtype), randn(d_out, d_in)
    weight, bias = weight.to(dtype), randn(d_out, seed=2, dtype=dtype) if has_bias else None
    a, b = randn(r, d_in, seed=3, dtype=factor), randn(d_out, r, seed=4, dtype=factor)
    magnitude, norms = randn(d_out, seed=5, dtype=factor), randn(d_out, seed=6).abs().add(0.5).to(factor)
    magnitude[0] = 0
    tensors = weight, a, b, magnitude, norms
    with tiles.assume(arch=None if DEVICE.type == "cuda" else arch, thin=thin), poisoned_empty():
        y, s, kept = dora.forward(x, weight, bias, *tensors[1:], SCALING)
        got = y, *dora.backward(dy, x, s, kept, *tensors, SCALING)
        again = dora.backward(dy, x, s, kept, *tensors, SCALING)
    assert all(map(torch.equal, got[1:], again))
    x, dy, weight, a, b, magnitude, norms = (tensor.double() for tensor in (x, dy, *tensors))
    scale = magnitude / norms
    u, g = x @ (weight + SCALING * b @ a).T, dy * scale
    y = u * scale + (0 if bias is None else bias.double())
    dx, da, db = g @ (weight + SCALING * b @ a), SCALING * (g @ b).T @ x, SCALING * g.T @ (x @ a.T)
    exact = {"y": y, "dx": dx, "da": da, "db": db, "dmagnitude": (dy * u).sum(0) / norms}
    for (name, wanted), result in zip(exact.items(), got, strict=True):
        rounding = torch.finfo(dtype if name in ("y", "dx", "dmagnitude") else factor).eps
        allowed = rounding + (1e-5 if dtype is not FLOAT32 else 0) + 5e-7
        difference = (result.double() - wanted).norm() / wanted.norm()
        assert result.shape == wanted.shape and difference < allowed, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("needed", range(4), ids=["x", "a", "b", "magnitude"])
def test_a_gradient_of_a_layer_alone_has_the_bits_of_all_together(needed):
    x, dy, weight, a, b = randn(33, 24), randn(33, 40, seed=1), randn(40, 24), randn(4, 24), randn(40, 4)
    magnitude, norms = randn(40, seed=2), randn(40, seed=3).abs() + 0.5
    _, s, kept = dora.forward(x, weight, None, a, b, magnitude, norms, SCALING)
    run = lambda needs: dora.backward(dy, x, s, kept, weight, a, b, magnitude, norms, SCALING, needs=needs)
    alone = run(tuple(i == needed for i in range(4)))
    assert [grad is not None for grad in alone] == [i == needed for i in range(4)]
    assert torch.equal(alone[needed], run((True,) * 4)[needed])
