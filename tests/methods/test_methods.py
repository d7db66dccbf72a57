"""The methods' hyperparameters and combinations: values out of range and combinations without a meaning are refused."""

import math

import numpy as np
import proportion
import pytest
import torch
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "method",
    [M.LoRAPlus(2.0), M.ScaleReg(), M.ScaledAdamW(), M.ILoRA(), M.PiLoRA(), M.RefLoRA(), M.LoRAMuon()],
    ids=lambda method: type(method).__name__,
)
def test_product_moves_in_proportion_where_factors_lack_full_rank(method, dtype):
    """BaLoRA and LoRA-RITE, whose formulas divide by singular values of the factors, have tests of their own. LoRA-Muon
    bounds its steps by its damping, which is not enough for a rank above both widths."""
    is_bounded = lambda d_out, d_in, r: not isinstance(method, M.LoRAMuon) or r <= max(d_out, d_in)
    for size in (size for size in proportion.SIZES if is_bounded(*size)):
        for kind in proportion.KINDS:
            assert proportion.largest_move([method], size, kind, dtype, 8) < 100, (size, kind)


@pytest.mark.parametrize(
    "kind, numpys, pythons",
    [
        (M.LoRAPlus, {"ratio": np.float64(4.0)}, {"ratio": 4.0}),
        (M.ScaleReg, {"lam": np.float32(0.5), "decoupled": np.bool_(True)}, {"lam": 0.5, "decoupled": True}),
        (M.ScaledAdamW, {"damping": np.float64(0.1)}, {"damping": 0.1}),
        (M.ILoRA, {"lam": np.float64(0.1), "rho": np.array(2.0)}, {"lam": 0.1, "rho": 2.0}),
        (M.PiLoRA, {"lam": np.int64(1)}, {"lam": 1}),
        (M.ScaLoRA, {"kappa": np.float64(3.0), "interval": np.int64(2), "seed": np.uint8(5)}, None),
        (M.BaLoRA, {"every": np.int32(2)}, {"every": 2}),
        (M.LoRARITE, {"eps": np.float32(0.25), "clip": np.float64(2.0)}, {"eps": 0.25, "clip": 2.0}),
        (M.LoRAMuon, {"beta": np.float64(0.9), "damping": np.float64(1e-3)}, {"beta": 0.9, "damping": 1e-3}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_numbers_of_numpy_are_those_of_python(kind, numpys, pythons):
    """The repr, by which a resumed run recognises the method, is the same, too."""
    pythons = pythons or {"kappa": 3.0, "interval": 2, "seed": 5}
    assert kind(**numpys) == kind(**pythons) and repr(kind(**numpys)) == repr(kind(**pythons))


@pytest.mark.parametrize(
    "kind, values, name",
    [
        (M.ILoRA, {"lam": np.float32("nan")}, "lam"),
        (M.ScaledAdamW, {"damping": np.float64(-1.0)}, "damping"),
        (M.BaLoRA, {"every": np.float64(2.0)}, "every"),
        (M.LoRARITE, {"eps": np.bool_(True)}, "eps"),
        (M.LoRAMuon, {"beta": np.array([0.9])}, "beta"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_numbers_of_numpy_out_of_range_are_refused(kind, values, name):
    with pytest.raises(lf.ArgumentError, match=f"^{name}: expected"):
        kind(**values)


def test_pilora_is_scaled_adamw_with_ilora():
    ends = []
    for methods in ([M.ILoRA(lam=1.0), M.ScaledAdamW()], [M.PiLoRA(lam=1.0)]):
        chosen = pairs()
        train(lf.optim.LoRAAdamW(chosen, methods=methods), chosen, 3)
        ends.append(bits(chosen))
    assert same(*ends)
