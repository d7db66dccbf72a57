"""Finds out where the Triton kernels can run: on which devices, and with which Triton. What prevents them is an
Obstacle, whose text backend.py raises or warns with, reports contain and ``lora-fast doctor`` prints."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import import_module, metadata
from typing import NamedTuple

import torch

from .checks import BackendError
from .kernels.limits import OLDEST_ARCH, OLDEST_TRITON

# Release of torch → the release of Triton that its GPU wheels for Linux require. Builds for CPUs do not tell.
TRITONS = {"2.10": "3.6", "2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}
NEEDED_TRITON = ".".join(map(str, OLDEST_TRITON))


class Obstacle(NamedTuple):
    """Describes what prevents the kernels from running, and the remedy, which is empty if there is none."""

    cause: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}" if self.remedy else self.cause


def require(user: str, obstacle: Obstacle | None) -> None:
    """Raises BackendError if there is an obstacle to the user, such as ``"lora-fast inspect"``."""
    if obstacle is not None:
        raise BackendError(f"{user}: {obstacle}")


def obstacle(device: torch.device) -> Obstacle | None:
    """Returns what prevents the kernels from running on a device, or None if they run there."""
    if device.type == "cuda":
        return gpu_obstacle(device.index or 0)
    return Obstacle(f"expected a CUDA device, got {device.type}")


_gpu_obstacles: dict[int, Obstacle | None] = {}


def gpu_obstacle(index: int) -> Obstacle | None:
    """Returns ``obstacle`` of the CUDA device of this index. Every call of a layer asks, so the answer is kept."""
    if index not in _gpu_obstacles:
        _gpu_obstacles[index] = _find_gpu_obstacle(index)
    return _gpu_obstacles[index]


# What torch.compiler.assume_constant_result sets. Calling that would import torch._dynamo, which takes a second.
gpu_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_gpu_obstacle(index: int) -> Obstacle | None:
    if torch.version.hip is not None:  # the devices of a ROCm build are called cuda, too
        return Obstacle("expected a CUDA build of torch, got one for ROCm")
    if (capability := _capability(index)) and 10 * capability[0] + capability[1] < OLDEST_ARCH:
        arch = "".join(map(str, capability))
        return Obstacle(f"expected a GPU of sm_{OLDEST_ARCH} (Ampere) or later, got sm_{arch}")
    return triton_obstacle()


def _capability(index: int) -> tuple[int, int] | None:
    """Returns the compute capability of a CUDA device, or None for a fake tensor's, which this machine may not have."""
    try:
        return torch.cuda.get_device_capability(index)
    except (AssertionError, RuntimeError):  # torch is a build for CPUs, or it sees no such GPU
        return None


@cache
def triton_obstacle() -> Obstacle | None:
    """Returns what is wrong with the triton package, or None if the kernels can use it."""
    try:
        import_module("triton.language")  # a folder that a removed package left behind can be imported, but is empty
        version = import_module("triton").__version__
    except Exception as error:  # a package that is broken may raise anything
        return _wrong_triton("no triton package" if _is_missing(error) else f"{type(error).__name__}: {error}")
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        return _wrong_triton(f"Triton {version}")
    return None


def _is_missing(error: Exception) -> bool:
    return isinstance(error, ModuleNotFoundError) and (error.name or "triton").partition(".")[0] == "triton"


def _wrong_triton(got: str) -> Obstacle:
    remedy = f"pip install '{fitting_triton()}'" if sys.platform == "linux" else ""
    return Obstacle(f"expected Triton {NEEDED_TRITON} or later, got {got}", remedy)


def fitting_triton() -> str:
    """Returns the requirement for the Triton that this torch was built for, such as ``triton==3.6.0``."""
    try:
        required = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        required = []
    for requirement in required:  # GPU wheels: ``triton~=3.8.0; platform_system == "Linux"``
        if match := re.match(r"triton\s*\(?((?:==|~=|>=)[^;)\s]+)", requirement):
            return f"triton{match[1]}"
    release = TRITONS.get(".".join(torch.__version__.split(".")[:2]))
    return f"triton~={release}.0" if release else f"triton>={NEEDED_TRITON}"
