"""The op over quantised weights on the kernels, which Triton's interpreter runs without a GPU: its results against
float64 with the dequantised weight, by the layer's budget."""

import pytest

pytest.importorskip("bitsandbytes", reason="pip install '.[quantized]'")
import bitsandbytes as bnb
import budget
import torch
from torch import nn
from torch.autograd import grad

import lora_fast as lf
from lora_fast.backend import load_ops
from lora_fast.kernels import tiles
from lora_fast.kernels.linear import four_bit
from lora_fast.ops.linear import mask
from lora_fast.ops.reference.linear import keep_scale
from lora_fast.quantized import quantized_weight

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D_IN, RANK, SCALING = 64, 8, 1.5
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def base_layer(d_out: int, kind: str, dtype: torch.dtype) -> nn.Module:
    """Returns a frozen layer of bitsandbytes with a bias."""
    layer = bnb.nn.Linear4bit(D_IN, d_out, compute_dtype=dtype, quant_type=kind)
    layer.bias.data = layer.bias.data.to(dtype)
    return layer.to(DEVICE).requires_grad_(False)


def drawn(d_outs: tuple[int, ...], kind: str, dtype: torch.dtype):
    """Returns x (2, 9, d_in), base layers and float32 factors of the members, and a gradient of every y."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, D_IN, dtype=dtype, device=DEVICE).requires_grad_()
    make = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=FLOAT32).div(5).requires_grad_()
    members = [(base_layer(d_out, kind, dtype), make(RANK, D_IN), make(d_out, RANK)) for d_out in d_outs]
    return x, members, [torch.randn(2, 9, d_out, dtype=dtype, device=DEVICE) for d_out in d_outs]


def eager(x, members, dys, keeps, dropout_p: float, weight_dtype: torch.dtype) -> list:
    """Returns every y, dx, and the gradients of the factors by PEFT's formula, with weights of this dtype."""
    kept = 1 / keep_scale(dropout_p)
    ys = []
    for (base, a, b), keep in zip(members, keeps, strict=True):
        weight = quantized_weight(base).dequantized(dys[0].dtype).to(weight_dtype)
        keep = None if keep is None else keep.to(DEVICE).view(x.shape)
        bias = base.bias.to(weight_dtype)
        ys.append(budget.eager_lora_linear(x, weight, bias, a, b, SCALING, keep, kept))
    factors = [factor for _, a, b in members for factor in (a, b)]
    return [*ys, *grad(ys, [x, *factors], [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)])]


@pytest.mark.parametrize(
    ("d_outs", "kind", "dtype", "dropout_p", "strategy"),
    [
        ((48,), "nf4", BFLOAT16, 0.0, "cublas"),
        ((48,), "fp4", FLOAT32, 0.25, "cublas"),
        ((48, 80, 32), "nf4", BFLOAT16, 0.25, "cublas"),
        ((48, 80, 32), "nf4", FLOAT32, 0.0, "cublas"),
        ((48, 80), "nf4", BFLOAT16, 0.25, "fused"),  # our GEMM over 4-bit weights, as if it were measured as faster
    ],
)
def test_op_over_quantised_weights_errs_within_the_budget(d_outs, kind, dtype, dropout_p, strategy, monkeypatch):
    seen = []  # the functions of the GEMM over 4-bit weights that ran
    for function in (four_bit.four_bit_linear, four_bit.four_bit_grad_x):
        run = lambda *call, function=function: seen.append(function) or function(*call)
        monkeypatch.setattr(four_bit, function.__name__, run)
    x, members, dys = drawn(d_outs, kind, dtype)
    factors = [factor for _, a, b in members for factor in (a, b)]
    calls = [
        lf.functional.LinearMember(quantized_weight(base), None, a, b, SCALING, dropout_p, seed)
        for seed, (base, a, b) in enumerate(members)
    ]
    with lf.set_backend("triton"), tiles.assume(strategy=strategy):
        ys = lf.functional.lora_linear_group(x, calls)
        got = [*ys, *grad(ys, [x, *factors], dys)]
        with torch.no_grad():
            again = [lf.functional.lora_linear(x, *call) for call in calls]
    assert len(seen) == (3 * len(d_outs) if strategy == "fused" else 0)  # y with and without gradients, and dx
    for y, alone in zip(ys, again, strict=True):
        assert torch.equal(y, alone), "without gradients, by itself"
    ops = load_ops("linear", True)
    keeps = [mask(ops, x.detach(), dropout_p, seed) if dropout_p else None for seed in range(len(calls))]
    wide = [
        (base, a.detach().double().requires_grad_(), b.detach().double().requires_grad_()) for base, a, b in members
    ]
    exact = eager(x.detach().double().requires_grad_(), wide, dys, keeps, dropout_p, torch.float64)
    theirs = eager(x, members, dys, keeps, dropout_p, dtype)
    names = [*(f"y{i}" for i in range(len(ys))), "dx", *(f"d{n}{i}" for i in range(len(ys)) for n in "ab")]
    for name, mine, right, other in zip(names, got, exact, theirs, strict=True):
        least = budget.least_error(dtype, FLOAT32) if mine.dtype is FLOAT32 else 0.0
        budget.check(name, mine, right, budget.error(other, right), dtype if least == 0.0 else FLOAT32, least)
