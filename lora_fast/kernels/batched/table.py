"""The table of the adapters of a batch, in device memory."""

import struct
from collections.abc import Sequence

import torch

from ..device import to_device
from ..grouping import sorted_places
from ..pointer_table import SMALL_CACHE_SIZE, cached, check_storage, is_aligned
from ..records import AdapterTable


def adapter_table(
    lora_A: Sequence[torch.Tensor], lora_B: Sequence[torch.Tensor], scaling: Sequence[float]
) -> AdapterTable:
    """Returns the table of adapters with factors a (r, d_in) and b (d_out, r) of one dtype, all contiguous. The table
    of the same factors and scalings is kept, as in pointer_table.py. Twin: ``reference.batched.adapter_table``."""
    for factor in (*lora_A, *lora_B):
        assert factor.dtype is lora_A[0].dtype, f"dtype: expected {lora_A[0].dtype} of all, got {factor.dtype}"
        check_storage(factor)
    numbers = [
        (a.data_ptr(), b.data_ptr(), len(a), _bits(scale)) for a, b, scale in zip(lora_A, lora_B, scaling, strict=True)
    ]
    device = lora_A[0].device
    build = lambda: to_device(numbers, torch.int64, device)
    entries = cached("adapters", [device, numbers], build, SMALL_CACHE_SIZE)
    return AdapterTable(lora_A, lora_B, scaling, entries)


def sorted_rows(
    adapters: Sequence[int], n_adapters: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``rows`` and ``ends`` on the device for samples of ``size`` rows each, whose adapters the host knows; a
    number below 0 stands for none. They are kept like tables. Twin: ``reference.batched.sorted_rows``."""

    def build() -> tuple[torch.Tensor, ...]:
        return tuple(to_device(numbers, torch.int32, device) for numbers in sorted_places(adapters, n_adapters, size))

    return cached("rows", [device, list(adapters), n_adapters, size], build)


def is_table_aligned(table: AdapterTable) -> bool:
    """Returns whether all factors start at multiples of 16 bytes."""
    return all(map(is_aligned, (*table.lora_A, *table.lora_B)))


def _bits(scaling: float) -> int:
    """Returns the bits of the scaling in float32, as an unsigned number."""
    return int.from_bytes(struct.pack("<f", scaling), "little")
