"""What a launch needs to know of a device: its arch, the shared memory a block may use, its multiprocessors; and which
device and stream are current.

A GPU is asked for its own limits. Where there is none (the interpreter, inspection, the ahead-of-time build) the limits
of a known card of the arch stand in.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from .limits import OLDEST_ARCH


class Device(NamedTuple):
    """``shared_memory``: bytes a block may use (CUDA's opt-in limit)."""

    name: str
    arch: int  # compute capability as one number: 80, 90, 120
    shared_memory: int
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


def of(device: torch.device) -> Device:
    """The limits of a torch device.

    Raises:
        RuntimeError: a GPU older than sm_80.
    """
    return _of_gpu(device.index) if device.type == "cuda" else CARDS[INTERPRETED_ARCH]


@lru_cache
def _of_gpu(index: int | None) -> Device:
    found = torch.cuda.get_device_properties(index)
    arch = 10 * found.major + found.minor
    if arch < OLDEST_ARCH:
        raise RuntimeError(
            f"lora_fast: expected a GPU of sm_80 (Ampere) or later, got sm_{arch}: "
            "lf.set_backend('torch') runs plain torch on it"
        )
    return Device(found.name, arch, found.shared_memory_per_block_optin, found.multi_processor_count)


# Of a build of torch for CPUs there is neither. They are asked at every call of a layer.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def is_current(tensor: torch.Tensor) -> bool:
    """Whether launches go to the tensor's device. A CPU tensor has none other."""
    return not tensor.is_cuda or tensor.get_device() == _current_device()


def index(tensor: torch.Tensor) -> int:
    """The number of the tensor's device among its kind."""
    return tensor.get_device()


def stream(tensor: torch.Tensor) -> int:
    """The current stream of the tensor's device, as the driver knows it."""
    return _current_stream(tensor.get_device())
