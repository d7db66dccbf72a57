"""The room that 16-bit products need below a bound, against rounding as torch does it."""

import pytest
import torch

from lora_fast.layers.rounding_room import usable_share

SIZES = {"spectral": lambda s: s[0], "frobenius": lambda s: s.norm(), "nuclear": lambda s: s.sum()}


def test_float32_and_float64_need_no_room():
    assert all(usable_share(dtype, True, 4096, 1) == 1.0 for dtype in (torch.float32, torch.float64))


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
                share = usable_share(dtype, norm == "nuclear", min(d_out, d_in), equal_values)
                assert share * size(singular) <= size(sv.sort(descending=True).values), (norm, large, equal_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_entries_that_round_alike_stay_within_the_bound(dtype):
    """All entries of a, of b and of the product have one value, just above the middle of two 16-bit numbers."""
    unit = torch.finfo(dtype).eps / 2
    a = torch.full((1, 64), 1 + 1.01 * unit, dtype=torch.float64)
    b = torch.full((48, 1), (1 + 2 * unit + 1.01 * unit) / 8, dtype=torch.float64)
    product = (b.to(dtype).float() @ a.to(dtype).float()).to(dtype).double()
    excess = (product.norm() / (b @ a).norm()).item()
    assert 1 + unit < excess <= 1 / usable_share(dtype, False, 48, 1)
