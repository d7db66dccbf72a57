"""Each method against the float64 transcription of its formulas, layer by layer."""

import pytest
import torch
import transcription as T
from method_runs import ULPS, Ours, distance, run

from lora_fast import methods as M

METHODS = {
    "plain": [],
    "lora+": [M.LoRAPlus(4.0)],
    "scale-reg": [M.ScaleReg(lam=0.05)],
    "scale-reg decoupled": [M.ScaleReg(lam=0.05, decoupled=True)],
    "scale-reg lora+": [M.ScaleReg(lam=0.05), M.LoRAPlus(2.0)],
    "scaled adamw": [M.ScaledAdamW(damping=1e-2)],
    "ilora": [M.ILoRA(lam=2.0)],
    "ilora clipped": [M.ILoRA(lam=1e4)],
    "ilora rho": [M.ILoRA(lam=1.0, rho_scale=2.0, rho_exponent=0.5)],
    "ilora lora+": [M.ILoRA(lam=1.0), M.LoRAPlus(4.0)],
    "pilora": [M.PiLoRA(lam=1.0, damping=1e-2)],
    "balora": [M.BaLoRA()],
    "balora every 3, m": [M.BaLoRA(every=3, transport="m")],
    "balora mv, lora+": [M.BaLoRA(transport="mv"), M.LoRAPlus(2.0)],
    "balora svd": [M.BaLoRA(every=50, gauge="svd_signed")],
    "balora scaled": [M.BaLoRA(), M.ScaledAdamW(damping=1e-2)],
    "scalora": [M.ScaLoRA(interval=5)],
    "scalora kappa": [M.ScaLoRA(kappa=30.0, interval=10), M.LoRAPlus(2.0)],
    "scalora paper": [M.ScaLoRA(kappa=30.0, interval=1, solver="paper")],
    "scalora column": [M.ScaLoRA(interval=4, solver="column"), M.LoRAPlus(2.0)],
    "scalora scalar": [M.ScaLoRA(interval=4, solver="scalar")],
    "lora-rite": [M.LoRARITE()],
    "lora-rite ilora": [M.LoRARITE(), M.ILoRA(lam=2.0)],
    "lora-rite scale-reg": [M.LoRARITE(), M.ScaleReg(lam=0.05, decoupled=True)],
    "lora-muon": [M.LoRAMuon()],
    "lora-muon ilora": [M.LoRAMuon(beta=0.8), M.ILoRA(lam=2.0)],
    "ref-lora": [M.RefLoRA()],
    "ref-lora lora+, scale-reg": [M.RefLoRA(), M.LoRAPlus(2.0), M.ScaleReg(lam=0.05, decoupled=True)],
}


@pytest.mark.parametrize("name", METHODS)
def test_against_the_transcription(name):
    methods = METHODS[name]
    exact = run(T.Run, torch.float64, methods)
    in_float64, in_float32 = run(Ours, torch.float64, methods), run(Ours, torch.float32, methods)
    formulas = distance(run(T.Run, torch.float32, methods), exact)
    ours = distance(in_float32, exact)
    print(f"{name}: {ours:.3e} / {formulas:.3e} = {ours / formulas:.3f}; float64 {distance(in_float64, exact):.1e}")
    assert distance(in_float64, exact) <= 1e-9
    assert ours <= 1.1 * formulas + ULPS * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("ratio, order", [(1.0, 2), (0.5, 1)], ids=["equal shares", "b half of a"])
def test_ilora_after_lora_rite_moves_the_product_only_in_second_order(ratio, order):
    """With h = lr λ and D = a aᵀ − ρ bᵀb of RITE's factors, iLoRA changes b a by exactly
    −h (1 − ρ) b D a − h² ρ b D² a, which is of second order in h where ρ = 1."""
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


def test_lora_rite_keeps_its_product_whatever_follows_it():
    """Followers choose the split of a product that RITE's later steps do not depend on: with ρ = 1 a thousandth of the
    learning rate moves the product of 20 steps by second order only, while it pulls the Grams together."""
    settings = {"steps": 20, "lr": 1e-2, "weight_decay": 0.0}
    plain = run(Ours, torch.float64, [M.LoRARITE()], **settings)
    pulled = run(Ours, torch.float64, [M.LoRARITE(), M.ILoRA(lam=1e-2, rho=1.0)], **settings)
    for x, y in zip(plain.layers, pulled.layers, strict=True):
        imbalance = [(layer.a @ layer.a.T - layer.b.T @ layer.b).norm() for layer in (x, y)]
        assert (y.b @ y.a - x.b @ x.a).norm() <= 1e-4 * (x.b @ x.a).norm() and imbalance[1] < imbalance[0]
