"""The table of the adapters of a batch, in device memory."""

import struct
from collections.abc import Sequence

import torch

from ..device import to_device
from ..grouping import sorted_places
from ..pointer_table import ALIGNMENT, SMALL_CACHE_SIZE, cached, check_storage
from ..records import AdapterTable


def adapter_table(
    lora_A: Sequence[torch.Tensor], lora_B: Sequence[torch.Tensor], scaling: Sequence[float]
) -> AdapterTable:
    """Returns the table of adapters with factors a (r, d_in) and b (d_out, r) of one dtype, all contiguous. The table
    of the same factors and scalings is kept, as in pointer_table.py. Twin: ``reference.batched.adapter_table``."""
    dtype, device = lora_A[0].dtype, lora_A[0].device
    for factor in (*lora_A, *lora_B):
        assert factor.dtype is dtype, f"dtype: expected {dtype} of all, got {factor.dtype}"
        check_storage(factor)
    adapters = zip(lora_A, lora_B, scaling, strict=True)
    numbers = [(a.data_ptr(), b.data_ptr(), a.shape[0], scale) for a, b, scale in adapters]

    def build() -> tuple[torch.Tensor, int, bool]:
        rows = [(a, b, r, _bits(scale)) for a, b, r, scale in numbers]
        aligned = all(address % ALIGNMENT == 0 for row in rows for address in row[:2])
        return to_device(rows, torch.int64, device), max(r for *_, r, _ in rows), aligned

    entries, r, aligned = cached("adapters", [device, numbers], build, SMALL_CACHE_SIZE)
    return AdapterTable(lora_A, lora_B, scaling, r, entries, aligned)


def sorted_rows(
    adapters: Sequence[int], n_adapters: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``rows`` and ``ends`` on the device for samples of ``size`` rows each, whose adapters the host knows; a
    number below 0 stands for none. They are kept like tables. Twin: ``reference.batched.sorted_rows``."""

    def build() -> tuple[torch.Tensor, ...]:
        return tuple(to_device(numbers, torch.int32, device) for numbers in sorted_places(adapters, n_adapters, size))

    return cached("rows", [device, list(adapters), n_adapters, size], build)


def _bits(scaling: float) -> int:
    """Returns the bits of the scaling in float32, as an unsigned number."""
    return int.from_bytes(struct.pack("<f", scaling), "little")
