"""Tests of the way that a call takes. It has the lowest estimated time and is never estimated slower than PEFT, for any
number of tokens. Estimates are computed from bytes, operations and launches (kernels/linear/strategies.py); none was
measured on a GPU."""

import itertools

import pytest
import torch

from lora_fast.kernels import device, tiles, tuned
from lora_fast.kernels.linear import strategies

HALF, FULL = torch.bfloat16, torch.float32
# (d_in, d_out) of the linear layers of four models: q and o, k and v, gate and up, down.
MODELS = {
    "SmolLM2-135M": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "Qwen2.5-7B": ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)),
    "Llama-3-8B": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "Llama-3-70B": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
}
TOKENS = sorted({1, 16384, *(n + more for n in (2**k for k in range(1, 15)) for more in (-1, 0, 1, n // 3))} - {16385})


def peft(call: strategies.Call, direction: str, card: device.Device) -> float:
    """Returns the estimated seconds of PEFT's eager layer, with a launch for each operation and x and dy cast to the
    adapter's dtype."""
    costs = strategies.CostModel(call, card)
    t, d_in, d_out, r, size, wide = *call[:4], call.dtype.itemsize, call.factor.itemsize
    move = lambda width, n_bytes: costs.memory(t * width * n_bytes)
    thin = lambda width: costs.memory((t * width + r * width + t * r) * wide)
    cast = lambda width: move(width, size + wide) if wide > size else 0.0
    if direction == "forward":  # x W; cast and drop x; times a; times b; times scaling; add; cast to x's dtype
        seconds = costs.cublas(t, d_in, d_out) + cast(d_in) + (move(d_in, 2 * wide + 1) if call.dropout else 0.0)
        return seconds + thin(d_in) + thin(d_out) + move(d_out, 2 * wide) + move(d_out, size + 2 * wide) + cast(d_out)
    # cast dy; times scaling; db and dS; da and dS a; drop; cast to x's dtype; dy W; add
    seconds = cast(d_out) + move(d_out, 2 * wide) + 2 * thin(d_out) + 2 * thin(d_in) + cast(d_in)
    seconds += move(d_in, 2 * wide + 1) if call.dropout else 0.0
    return seconds + costs.cublas(t, d_out, d_in) + move(d_in, 3 * size)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("model", MODELS)
def test_chosen_way_is_estimated_fastest_and_faster_than_peft(model, arch):
    """Covers 1 … 16,384 tokens, the model's shapes, ranks, both adapter dtypes, with dropout and without. For sm_90 it
    covers all numbers of tokens and ranks, for the others every third number, of which each has another remainder."""
    card = device.CARDS[arch]
    tokens, ranks = (TOKENS, (8, 16, 32, 64, 128)) if arch == 90 else (TOKENS[::3], (8, 16, 64))
    for shape, n, r, factor, dropout in itertools.product(MODELS[model], tokens, ranks, (HALF, FULL), (False, True)):
        call = strategies.Call(n, *shape, r, HALF, factor, dropout)
        for direction in ("forward", "backward"):
            chosen = strategies.best(direction, call, card)
            seconds = strategies.estimate(chosen, call, card)
            fastest = min(strategies.estimate(way, call, card) for way in strategies.ways(direction, call))
            assert seconds <= 1.02 * fastest, (chosen, call)
            assert seconds <= peft(call, direction, card), (chosen, call, 1e6 * seconds)


def chosen(n: int, d_in: int, d_out: int, r: int = 16, dropout: bool = False, arch: int = 90, factor=HALF, dtype=HALF):
    call = strategies.Call(n, d_in, d_out, r, dtype, factor, dropout)
    return [strategies.best(direction, call, device.CARDS[arch])[1:] for direction in ("forward", "backward")]


def test_choices_on_an_h100_match_hand_calculations():
    """Covers few tokens, full and nearly empty waves of tiles, and partial sums that grow with r."""
    assert chosen(1, 4096, 4096)[0] == chosen(64, 4096, 14336)[0] == ("split", "cublas")
    assert chosen(65, 4096, 4096)[0][1] == "cublas"  # 16 tiles of 128×256 on 132 multiprocessors
    assert chosen(8192, 4096, 4096) == [("pass", "fused")] * 2  # 1024 tiles: 7.76 waves
    assert chosen(1024, 4096, 4096)[0][1] == "fused"  # 128 tiles: one wave, nearly full
    assert chosen(1024, 4096, 5120)[0][1] == "cublas"  # 160 tiles: a second wave of 28
    assert chosen(8192, 4096, 14336, r=128)[1][0] == chosen(8192, 4096, 14336, r=256)[1][0] == "cublas"
    assert chosen(8192, 4096, 14336, r=64)[1][0] == "cublas" and chosen(8192, 4096, 14336, r=32)[1][0] == "pass"
    assert chosen(8192, 4096, 4096, r=128)[0][0] == "cublas"
    assert chosen(8192, 4096, 4096, r=128, dropout=True)[0][0] == "pass"  # cuBLAS takes no mask
    assert all(gemm == "cublas" for _, gemm in chosen(8192, 4096, 4096, dtype=FULL, factor=FULL))


def test_cublas_is_never_chosen_for_float16_halves():
    for n in TOKENS:
        for direction in ("forward", "backward"):
            ways = strategies.ways(direction, strategies.Call(n, 4096, 4096, 256, torch.float16, FULL, False))
            assert ways and all(way.thin != "cublas" for way in ways)


def operands(n: int, d_in: int, d_out: int, dtype=HALF, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    make = lambda rows, columns: torch.empty(rows, columns + padding, dtype=dtype, device="meta")[:, :columns]
    return make(n, d_in), make(d_out, d_in)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("d_in, padding", [(4095, 0), (4096, 1), (4096, 4)])
def test_cublas_is_chosen_for_operands_that_cannot_be_streamed(arch, d_in, padding, monkeypatch):
    monkeypatch.setattr(device, "get", lambda _: device.CARDS[arch])
    for direction in ("forward", "backward"):
        left, weight = operands(8192, d_in, 4096, padding=padding)
        left = left if direction == "forward" else left.new_empty(8192, 4096)
        assert strategies.way(direction, left, weight, HALF, 16, False).gemm == "cublas"
        left, weight = operands(8192, 4096, 4096)
        assert strategies.way(direction, left, weight, HALF, 16, False).gemm == "fused"


def test_cublas_is_chosen_for_a_transposed_weight():
    left, weight = operands(8192, 4096, 4096)
    with tiles.assume(arch=90, thin="pass"):
        assert strategies.way("forward", left, weight.t(), HALF, 16, False).gemm == "cublas"


def test_assumed_overrides_measured_and_measured_overrides_estimated(monkeypatch):
    monkeypatch.setattr(device, "get", lambda _: device.CARDS[90])
    left, weight = operands(8192, 4096, 4096)
    forward = lambda: strategies.way("forward", left, weight, HALF, 16, False).gemm
    key = tuned.key("linear", HALF, 8192, 4096, 4096, 16)
    assert forward() == "fused"
    with tuned.using({key: "fused"}):  # it was measured with other strides; here W would be copied at every call
        assert strategies.way("forward", left, weight.t(), HALF, 16, False).gemm == "cublas"
    for choice in ("cublas", "gluon"):
        with tuned.using({key: choice}):
            assert forward() == choice
            with tiles.assume(arch=90, strategy="fused"):
                assert forward() == "fused"
