"""Finds out what is installed: versions and whether they meet the requirements, devices, and the backend that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import torch

from ... import backend, platforms
from ...checks import BackendError

NAME = "lora-fast"
EXTRAS = ("", "hf", "cli")  # the package without an extra, and the extras that it imports
TESTED = {  # the newest versions that are tested, those of constraints-newest.txt
    "torch": "2.14.1",
    "triton": "3.8.0",
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
    """Returns the versions of Python, of every package, of torch's CUDA and of the NVIDIA driver."""
    result = {"python": sys.version.split()[0]}
    result |= {package: version(package) for package in (NAME, *TESTED)}
    result["CUDA of torch"] = torch.version.cuda or f"none: a build for {_other_platform()}"
    result["driver"] = driver()
    return result


def _other_platform() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "XPUs" if torch.xpu.is_available() else "CPUs"


def version(package: str) -> str:
    """Returns the installed version of a package, or ABSENT."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def unmet() -> list[str]:
    """Returns the requirements of the package that are not met, such as ``transformers>=5.0``."""
    from packaging.requirements import Requirement

    result = []
    for requirement in map(Requirement, metadata.requires(NAME) or ()):
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        installed = version(requirement.name)
        if applies and (installed == ABSENT or not requirement.specifier.contains(installed, prereleases=True)):
            result.append(f"{requirement.name}{requirement.specifier}")
    return list(dict.fromkeys(result))


def triton_fits() -> bool:
    """Returns whether the installed Triton is the release that this torch was built for."""
    from packaging.requirements import Requirement

    return Requirement(platforms.fitting_triton()).specifier.contains(version("triton"), prereleases=True)


def newer_than_tested() -> list[str]:
    """Returns the packages whose major or minor version is newer than the tested one, such as ``torch 2.14.0``."""
    from packaging.version import Version

    installed = {package: version(package) for package in TESTED}
    return [
        f"{package} {number}"
        for package, number in installed.items()
        if number != ABSENT and Version(number).release[:2] > Version(TESTED[package]).release[:2]
    ]


def accelerator() -> torch.device:
    """Returns the GPU or other accelerator that torch uses, or the CPU if torch sees none."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def devices() -> list[str]:
    """Returns a description of every GPU with its arch, memory and what keeps the kernels from it, or of the CPU if
    torch sees no GPU."""
    if accelerator().type == "cpu":
        threads = torch.get_num_threads()
        return [f"CPU, {os.cpu_count()} cores, torch uses {threads} thread{'s' * (threads > 1)}; no GPU seen"]
    if accelerator().type != "cuda":
        return [f"{accelerator().type}, runs plain torch"]
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> str:
    gpu, obstacle = torch.cuda.get_device_properties(index), platforms.gpu_obstacle(index)
    runs = f", runs plain torch: {obstacle.cause}" if obstacle else ""
    return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB{runs}"


def driver() -> str:
    """Returns the version of the NVIDIA driver, or NO_DRIVER."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return NO_DRIVER


def which_backend() -> tuple[str, str]:
    """Returns the backend that runs for a model on the GPU, or on the CPU if there is no GPU, and the reason. The name
    is "none" if no backend can run."""
    tensor = torch.empty(1, dtype=torch.float32, device=accelerator())
    setting = os.environ.get("LORA_FAST_BACKEND", "auto")
    if sentence := backend.fallback(tensor.device):
        return "torch", sentence
    try:
        name = "triton" if backend.uses_triton(tensor) else "torch"
    except BackendError as error:
        return "none", str(error)
    if setting != "auto":
        return name, f"LORA_FAST_BACKEND={setting}"
    return name, "CUDA tensors use the Triton kernels" if tensor.is_cuda else "tensors on a CPU use plain torch"


def interpreter() -> str:
    """Returns whether Triton's interpreter is on, in words."""
    if not backend.interpreting():
        return "off"
    return f"on (TRITON_INTERPRET={os.environ['TRITON_INTERPRET']}): kernels run on the CPU, slowly, for debugging"
