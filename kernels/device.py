"""The limits of a device (arch, shared memory of a block, number of multiprocessors), and the current device and
stream.

A GPU reports its own limits. Without a GPU (interpreter, inspection, ahead-of-time build) the limits of a known card of
the same arch are used.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    """The limits of one GPU model."""

    name: str
    arch: int  # compute capability as one number: 80, 90, 120
    shared_memory: int  # bytes that a block may use (CUDA's opt-in limit)
    multiprocessors: int


INTERPRETED_ARCH = 80
# One card of each arch that kernels are compiled and inspected for (CUDA programming guide; the cards' data sheets).
CARDS = {
    80: Device("NVIDIA A100", 80, 166_912, 108),
    86: Device("NVIDIA GeForce RTX 3090", 86, 101_376, 82),
    89: Device("NVIDIA GeForce RTX 4090", 89, 101_376, 128),
    90: Device("NVIDIA H100", 90, 232_448, 132),
    100: Device("NVIDIA B200", 100, 232_448, 148),
    120: Device("NVIDIA GeForce RTX 5090", 120, 101_376, 170),
}


def get(device: torch.device) -> Device:
    """Returns the limits of a torch device."""
    return _query_gpu(device.index) if device.type == "cuda" else CARDS[INTERPRETED_ARCH]


@lru_cache
def _query_gpu(index: int | None) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it
    return Device(properties.name, arch, shared_memory, properties.multi_processor_count)


# Every call of a layer needs these two, and torch's public functions around them are slow. CPU builds have neither.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def is_current(tensor: torch.Tensor) -> bool:
    """Returns whether launches go to the tensor's device. This is always true of a CPU tensor."""
    return not tensor.is_cuda or tensor.get_device() == _current_device()


def index(tensor: torch.Tensor) -> int:
    """Returns the index of the tensor's device."""
    return tensor.get_device()


def stream(tensor: torch.Tensor) -> int:
    """Returns the driver's handle of the current stream on the tensor's device."""
    return _current_stream(tensor.get_device())
