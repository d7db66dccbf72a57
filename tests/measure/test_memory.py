"""Bytes of distinct storages, bytes kept for backward, and the peak of a call."""

import torch

from lora_fast.measure.memory import PeakBytes, distinct_bytes, peak_bytes, saved_bytes

CPU = torch.device("cpu")


def test_distinct_bytes_count_a_shared_storage_once():
    x = torch.ones(4, 8)
    assert distinct_bytes([x, x[0], x.T, "no tensor", torch.ones(2)]) == 4 * (32 + 2)


def test_saved_bytes_exclude_some_tensors_and_add_others():
    x, weight = torch.ones(5, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    forward = lambda: x * weight
    assert saved_bytes(forward, []) == 4 * (15 + 3)
    assert saved_bytes(forward, [weight]) == 4 * 15
    assert saved_bytes(forward, [weight], lambda product: [product]) == 4 * (15 + 15)


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
