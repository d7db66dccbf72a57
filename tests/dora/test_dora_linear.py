"""Tests of functional.dora_linear against PEFT's formula."""

import pytest
import torch
from budget import check, error

import lora_fast as lf
from lora_fast.functional import dora_linear
from lora_fast.functional.dora import weight_norms

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRAINED = ("x", "lora_A", "lora_B", "magnitude")


def tensors(dtype=torch.float32, adapter=None, d_in=24, d_out=40, r=4, n=17, bias=True) -> dict:
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape, kind=dtype: torch.randn(*shape, generator=generator).to(DEVICE, kind)
    adapter = adapter or dtype
    return {
        "x": make(n, d_in).requires_grad_(),
        "weight": make(d_out, d_in),
        "bias": make(d_out) if bias else None,
        "lora_A": make(r, d_in, kind=adapter).requires_grad_(),
        "lora_B": make(d_out, r, kind=adapter).requires_grad_(),
        "magnitude": (make(d_out, kind=adapter) + 4).requires_grad_(),
        "scaling": 0.5,
    }


def peft(x, weight, bias, lora_A, lora_B, magnitude, scaling, kept=None):
    """Returns PEFT's result (tuners/lora/dora.py, DoraLinearLayer.forward, and variants.py, DoraLinearVariant)."""
    result, wide = torch.nn.functional.linear(x, weight, bias), lora_A.dtype
    rows = (x if kept is None else x * kept).to(wide)
    norms = (weight.to(wide) + scaling * (lora_B @ lora_A).detach()).norm(dim=1)
    scale = magnitude / norms
    if kept is None:
        base = result if bias is None else result - bias
    else:
        base = rows @ weight.to(wide).mT
    lora = rows @ lora_A.mT @ lora_B.mT
    return (result + (scale - 1) * base + scale * lora * scaling).to(result.dtype)


def in_float64(arguments: dict) -> dict:
    wide = {name: v.detach().double() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    return wide | {name: wide[name].requires_grad_() for name in TRAINED}


def results(run, arguments: dict) -> list[torch.Tensor]:
    y = run(**arguments)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=DEVICE).cos().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [arguments[name] for name in TRAINED], dy)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, adapter", [("float32", None), ("bfloat16", "float32"), ("bfloat16", None)])
def test_errors_are_at_most_pefts(dtype, adapter, bias):
    dtype, adapter = getattr(torch, dtype), adapter and getattr(torch, adapter)
    arguments = tensors(dtype, adapter, bias=bias)
    exact, theirs = results(peft, in_float64(arguments)), results(peft, arguments)
    for name, got, eager, want in zip(("y", *TRAINED), results(dora_linear, arguments), theirs, exact, strict=True):
        check(name, got, want, error(eager, want), dtype)


def test_dropout_scales_what_it_keeps():
    arguments = in_float64(tensors())
    with lf.set_backend("torch"):
        torch.manual_seed(3)
        got = results(lambda **named: dora_linear(**named, dropout_p=0.25), arguments)
        torch.manual_seed(3)
        kept = torch.nn.functional.dropout(torch.ones_like(arguments["x"]), 0.25)
        want = results(lambda **named: peft(**named, kept=kept), arguments)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_second_derivatives():
    arguments = in_float64(tensors(d_in=5, d_out=3, r=2, n=2))
    trained = [arguments[name] for name in TRAINED]

    def run(x, a, b, magnitude):
        u = lf.functional.lora_linear(x, arguments["weight"], None, a, b, 0.5)
        return lf.functional.dora.column_scale(u, magnitude, norms, arguments["bias"])

    with lf.set_backend("torch"):
        norms = weight_norms(*(arguments[name] for name in ("weight", "lora_A", "lora_B", "scaling"))).clone()
        assert torch.autograd.gradcheck(run, trained)
        assert torch.autograd.gradgradcheck(run, trained)


def test_norms_of_rows_that_nearly_vanish():
    arguments = tensors(r=24)
    exact = in_float64(arguments)
    a, b = torch.eye(24, device=DEVICE), -2 * arguments["weight"].clone()
    b[:3] += 1e-5
    arguments |= {"lora_A": a, "lora_B": b}
    norms = weight_norms(arguments["weight"], a, b, 0.5)
    want = (exact["weight"] + 0.5 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(norms.double(), want, rtol=0.02, atol=1e-12)
    assert (want[:3] > 0).all() and (want[3:] == 0).all()
