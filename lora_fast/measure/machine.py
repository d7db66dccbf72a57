"""Describes the machine that figures come from: its device, its versions, its load, the size of this process."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

PACKAGES = ("lora-fast", "torch", "triton", "transformers", "peft", "accelerate")


def environment() -> dict[str, object]:
    """Returns the device, the machine's architecture and the versions of Python and ``PACKAGES``."""
    threads = torch.get_num_threads()
    on_cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
    }


def conditions() -> str:
    """Returns the conditions of a timing on a CPU in words: threads, and the load average before it."""
    threads, cores, load = torch.get_num_threads(), os.cpu_count(), os.getloadavg()[0]
    busy = " (the machine was not quiet: the figures are rough)" if load > cores else ""
    return f"torch {torch.__version__} on {threads} of {cores} CPU cores, load average {load:.1f} before{busy}"


def package_version(package: str) -> str:
    """Returns the installed version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def process_bytes() -> int:
    """Returns the resident size of this process."""
    import psutil

    return psutil.Process().memory_info().rss
