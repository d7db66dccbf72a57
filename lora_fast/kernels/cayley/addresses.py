"""Lists of addresses for launches over many tensors that move at every call: kernels read the addresses from memory.

Grid      A call's results are slices of one buffer, allocated at once. The list holds the address of every result, then
          of every input. It is copied from the host and cached as tables are (pointer_table.py).
Capture   In a CUDA graph, new addresses from the host would be wrong at the next replay, so no list is copied. The
          inputs are copied into the buffer instead, and the list is offsets + the buffer's address, a number that the
          graph stores by value. The offsets depend on sizes alone and are on the device since the call before, so run
          once what is to be captured.
Shapes    Slices start at multiples of 16 bytes. Inputs that do not are copied.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch

from .. import pointer_table
from ..launch import report_addresses
from ..pointer_table import ALIGNMENT

Kinds = list[tuple[tuple[int, ...], torch.dtype]]  # shapes and dtypes of tensors


class AddressList(NamedTuple):
    """The addresses of a call's results and inputs.

    Attributes:
        results: the results, uninitialised.
        addresses: int64, of the results, then of the inputs, on the device.
        inputs: the tensors at the inputs' addresses, some of them copies. Hold them until the launches are made.
    """

    results: list[torch.Tensor]
    addresses: torch.Tensor
    inputs: list[torch.Tensor]


def allocate(result_kinds: Kinds, inputs: list[torch.Tensor], device: torch.device) -> AddressList:
    """Allocates results of these shapes and dtypes, and lists their addresses and those of the contiguous inputs."""
    kinds = result_kinds + [(x.shape, x.dtype) for x in inputs]
    sizes = tuple(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)
    offsets, offsets_on_device = pointer_table.cached("offsets", [device, *sizes], lambda: _offsets(sizes, device))
    captured = pointer_table.capturing()
    end = offsets[-1] if captured else offsets[len(result_kinds)]
    buffer = torch.empty(end // torch.float32.itemsize, dtype=torch.float32, device=device)
    start = buffer.data_ptr()
    if captured:
        slices = _slices(buffer, kinds, offsets)
        results, copies = slices[: len(result_kinds)], slices[len(result_kinds) :]
        if copies:
            torch._foreach_copy_(copies, inputs)
        on_device = offsets_on_device + start
        report_addresses(on_device, slices)
        return AddressList(results, on_device, copies)
    inputs = [x if pointer_table.is_aligned(x) else x.clone() for x in inputs]
    addresses = [*(start + offset for offset in offsets[: len(result_kinds)]), *(x.data_ptr() for x in inputs)]
    on_device = pointer_table.cached(
        "addresses", [device, *addresses], lambda: pointer_table.to_device(addresses, torch.int64, device)
    )
    results = _slices(buffer, result_kinds, offsets)
    report_addresses(on_device, results + inputs)
    return AddressList(results, on_device, inputs)


def _offsets(sizes: tuple[int, ...], device: torch.device) -> tuple[list[int], torch.Tensor]:
    """Returns the start of each slice and the end of the last one, in bytes, and the starts on the device."""
    padded = (-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    offsets = list(accumulate(padded, initial=0))
    return offsets, pointer_table.to_device(offsets[:-1], torch.int64, device)


def _slices(buffer: torch.Tensor, kinds: Kinds, offsets: list[int]) -> list[torch.Tensor]:
    views = {dtype: buffer.view(dtype) for dtype in {dtype for _, dtype in kinds}}
    return [
        views[dtype].as_strided(shape, _strides(shape), offset // dtype.itemsize)
        for (shape, dtype), offset in zip(kinds, offsets, strict=False)
    ]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of a contiguous vector or matrix."""
    return (1,) if len(shape) == 1 else (shape[1], 1)
