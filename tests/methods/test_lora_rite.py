"""LoRA-RITE runs in torch on both backends. iLoRA after it changes its product in second order."""

import pytest
import torch
from adapter_pairs import bits, pairs, same, train
from method_runs import Ours, run

import lora_fast as lf
from lora_fast import methods as M


@pytest.mark.parametrize("ratio, order", [(1.0, 2), (0.5, 1)], ids=["equal shares", "b half of a"])
def test_ilora_after_lora_rite_moves_the_product_by_its_formula(ratio, order):
    """iLoRA changes b a by exactly −h (1 − ρ) b D a − h² ρ b D² a, with h = lr λ and D = a aᵀ − ρ bᵀb of RITE's
    factors. The change is of second order in h for ρ = 1."""
    lr = 1e-2
    rite = run(Ours, torch.float64, [M.LoRARITE()], steps=1, lr=lr, weight_decay=0.0)
    moved = {}
    for lam in (1e-3, 1e-4):
        both = run(Ours, torch.float64, [M.LoRARITE(), M.ILoRA(lam=lam, rho=ratio)], steps=1, lr=lr, weight_decay=0.0)
        h = lr * lam
        for x, y in zip(rite.layers, both.layers, strict=True):
            d = x.a @ x.a.T - ratio * x.b.T @ x.b
            change = y.b @ y.a - x.b @ x.a
            exact = -h * (1 - ratio) * x.b @ d @ x.a - h * h * ratio * x.b @ d @ d @ x.a
            assert (change - exact).norm() <= 1e-14 * (x.b @ x.a).norm()
            assert (y.a @ y.a.T - ratio * y.b.T @ y.b).norm() < d.norm()
        moved[lam] = max((y.b @ y.a - x.b @ x.a).norm().item() for x, y in zip(rite.layers, both.layers, strict=True))
    assert moved[1e-3] / moved[1e-4] == pytest.approx(10**order, rel=1e-2)


def test_ilora_after_lora_rite_keeps_the_product_of_20_steps():
    """iLoRA changes the split of the product, on which RITE's later steps do not depend. With ρ = 1, the product of 20
    steps changes in second order only, while the imbalance falls."""
    settings = {"steps": 20, "lr": 1e-2, "weight_decay": 0.0}
    plain = run(Ours, torch.float64, [M.LoRARITE()], **settings)
    pulled = run(Ours, torch.float64, [M.LoRARITE(), M.ILoRA(lam=1e-2, rho=1.0)], **settings)
    for x, y in zip(plain.layers, pulled.layers, strict=True):
        imbalance = [(layer.a @ layer.a.T - layer.b.T @ layer.b).norm() for layer in (x, y)]
        assert (y.b @ y.a - x.b @ x.a).norm() <= 1e-4 * (x.b @ x.a).norm() and imbalance[1] < imbalance[0]


@pytest.mark.parametrize("methods", [[M.LoRARITE()], [M.LoRARITE(), M.ILoRA()]], ids=["lora-rite", "lora-rite ilora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lora_rite_is_bitwise_equal_on_both_backends(dtype, methods):
    """Its stacks are plain torch everywhere, so float64 is not refused on the Triton backend."""
    ends = []
    for backend in ("torch", "triton"):
        chosen = pairs(dtype=dtype)
        with lf.set_backend(backend):
            train(lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods), chosen, 3)
        ends.append(bits(chosen))
    assert same(*ends)
