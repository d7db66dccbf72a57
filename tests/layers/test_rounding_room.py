"""The room that 16-bit products need below a bound, against rounding as torch does it."""

import pytest
import torch

import lora_fast as lf
from lora_fast.layers.rounding_room import usable_bound

POWERS = {"spectral": 0.0, "frobenius": 0.5, "nuclear": 1.0}
SIZES = {"spectral": lambda s: s[0], "frobenius": lambda s: s.norm(), "nuclear": lambda s: s.sum()}


def test_float32_and_float64_need_no_room():
    assert all(usable_bound(dtype, 0.3, 1.0, (4096, 4096), 1) == 0.3 for dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [1, 4, 16, 64])
@pytest.mark.parametrize("d_out, d_in", [(32, 32), (48, 512), (64, 64), (256, 256), (128, 400)])
def test_rounded_products_stay_within_the_bound(d_out, d_in, r, dtype):
    """Factors and output are rounded, for equal singular values, which may be fixed, and for few large ones."""
    if r > min(d_out, d_in):
        return
    generator = torch.Generator().manual_seed(0)
    orthogonal = lambda d: torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))[0]
    for large in sorted({1, min(2, r), r}):
        sv = torch.full((r,), 1e-3, dtype=torch.float64)
        sv[:large] = 1 + torch.rand((), generator=generator)
        a, b = orthogonal(d_in).T / 2**0.5, orthogonal(d_out) * 2**0.5 * sv
        product = (b.to(dtype).float() @ a.to(dtype).float()).to(dtype)
        singular = torch.linalg.svdvals(product.double())
        for norm, size in SIZES.items():
            for equal_values in {1, r if large == r else 1}:
                bound = size(singular)
                usable = usable_bound(dtype, bound, POWERS[norm], (d_in, d_out), equal_values)
                assert usable <= size(sv.sort(descending=True).values), (norm, large, equal_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_entries_that_round_alike_stay_within_the_bound(dtype):
    """All entries of a, of b and of the product have one value, just above the middle of two 16-bit numbers."""
    unit = torch.finfo(dtype).eps / 2
    a = torch.full((1, 64), 1 + 1.01 * unit, dtype=torch.float64)
    b = torch.full((48, 1), (1 + 2 * unit + 1.01 * unit) / 8, dtype=torch.float64)
    product = (b.to(dtype).float() @ a.to(dtype).float()).to(dtype).double()
    excess = (product.norm() / (b @ a).norm()).item()
    assert 1 + unit < excess <= 1 / usable_bound(dtype, 1.0, 0.0, (64, 48), 1)


@pytest.mark.parametrize("norm", SIZES)
@pytest.mark.parametrize("bound", [0.1, 1e-2, 1e-3])
def test_small_bounds_hold_in_float16(bound, norm):
    """Entries of ΔW below float16's normal numbers are rounded to multiples of 2⁻²⁴."""
    torch.manual_seed(0)
    layer = lf.NBLoRALinear(256, 192, r=8, norm=norm, bound=bound, bias=False).half()
    a, b = (torch.linalg.qr(torch.randn(d, 8, dtype=torch.float64))[0] for d in (256, 192))
    each = bound / 8 ** POWERS[norm] * (1 - 1e-7)
    layer.load_free_(*layer.free_parameters_for(a.T, b * each))
    with torch.no_grad():
        layer.weight.zero_()
        product = layer(torch.eye(256, dtype=torch.float16))
    assert 0.4 * bound < SIZES[norm](torch.linalg.svdvals(product.double())) <= bound
