"""The r×r algebra that is torch on every device: balanced factors have equal Grams and the same product."""

import pytest
import torch
from method_runs import layer_with_gradients

from lora_fast import functional as F
from lora_fast.ops import pairs


@pytest.mark.parametrize("gauge", ["symmetric", "svd", "svd_signed"])
def test_hyperbalance_equalises_grams_and_keeps_the_product(gauge):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for seed in range(10):
            layer, *_ = layer_with_gradients(seed, r=4, d_in=20, d_out=30)
            a, b = layer.a.to(dtype) / 50, layer.b.to(dtype) * 3
            new_a, new_b = F.hyperbalance(a, b, gauge)
            want = b.double() @ a.double()
            assert (new_b.double() @ new_a.double() - want).norm() <= tolerance * want.norm()
            ka, kb = new_a @ new_a.T, new_b.T @ new_b
            assert (ka - kb).norm() <= tolerance * ka.norm()
            if gauge != "symmetric":
                assert (ka - ka.diagonal().diag()).norm() <= tolerance * ka.norm()
    assert torch.equal(F.hyperbalance(a, torch.zeros_like(b), gauge)[0], a)
    thin = b.clone()
    thin[:, 2:] = thin[:, :2]  # rank 2 of 4: the product stays
    new_a, new_b = F.hyperbalance(a, thin, gauge)
    assert (new_b @ new_a - thin @ a).norm() <= 1e-3 * (thin @ a).norm()


@pytest.mark.parametrize("r", [1, 4, 16])
def test_refactor_solves_its_equation(r):
    """S Kb S = Ka, S is symmetric and positive definite, and T Tᵀ for BaLoRA's symmetric T."""
    draw = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    a, b = draw(5, r, 40, seed=0), draw(5, 30, r, seed=1) * 1e-3
    ka, kb, *_ = pairs.grams(a, b)
    s, s_inverse = pairs.refactor(ka, kb)
    t, _ = pairs.hyperbalance(ka, kb)
    assert (s @ kb @ s - ka).abs().max() <= 1e-12 * ka.abs().max()
    assert (s @ s_inverse - torch.eye(r, dtype=s.dtype)).abs().max() <= 1e-11
    assert (s - s.mT).abs().max() <= 1e-12 * s.abs().max() and torch.linalg.eigvalsh(s).min() > 0
    assert (t @ t.mT - s).abs().max() <= 1e-12 * s.abs().max()
