"""The machine that figures come from: its device, its versions, the size of this process."""

from __future__ import annotations

import platform
from importlib import metadata

import torch


def environment() -> dict[str, object]:
    """Where the figures come from."""
    packages = ("lora-fast", "torch", "triton", "transformers", "peft", "accelerate")
    threads = torch.get_num_threads()
    on_cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _process_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
