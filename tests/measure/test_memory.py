"""Bytes of distinct storages, bytes kept for backward, and the peak of a call. The peak is held to counts by hand and
to the CPU's allocator, whose calls torch's profiler records."""

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fast as lf
from lora_fast.measure.memory import (
    PeakBytes,
    distinct_bytes,
    elements,
    peak_bytes,
    saved_bytes,
    saved_for_backward,
    stored_bytes,
)

CPU = torch.device("cpu")
TOKENS, WIDTH, HIDDEN = 64, 16, 32


class Pair(nn.Module):
    """Two layers of one x."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, WIDTH), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def allocated_bytes(call: Callable[[], object]) -> int:
    """Returns the most bytes that the CPU's allocator gives to one call and has not got back."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


def test_distinct_bytes_count_a_shared_storage_once():
    x = torch.ones(4, 8)
    assert distinct_bytes([x, x[0], x.T, "no tensor", torch.ones(2)]) == 4 * (32 + 2)


def test_saved_bytes_exclude_some_tensors_and_add_others():
    x, weight = torch.ones(5, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    forward = lambda: x * weight
    assert saved_bytes(forward, []) == 4 * (15 + 3)
    assert saved_bytes(forward, [weight]) == 4 * 15
    assert saved_bytes(forward, [weight], lambda product: [product]) == 4 * (15 + 15)


def test_bytes_kept_by_a_model_include_what_nodes_keep_as_attributes():
    """Layers of 8 bits of bitsandbytes keep x so, outside autograd's saved tensors."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.tensors, ctx.weight = (None, x.clone()), weight
            return x.square()

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=Square.apply(x * self.bias, self.weight).sum())  # the product saves x

    assert saved_for_backward(Model(2, 3), {"x": torch.ones(7, 3)}) == 4 * 2 * 7 * 3


def test_bytes_of_a_four_bit_weight_count_both_levels_of_scales():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 96, bias=True, quant_type="nf4", compress_statistics=True)
    layer.to("cpu")
    weight, bias, blocks = 64 * 96 // 2, 4 * 96, 64 * 96 // 64
    tables = 4 * (16 + 256)  # the values of 4 bits, and those of the scales' 8 bits
    assert stored_bytes(layer) == weight + bias + blocks + tables + 4 + 4  # the scales' scale and their mean
    assert elements(layer.weight) == 64 * 96


def test_bytes_of_an_eight_bit_weight_are_the_same_after_its_first_forward():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    layer.to("cpu")
    assert stored_bytes(layer) == 64 * 96 + 4 * 96 and elements(layer.weight) == 64 * 96
    layer(torch.ones(2, 64))
    assert stored_bytes(layer) == 64 * 96 + 4 * 96


def test_a_tensor_of_several_parts_counts_by_its_parts():
    ao = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 96, bias=False)
    ao.quantize_(layer, ao.Float8WeightOnlyConfig())
    assert stored_bytes(layer) == 64 * 96 + 4 * 96 and elements(layer.weight) == 64 * 96
    x = torch.ones(2, 64, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer.parameters()) >= 4 * 64 * 96  # torchao keeps the dequantised weight


def test_peak_bytes_count_what_is_alive_at_once():
    def call():
        for _ in range(3):
            torch.zeros(1000) + 1  # two tensors at once, freed before the next iteration

    assert peak_bytes(call, CPU) == 2 * 4000


def test_peak_does_not_count_views_of_given_tensors():
    x = torch.ones(1000)
    with PeakBytes() as memory:
        x.view(10, 100).add_(1)
    assert memory.peak == 0


def test_peak_of_a_step_is_the_one_counted_by_hand():
    net = nn.Sequential(nn.Linear(WIDTH, HIDDEN, False), nn.ReLU(), nn.Linear(HIDDEN, WIDTH, False))
    x, dy = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)

    def step():
        y = net(x)
        return torch.autograd.grad(y, list(net.parameters()), dy)

    hidden, output, gradient = 4 * TOKENS * HIDDEN, 4 * TOKENS * WIDTH, 4 * WIDTH * HIDDEN
    # When ReLU's gradient has been computed there are: its output, the gradients of that and of its input, y, and the
    # gradient of the last weight.
    assert peak_bytes(step, CPU) == allocated_bytes(step) == 3 * hidden + output + gradient


def test_peak_of_grouped_layers_is_the_one_without_the_meter():
    """The peak is in backward, where dx would be there twice if the meter turned the sum in place into another one."""
    net = Pair()
    lf.inject_(net, lf.LoRAConfig(r=2))
    x, dy = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(TOKENS, WIDTH)
    grads = lambda: torch.autograd.grad(net(x), [x, *(p for p in net.parameters() if p.requires_grad)], dy)
    grads()
    assert lf.groups(net).groups == [("first", "second")]
    assert peak_bytes(grads, CPU) == allocated_bytes(grads)


def test_peak_does_not_count_what_operators_free_and_memory_of_numpy():
    half, single = torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000)
    add = lambda: half + single  # on a CPU it casts ``half`` before
    assert peak_bytes(add, CPU) == 4000 < allocated_bytes(add)
    assert peak_bytes(lambda: torch.from_numpy(np.zeros(1000)).add_(1), CPU) == 0
