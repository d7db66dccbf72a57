"""A pair whose gradients or factors are not finite becomes NaN and changes nothing of the other pairs."""

import math

import pytest
import torch
from adapter_pairs import pairs, set_gradients

import lora_fast as lf
from lora_fast import methods as M

METHODS = {
    "plain": [],
    "lora+": [M.LoRAPlus(2.0)],
    "scale-reg": [M.ScaleReg()],
    "scale-reg decoupled": [M.ScaleReg(decoupled=True)],
    "scaled adamw": [M.ScaledAdamW()],
    "ilora": [M.ILoRA()],
    "pilora": [M.PiLoRA()],
    "balora": [M.BaLoRA()],
    "balora mv": [M.BaLoRA(transport="mv")],
    "balora svd, m": [M.BaLoRA(gauge="svd", transport="m")],
    "ref-lora": [M.RefLoRA()],
    "lora-rite": [M.LoRARITE()],
    "lora-muon": [M.LoRAMuon()],
}
SHAPES = [(12, 20, 4)] * 5
BAD = {"da is NaN": 0, "db is infinite": 1, "a is NaN": 3, "b is infinite": 4}  # which pair has what


def step_twice(methods, spoil):
    """Returns pairs after two steps. At the second, ``spoil`` changes the pairs of ``BAD``."""
    chosen = pairs(shapes=SHAPES)
    optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods)
    for i in range(2):
        set_gradients(chosen, i)
        if i:
            spoil(chosen)
        optimizer.step()
    return chosen


def rest(chosen):
    for i in BAD.values():
        chosen[i][0].grad = chosen[i][1].grad = None


def spoil(chosen):
    chosen[BAD["da is NaN"]][0].grad[0, 0] = math.nan
    chosen[BAD["db is infinite"]][1].grad[0, 0] = math.inf
    chosen[BAD["a is NaN"]][0].data[1, 1] = math.nan
    chosen[BAD["b is infinite"]][1].data[1, 1] = math.inf


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", METHODS)
def test_pair_that_is_not_finite_spares_the_others(name, backend):
    """The other pairs have the bits of a step in which the bad ones have no gradients."""
    with lf.set_backend(backend):
        without, with_bad = (step_twice(METHODS[name], change) for change in (rest, spoil))
    for i in set(range(len(SHAPES))) - set(BAD.values()):
        for got, want in zip(with_bad[i][:2], without[i][:2], strict=True):
            assert torch.equal(got, want) and want.isfinite().all()
    for case, i in BAD.items():
        assert not all(p.isfinite().all() for p in with_bad[i][:2]), case


@pytest.mark.parametrize("name", ["balora", "balora mv", "lora-rite", "ref-lora", "lora-muon"])
def test_state_that_is_not_finite_spares_the_other_pairs(name):
    ends = []
    for is_bad in (False, True):
        chosen = pairs(shapes=SHAPES[:2])
        optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=METHODS[name])
        for i in range(3):
            set_gradients(chosen, i)
            if i and not is_bad:
                chosen[0][0].grad = chosen[0][1].grad = None
            optimizer.step()
            if is_bad:
                optimizer.state[chosen[0][0]]["exp_avg"][0] = math.nan
        ends.append(chosen)
    assert not ends[1][0][0].isfinite().all()
    assert all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(ends[0][1][:2], ends[1][1][:2], strict=True))
