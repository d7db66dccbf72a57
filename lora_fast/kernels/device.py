"""The limits of a device (arch, shared memory of a block, number of multiprocessors), the multiprocessors that torch's
carve-out leaves, the current device and stream, and copies of a few numbers to a device.

A GPU reports its own limits. Without a GPU (interpreter, inspection, ahead-of-time build) the limits of a known card of
the same arch are used.
"""

from collections.abc import Callable
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
    if device.type != "cuda":
        return CARDS[INTERPRETED_ARCH]
    return _query_gpu(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _query_gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it
    return Device(properties.name, arch, shared_memory, properties.multi_processor_count)


# The number of multiprocessors that torch's GEMMs leave to kernels that run beside them, such as NCCL's collectives. It
# is None if nothing is set by ``torch._C._set_sm_carveout_experimental``, which torch warns that it may remove.
carveout: Callable[[], int | None] = getattr(torch._C, "_get_sm_carveout_experimental", lambda: None)


def remaining(multiprocessors: int, carved_out: int | None) -> int:
    """Returns how many multiprocessors a persistent kernel uses beside a carve-out: at least one."""
    return max(1, multiprocessors - (carved_out or 0))


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


def to_device(numbers: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copies a few numbers from the host to the device. To a GPU they go through pinned memory, so that the host does
    not wait."""
    host = torch.tensor(numbers, dtype=dtype, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def stream_on(device: torch.device) -> int:
    """Returns the driver's handle of the current stream on this device, 0 on a CPU."""
    return _current_stream(device.index) if device.type == "cuda" else 0
