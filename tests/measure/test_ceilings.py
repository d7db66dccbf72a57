"""The least cost of a layer, and the least time that a device's ceilings allow."""

import torch

from lora_fast.measure.ceilings import Ceilings, Cost, layer_cost, measure_ceilings


def test_layer_cost_counts_operations_and_each_operand_once():
    frozen = layer_cost(10, 4, 6, 0, element=2, weight=2, adapter=4)
    assert frozen.operations == 2 * (2 * 10 * 4 * 6)
    assert frozen.bytes == 2 * ((10 * 4 + 4 * 6 + 10 * 6) + (10 * 6 + 4 * 6 + 10 * 4))
    quantized = layer_cost(10, 4, 6, 0, element=2, weight=0.5, adapter=4)
    assert frozen.bytes - quantized.bytes == 2 * (2 - 0.5) * 4 * 6
    lora = layer_cost(10, 4, 6, 2, element=2, weight=2, adapter=4)
    thin_in, thin_out = 2 * 10 * 4 * 2, 2 * 10 * 6 * 2  # S, da, dx; the update, dS, db
    assert lora.operations - frozen.operations == 3 * thin_in + 3 * thin_out
    assert lora.bytes - frozen.bytes == 2 * 10 * 4 + 4 * 3 * (2 * 4 + 6 * 2)


def test_least_seconds_are_bound_by_operations_or_by_bytes():
    cost = Cost(bytes=50, operations=100)
    assert Ceilings("float32", operations=100.0, bandwidth=10.0).least_seconds(cost) == 5.0
    assert Ceilings("float32", operations=10.0, bandwidth=100.0).least_seconds(cost) == 10.0


def test_measured_ceilings_are_finite_and_positive():
    ceilings = measure_ceilings(torch.device("cpu"), "float32", small=True)
    assert ceilings.dtype == "float32" and 0 < ceilings.operations < 1e16 and 0 < ceilings.bandwidth < 1e15
