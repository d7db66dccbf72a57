"""A plain adapter as norm-bounded free parameters: every product within the bound has them, none outside."""

import pytest
import torch

import lora_fast as lf
from lora_fast.layers.nb_lora import NORMS, NBLoRALinear

SHAPES = {  # rank of the adapter, d_in, d_out, r
    "plain": (4, 10, 12, 4),
    "lower rank": (3, 10, 12, 5),
    "higher rank, of product 3": (8, 10, 3, 4),
    "r = d_in": (4, 4, 12, 4),
    "r > d_out": (8, 10, 3, 8),
    "square": (8, 8, 8, 8),
    "wide": (16, 64, 48, 16),
    "one": (1, 1, 1, 1),
}
BOUND = 2.0


def adapter(k, d_in, d_out, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
    return draw(k, d_in), draw(d_out, k)


def size(singular, norm, r, learn_scale) -> float:
    """Returns the value that is compared with the bound: the norm, with fixed shares that of r times the largest."""
    if not learn_scale or norm == "spectral":
        return singular[0].item() * r ** NORMS[norm]
    return singular.norm(1 / NORMS[norm]).item()


@pytest.mark.parametrize("used", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("learn_scale", [True, False], ids=["learnt", "fixed"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_free_parameters_reproduce_the_product(shape, norm, learn_scale, used):
    """The error is within the rounding of a few products, in float64 and in float32."""
    k, d_in, d_out, r = SHAPES[shape]
    a, b = adapter(k, d_in, d_out)
    scaling = used * BOUND / size(torch.linalg.svdvals(b @ a), norm, r, learn_scale)
    for dtype in (torch.float64, torch.float32):
        layer = NBLoRALinear(d_in, d_out, r=r, norm=norm, bound=BOUND, learn_scale=learn_scale, dtype=dtype)
        layer.load_free_(*layer.free_parameters_for(a, b, scaling))
        a_of_layer, b_of_layer = (x.double() for x in layer.plain_factors())
        assert (b_of_layer @ a_of_layer - scaling * b @ a).norm() <= 64 * torch.finfo(dtype).eps * (
            scaling * b @ a
        ).norm()


@pytest.mark.parametrize("used", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("learn_scale", [True, False], ids=["learnt", "fixed"])
@pytest.mark.parametrize("norm", NORMS)
def test_free_parameters_reproduce_the_product_over_a_16_bit_weight(norm, learn_scale, used):
    """A product that rounding would take beyond the bound is made smaller, in all directions alike."""
    a, b = adapter(4, 10, 12)
    scaling = used * BOUND / size(torch.linalg.svdvals(b @ a), norm, 4, learn_scale)
    layer = NBLoRALinear(10, 12, r=4, norm=norm, bound=BOUND, learn_scale=learn_scale)
    layer.weight.data = layer.weight.data.bfloat16()
    layer.load_free_(*layer.free_parameters_for(a, b, scaling))
    share = min(1.0, layer.applied_bound / BOUND / used)
    assert 0.9 * BOUND < layer.applied_bound < BOUND
    expected = share * scaling * b @ a
    a_of_layer, b_of_layer = (x.double() for x in layer.plain_factors())
    assert (b_of_layer @ a_of_layer - expected).norm() <= 64 * torch.finfo(torch.float32).eps * expected.norm()


def test_free_parameters_reproduce_a_trained_layer():
    layer = NBLoRALinear(10, 12, r=4, bound=BOUND, dtype=torch.float64)
    with torch.no_grad():
        for name in layer.TRAINABLE:
            getattr(layer, name).normal_()
    a, b = layer.plain_factors()
    layer.load_free_(*layer.free_parameters_for(a, b))
    again_a, again_b = layer.plain_factors()
    torch.testing.assert_close(again_b @ again_a, b @ a)


@pytest.mark.parametrize(
    "norm, learn_scale, scaling, message",
    [
        ("spectral", True, 1.0, r"singular values of at most 2, got singular values [\d., ]+$"),
        ("nuclear", True, 1.0, r"a nuclear norm of at most 2, got singular values [\d., ]+$"),
        ("frobenius", True, 1.0, r"a Frobenius norm of at most 2, got singular values [\d., ]+$"),
        ("nuclear", False, 1.0, r"singular values of at most 0\.5, got singular values [\d., ]+$"),
        ("nuclear", True, float("nan"), "finite"),
    ],
    ids=["spectral", "nuclear", "frobenius", "fixed", "nan"],
)
def test_norm_above_the_bound_is_refused(norm, learn_scale, scaling, message):
    a, b = adapter(4, 10, 12)
    layer = NBLoRALinear(10, 12, r=4, norm=norm, bound=BOUND, learn_scale=learn_scale)
    with pytest.raises(lf.ArgumentError, match=f"^adapter: expected .*{message}"):
        layer.free_parameters_for(a * scaling, b)


def test_error_lists_only_singular_values_above_the_bound():
    a = torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.5]))
    layer = NBLoRALinear(4, 4, r=4, norm="spectral", bound=BOUND)
    with pytest.raises(lf.ArgumentError, match=r"got singular values 5, 3$"):
        layer.free_parameters_for(a, torch.eye(4))


def test_rank_above_r_is_refused():
    a, b = adapter(8, 10, 12)
    with pytest.raises(lf.ArgumentError, match=r"^adapter: expected a product of rank at most 4, got singular values "):
        NBLoRALinear(10, 12, r=4, bound=1e6).free_parameters_for(a, b)
