"""Tensors that lie elsewhere at every call, for a launch over many of them: kernels read their addresses from a list.

Grid      a call's own results are slices of one buffer, allocated at once. The list has the address of every result,
          then of everything that the call was handed: copied from the host, and kept as tables are (pointer_table.py).
Capture   in a CUDA graph a new address on the host would be a mistake, and the list is not copied. What was handed
          over is copied into the buffer as well, and the list is offsets + the buffer's address: a number, which a
          graph keeps by value. The offsets depend on sizes alone, and have been on the device since the last call: so
          run once what is to be captured.
Shapes    slices start at multiples of 16 bytes; what is handed over does, too, or is copied.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch

from .. import pointer_table
from ..launch import report_addresses

ALIGNMENT = 16  # bytes


class AddressList(NamedTuple):
    """``made``: the results, uninitialised. ``addresses``: int64, of made and given, on the device. ``held``: what lies
    at the addresses of those given; hold on to it until the launches are made."""

    made: list[torch.Tensor]
    addresses: torch.Tensor
    held: list[torch.Tensor]


def place(
    made: list[tuple[tuple[int, ...], torch.dtype]], given: list[torch.Tensor], device: torch.device
) -> AddressList:
    """Memory for results of these shapes and dtypes, and where it and ``given``, contiguous tensors, lie."""
    kinds = made + [(x.shape, x.dtype) for x in given]
    sizes = tuple(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)
    offsets, on_device = pointer_table.kept("offsets", [device, *sizes], lambda: _offsets(sizes, device))
    captured = pointer_table.capturing()
    end = offsets[-1] if captured else offsets[len(made)]
    buffer = torch.empty(end // torch.float32.itemsize, dtype=torch.float32, device=device)
    start = buffer.data_ptr()
    if captured:
        slices = _slices(buffer, kinds, offsets)
        results, copies = slices[: len(made)], slices[len(made) :]
        if copies:
            torch._foreach_copy_(copies, given)
        listed = on_device + start
        report_addresses(listed, slices)
        return AddressList(results, listed, copies)
    given = [x if x.data_ptr() % ALIGNMENT == 0 else x.clone() for x in given]
    addresses = [*(start + offset for offset in offsets[: len(made)]), *(x.data_ptr() for x in given)]
    listed = pointer_table.kept(
        "addresses", [device, *addresses], lambda: pointer_table.to_device(addresses, torch.int64, device)
    )
    results = _slices(buffer, made, offsets)
    report_addresses(listed, results + given)
    return AddressList(results, listed, given)


def _offsets(sizes: tuple[int, ...], device: torch.device) -> tuple[list[int], torch.Tensor]:
    """In bytes: where each slice starts and the last one ends; the starts on the device as well."""
    padded = (-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    offsets = list(accumulate(padded, initial=0))
    return offsets, pointer_table.to_device(offsets[:-1], torch.int64, device)


def _slices(buffer: torch.Tensor, kinds: list[tuple], offsets: list[int]) -> list[torch.Tensor]:
    seen = {dtype: buffer.view(dtype) for dtype in {dtype for _, dtype in kinds}}
    return [
        seen[dtype].as_strided(shape, _strides(shape), offset // dtype.itemsize)
        for (shape, dtype), offset in zip(kinds, offsets, strict=False)
    ]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous vector or matrix."""
    return (1,) if len(shape) == 1 else (shape[1], 1)
