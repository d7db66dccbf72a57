"""The persistent GEMM leaves multiprocessors to NCCL's collectives, as many as torch's carve-out sets."""

from contextlib import contextmanager

import pytest
import torch
from launching import DEVICE, randn

from lora_fast.kernels import device, tiles
from lora_fast.kernels.linear import gemm, strategies

HALF = torch.bfloat16


@contextmanager
def carveout(multiprocessors: int | None):
    before = torch._C._get_sm_carveout_experimental()
    torch._C._set_sm_carveout_experimental(multiprocessors)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(before)


def layer(n: int, d_in: int, d_out: int, r: int = 16) -> tuple[torch.Tensor, ...]:
    """Returns x, W, S and b."""
    return tuple(
        randn(*shape, dtype=HALF, seed=i) for i, shape in enumerate([(n, d_in), (d_out, d_in), (n, r), (d_out, r)])
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="sets the number of multiprocessors")
@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("strategy", ["fused", "gluon"])
def test_grid_has_a_program_for_each_multiprocessor_that_is_left(strategy, transposed, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED_MULTIPROCESSORS", 132)
    x, weight, _, b = layer(4096, 512, 4096)
    left, shape = (x, (4096, 4096)) if transposed else (x.new_empty(4096, 4096), (4096, 512))
    n_tiles = 32 * 16 if transposed else 32 * 2
    for left_out, programs in ((None, 132), (0, 132), (20, 112), (100, 32), (131, 1), (132, 1), (500, 1)):
        with tiles.assume(arch=90), carveout(left_out):
            prepared = gemm.gemm_class(strategy)(
                left, weight, None, b if transposed else b.t(), 16, False, transposed, shape
            )
        assert prepared.launch.grid == (min(n_tiles, programs),), left_out


@pytest.mark.skipif(DEVICE.type == "cuda", reason="sets the number of multiprocessors")
@pytest.mark.parametrize("dropout", [False, True])
def test_result_has_the_same_bits_with_any_number_of_programs(dropout, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED_MULTIPROCESSORS", 5)
    x, weight, s, b = layer(256, 64, 384)
    mask = (7, 0, 20000) if dropout else None
    with tiles.assume(strategy="fused"):
        results = []
        for left_out in (None, 1, 3, 5):
            with carveout(left_out):
                results.append(
                    (
                        gemm.linear(x, weight, None, s, b, 0.5),
                        gemm.grad_x(randn(256, 384, dtype=HALF), weight, s, b[:64].t(), mask),
                    )
                )
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


def test_waves_use_the_multiprocessors_that_are_left():
    """128 tiles of 128×256 are one wave of 132 multiprocessors and two of 112, of which the second is nearly empty."""
    card = device.CARDS[90]
    call = strategies.Call(1024, 4096, 4096, 16, HALF, HALF, False)
    choose = lambda carved_out: strategies.best("forward", call, card, carved_out=carved_out).gemm
    assert [choose(carved_out) for carved_out in (None, 0, 4, 20)] == ["fused", "fused", "fused", "cublas"]
    fused = strategies.Way("forward", "pass", "fused")
    whole, half = (
        strategies.CostModel(call, card, carved_out).gemm("fused", 4096, 4096, False) for carved_out in (0, 68)
    )
    assert half == pytest.approx(2 * whole, rel=0.05), "64 tiles at a time"
    assert strategies.estimate(fused, call, card, 68) > 1.5 * strategies.estimate(fused, call, card)


def test_choice_obeys_the_carveout_of_the_process(monkeypatch):
    monkeypatch.setattr(device, "get", lambda _: device.CARDS[90])
    left, weight = (
        torch.empty(1024, 4096, dtype=HALF, device="meta"),
        torch.empty(4096, 4096, dtype=HALF, device="meta"),
    )
    choose = lambda: strategies.way("forward", left, weight, HALF, 16, False).gemm
    assert choose() == "fused"
    with carveout(20):
        assert choose() == "cublas"
    assert choose() == "fused"
