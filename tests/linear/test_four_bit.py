"""Tests of the GEMM over bitsandbytes' 4-bit weights, in Triton's interpreter (natively on a CUDA machine)."""

from __future__ import annotations

import itertools

import pytest
import torch
from budget import DRAWS, check, error
from launching import DEVICE, poisoned_empty, randn

from lora_fast.kernels import launch, records, tiles, tuned
from lora_fast.kernels.linear import four_bit
from lora_fast.ops.reference import linear as reference

pytestmark = pytest.mark.gpu

FLOAT32, HALF, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
STORED_IN = {FLOAT32: torch.float32, HALF: torch.uint8, BFLOAT16: torch.bfloat16}  # by the dtype of the activations
D_OUT, D_IN = 40, 192


def by_hand(nested: bool, shape=(D_OUT, D_IN), blocksize=128) -> four_bit.FourBit:
    """Returns a weight of random bytes, with a random code. By default every second row begins within a block."""
    n, generator = -(-shape[0] * shape[1] // blocksize), torch.Generator().manual_seed(7)
    byte = lambda count: torch.randint(256, (count,), generator=generator, dtype=torch.uint8).to(DEVICE)
    second = records.NestedScales(
        randn(256, seed=1), randn(-(-n // 256), seed=2).abs(), torch.tensor(0.3, device=DEVICE)
    )
    absmax = byte(n) if nested else randn(n, seed=3).abs()
    packed = byte(shape[0] * shape[1] // 2)
    return records.FourBit(packed, randn(16), absmax, blocksize, shape, second if nested else None)


def dequantised(weight: four_bit.FourBit, dtype: torch.dtype) -> torch.Tensor:
    """Returns W as the format defines it, rounded to ``dtype``."""
    d_out, d_in = weight.shape
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), 1).reshape(-1)
    absmax, second = weight.absmax, weight.nested
    if second is not None:
        scale = second.absmax.repeat_interleave(second.blocksize)[: len(absmax)]
        absmax = second.code[absmax.long()] * scale + second.offset
    absmax = absmax.repeat_interleave(weight.blocksize)[: d_out * d_in]
    return (weight.code[nibbles.long()] * absmax).reshape(d_out, d_in).to(dtype)


def by_bitsandbytes(quant_type: str, nested: bool, dtype: torch.dtype, blocksize=64):
    """Returns a weight that bitsandbytes has quantised, and what it dequantises. On a CPU bitsandbytes 0.50 dequantises
    only rows of whole blocks correctly."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    options = {"blocksize": blocksize, "compress_statistics": nested, "quant_type": quant_type}
    packed, state = functional.quantize_4bit(randn(D_OUT, D_IN, dtype=dtype), quant_storage=STORED_IN[dtype], **options)
    second = records.NestedScales(state.state2.code, state.state2.absmax, state.offset) if nested else None
    weight = records.FourBit(packed, state.code, state.absmax, blocksize, (D_OUT, D_IN), second)
    return weight, functional.dequantize_4bit(packed, state)


def results(weight, x, bias, s, b, dy, ds, a, keep, arch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y and dx. Raises AssertionError if an operand changes."""
    packed = weight.packed.view(torch.uint8)  # read as floats, some bytes are NaN
    operands = [t for t in (x, bias, s, b, dy, ds, a, packed, weight.absmax, weight.code) if t is not None]
    before = [operand.clone() for operand in operands]
    with tiles.assume(arch=None if DEVICE.type == "cuda" else arch), poisoned_empty():
        y = four_bit.four_bit_linear(x, weight, bias, s, b, 1.5)
        dx = four_bit.four_bit_grad_x(dy, weight, ds, a, keep)
    assert all(torch.equal(operand, kept) for operand, kept in zip(operands, before, strict=True))
    return y, dx


def formula(w, x, bias, s, b, dy, ds, a, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y and dx as PEFT computes them, from S and dS."""
    update, thin = s.to(b.dtype) @ b.T * 1.5, ds.to(a.dtype) @ a
    y = torch.nn.functional.linear(x, w, bias) + update
    return y.to(x.dtype), (dy @ w + thin * (1 if mask is None else mask)).to(x.dtype)


def check_case(
    weight, w, dtype, adapter, r=5, n_tokens=19, bias=True, dropout_p=0.0, padding=0, arch=90, lead=()
) -> None:  # fmt: skip
    """Raises AssertionError if an error of y or dx exceeds the budget. ``w`` is the dequantised weight."""
    d_out, d_in = weight.shape
    rows = lambda width, seed: randn(n_tokens, width + padding, seed=seed, dtype=dtype)[:, :width]
    x, dy = rows(d_in, 1), rows(d_out, 2)
    s, ds = (randn(n_tokens, r, seed=seed, dtype=torch.promote_types(dtype, adapter)) for seed in (3, 4))
    b, a = randn(d_out, r, seed=5, dtype=adapter), randn(r, d_in, seed=6, dtype=adapter)
    bias = randn(d_out, seed=7, dtype=dtype) if bias else None
    seed = (1 << 40) + r
    keep = launch.draw_mask(dy, dropout_p, seed) if dropout_p else None
    mask = reference.philox_mask(seed, n_tokens, d_in, dropout_p).to(DEVICE) if dropout_p else None
    wide = lambda t: None if t is None else t.double()
    eager = []
    for draw in range(DRAWS):
        x_scaled, dy_scaled = x * (1 + draw / DRAWS), dy * (1 + draw / DRAWS)
        operands = w.to(dtype), x_scaled, bias, s, b, dy_scaled, ds, a
        exact = formula(*map(wide, operands), mask)
        eager.append([error(*pair) for pair in zip(formula(*operands, mask), exact, strict=True)])
    given_x, given_dy = (t.reshape(*lead, -1, t.shape[1]) if lead else t for t in (x, dy))
    got = results(weight, given_x, bias, s, b, given_dy, ds, a, keep, arch)
    exact = formula(*map(wide, (w.to(dtype), x, bias, s, b, dy, ds, a)), mask)
    for name, one, other, *errors in zip(("y", "dx"), got, exact, *eager, strict=True):
        assert one.dtype is dtype and one.shape == (*given_x.shape[:-1], other.shape[1])
        check(f"{name} of {dtype}, {adapter}, rank {r}", one.reshape(other.shape), other, max(errors), dtype)


QUANTISED = list(itertools.product(("nf4", "fp4"), (False, True), (FLOAT32, HALF, BFLOAT16)))


@pytest.mark.parametrize("quant_type, nested, dtype", QUANTISED)
def test_error_is_within_the_budget_of_the_dequantised_weight(quant_type, nested, dtype):
    weight, w = by_bitsandbytes(quant_type, nested, dtype)
    more = {"dropout_p": 0.2, "bias": False, "padding": 3, "arch": 80} if nested else {"r": 33, "lead": (1,)}
    check_case(weight, w, dtype, FLOAT32 if quant_type == "nf4" else dtype, **more)


@pytest.mark.parametrize("quant_type, nested, dtype", QUANTISED)
def test_values_have_bitsandbytes_bits(quant_type, nested, dtype):
    """The products with rows of the identity are the values themselves."""
    weight, w = by_bitsandbytes(quant_type, nested, dtype)
    assert w.dtype is dtype and torch.equal(values(weight, dtype), w)


def values(weight: four_bit.FourBit, dtype: torch.dtype) -> torch.Tensor:
    """Returns W, read by both directions."""
    d_out, d_in = weight.shape
    zero = torch.zeros(1, 1, dtype=dtype, device=DEVICE)
    rows, columns = (torch.eye(n, dtype=dtype, device=DEVICE) for n in (d_out, d_in))
    w = four_bit.four_bit_grad_x(rows, weight, zero.expand(d_out, 1), zero.expand(1, d_in))
    transposed = four_bit.four_bit_linear(columns, weight, None, zero.expand(d_in, 1), zero.expand(d_out, 1), 1.0)
    assert torch.equal(transposed.T, w)
    return w


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_values_are_those_of_the_format(blocksize, nested):
    weight = by_hand(nested, (33, 128), blocksize)
    assert torch.equal(values(weight, FLOAT32), dequantised(weight, FLOAT32))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_several_tiles_are_within_the_budget(dropout_p, arch):
    weight = by_hand(dropout_p > 0, (136, 192), 64)
    sizes = {"n_tokens": {80: 130, 90: 258}[arch], "r": 40, "dropout_p": dropout_p, "arch": arch}
    check_case(weight, dequantised(weight, BFLOAT16), BFLOAT16, FLOAT32, **sizes)


@pytest.mark.parametrize("d_out", [1, 37])
def test_odd_numbers_of_columns_are_within_the_budget(d_out):
    weight = by_hand(True, (d_out, 64))
    check_case(weight, dequantised(weight, HALF), HALF, HALF, r=1, n_tokens=3, dropout_p=0.5)


def test_empty_inputs_give_empty_results_and_the_bias():
    weight, zero = by_hand(False), torch.zeros(0, 4, device=DEVICE)
    x, bias, b = torch.zeros(2, 0, D_IN, device=DEVICE), randn(D_OUT), randn(D_OUT, 4)
    assert four_bit.four_bit_linear(x, weight, bias, zero, b, 1.0).shape == (2, 0, D_OUT)
    assert four_bit.four_bit_grad_x(x.new_zeros(0, D_OUT), weight, zero, randn(4, D_IN)).shape == (0, D_IN)


def test_weights_that_the_gemm_does_not_take_are_told_apart():
    x, plain, nested = randn(3, D_IN), by_hand(False), by_hand(True)
    assert four_bit.takes(x, plain) and four_bit.takes(x.bfloat16(), nested)
    not_taken = {
        "float64 activations": (x.double(), plain),
        "rows of 96": (x, by_hand(False, (8, 96), 64)),
        "blocks of 32": (x, plain._replace(blocksize=32)),
        "absmax in 16 bits": (x, plain._replace(absmax=plain.absmax.half())),
        "bytes without a second quantisation": (x, plain._replace(absmax=nested.absmax)),
        "a second quantisation of numbers": (x, nested._replace(absmax=plain.absmax)),
        "every second byte": (x, plain._replace(packed=plain.packed.repeat_interleave(2)[::2])),
        "another device": (x, plain._replace(code=plain.code.to("meta"))),
    }
    assert [name for name, arguments in not_taken.items() if four_bit.takes(*arguments)] == []


@pytest.mark.parametrize("direction, op", [("forward", "four_bit_linear"), ("backward", "four_bit_grad_x_dropout")])
def test_library_multiplies_unless_the_gemm_was_measured_as_faster(direction, op):
    weight, forward = by_hand(True), direction == "forward"
    left = randn(2, 3, D_IN if forward else D_OUT)
    chosen = lambda weight=weight: four_bit.four_bit_strategy(direction, left, weight, 4, not forward)
    key = tuned.key(op, FLOAT32, 6, *((D_IN, D_OUT) if forward else (D_OUT, D_IN)), 4)
    assert chosen() == "library"
    for choice in ("fused", "library"):
        with tuned.using({key: choice}):
            assert chosen() == choice
            assert chosen(weight._replace(blocksize=32)) == "library"
            with tiles.assume(strategy="fused"):
                assert chosen() == "fused"
