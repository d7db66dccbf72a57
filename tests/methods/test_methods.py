"""The methods' hyperparameters and combinations: values out of range and combinations without a meaning are refused."""

import math

import pytest
from adapter_pairs import bits, pairs, same, train

import lora_fast as lf
from lora_fast import methods as M

WRONG_VALUES = [
    (M.LoRAPlus, {"ratio": 0.0}, "ratio"),
    (M.LoRAPlus, {"ratio": math.nan}, "ratio"),
    (M.ScaleReg, {"lam": -1.0}, "lam"),
    (M.ScaleReg, {"eps": 0.0}, "eps"),
    (M.ScaledAdamW, {"damping": 0.0}, "damping"),
    (M.ScaledAdamW, {"damping": math.inf}, "damping"),
    (M.ILoRA, {"lam": math.nan}, "lam"),
    (M.ILoRA, {"rho": -1.0}, "rho"),
    (M.PiLoRA, {"damping": -1e-3}, "damping"),
    (M.ScaLoRA, {"kappa": 0.0}, "kappa"),
    (M.ScaLoRA, {"interval": 0}, "interval"),
    (M.ScaLoRA, {"interval": 2.5}, "interval"),
    (M.ScaLoRA, {"solver": "best"}, "solver"),
    (M.ScaLoRA, {"rounding": "up"}, "rounding"),
    (M.ScaLoRA, {"limit": 1.0}, "limit"),
    (M.BaLoRA, {"every": 0}, "every"),
    (M.BaLoRA, {"gauge": "polar"}, "gauge"),
    (M.BaLoRA, {"transport": "v"}, "transport"),
    (M.LoRARITE, {"eps": 0}, "eps"),
    (M.LoRAMuon, {"beta": 1.0}, "beta"),
    (M.LoRAMuon, {"damping": 0.0}, "damping"),
]


@pytest.mark.parametrize("kind, values, name", WRONG_VALUES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_methods_refuse_hyperparameters_out_of_range(kind, values, name):
    with pytest.raises(lf.ArgumentError, match=f"^{name}: expected"):
        kind(**values)


@pytest.mark.parametrize(
    "methods",
    [
        [M.PiLoRA(), M.ScaledAdamW()],
        [M.PiLoRA(), M.ILoRA()],
        [M.ScaLoRA(), M.BaLoRA()],
        [M.ScaLoRA(), M.ScaledAdamW()],
        [M.LoRARITE(), M.LoRAPlus()],
        [M.LoRARITE(), M.ScaleReg()],
        [M.LoRARITE(), M.BaLoRA()],
        [M.LoRARITE(), M.LoRAMuon()],
        [M.LoRAMuon(), M.LoRAPlus()],
        [M.LoRAMuon(), M.ScaleReg()],
        [M.LoRAMuon(), M.RefLoRA()],
        [M.RefLoRA(), M.ScaledAdamW()],
        [M.RefLoRA(), M.BaLoRA()],
        [M.ILoRA(), M.ILoRA(lam=2.0)],
        ["ilora"],
        [M.ILoRA],
    ],
    ids=str,
)
def test_methods_refuse_combinations_without_a_meaning(methods):
    with pytest.raises(lf.ArgumentError, match=r"^methods: expected"):
        lf.optim.LoRAAdamW(pairs(), methods=methods)


def test_pilora_is_scaled_adamw_with_ilora():
    ends = []
    for methods in ([M.ILoRA(lam=1.0), M.ScaledAdamW()], [M.PiLoRA(lam=1.0)]):
        chosen = pairs()
        train(lf.optim.LoRAAdamW(chosen, methods=methods), chosen, 3)
        ends.append(bits(chosen))
    assert same(*ends)
