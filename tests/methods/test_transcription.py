"""Every method follows the float64 transcription of its formulas, layer by layer."""

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
def test_method_follows_the_float64_transcription(name):
    methods = METHODS[name]
    exact = run(T.Run, torch.float64, methods)
    in_float64, in_float32 = run(Ours, torch.float64, methods), run(Ours, torch.float32, methods)
    formulas = distance(run(T.Run, torch.float32, methods), exact)
    ours = distance(in_float32, exact)
    print(f"{name}: {ours:.3e} / {formulas:.3e} = {ours / formulas:.3f}; float64 {distance(in_float64, exact):.1e}")
    assert distance(in_float64, exact) <= 1e-9
    assert ours <= 1.1 * formulas + ULPS * torch.finfo(torch.float32).eps
