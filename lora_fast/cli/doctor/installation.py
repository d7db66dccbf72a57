"""What ``lora-fast doctor`` finds here: versions, and whether they fit; devices; which backend runs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import torch

from ... import backend
from ...checks import BackendError

NAME = "lora-fast"
EXTRAS = ("", "hf", "cli")  # what the package itself imports, with and without extras
TESTED = {  # as in constraints.txt; older ones down to the package's own requirements are meant to work
    "torch": "2.13.0",
    "triton": "3.7.1",
    "numpy": "2.4.6",
    "safetensors": "0.8.0",
    "peft": "0.21.2",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "typer": "0.29.1",
    "rich": "15.0.0",
    "matplotlib": "3.11.2",
    "jinja2": "3.1.6",
    "psutil": "7.2.2",
}
ABSENT = "not installed"
NO_DRIVER = "none found"


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    found |= {package: version(package) for package in (NAME, *TESTED)}
    found["CUDA of torch"] = torch.version.cuda or "none: a build for CPUs"
    found["driver"] = driver()
    return found


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def unmet() -> list[str]:
    """The package's own requirements that what is installed does not meet: ``transformers>=5.0``."""
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, metadata.requires(NAME) or ()):
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        have = version(requirement.name)
        if wanted and (have == ABSENT or not requirement.specifier.contains(have, prereleases=True)):
            found.append(f"{requirement.name}{requirement.specifier}")
    return list(dict.fromkeys(found))


def newer_than_tested() -> list[str]:
    """``torch 2.14.0``, where another minor version was tested."""
    from packaging.version import Version

    have = {package: version(package) for package in TESTED}
    return [
        f"{package} {here}"
        for package, here in have.items()
        if here != ABSENT and Version(here).release[:2] > Version(TESTED[package]).release[:2]
    ]


def devices() -> list[str]:
    """Every GPU with its arch and memory, or the CPU."""
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return [f"CPU, {os.cpu_count()} cores, torch uses {threads} thread{'s' * (threads > 1)}; no GPU seen"]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return found


def driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return NO_DRIVER


def which_backend() -> tuple[str, str]:
    """The backend that runs for a model on the best device here, and why."""
    tensor = torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu")
    asked = os.environ.get("LORA_FAST_BACKEND", "auto")
    try:
        name = "triton" if backend.uses_triton(tensor) else "torch"
    except BackendError as error:
        return "none", str(error)
    if asked != "auto":
        return name, f"LORA_FAST_BACKEND={asked}"
    return name, "CUDA tensors take the Triton kernels" if tensor.is_cuda else "tensors on a CPU take plain torch"


def interpreter() -> str:
    if not backend.interpreting():
        return "off"
    return f"on (TRITON_INTERPRET={os.environ['TRITON_INTERPRET']}): kernels run on the CPU, slowly, for debugging"
