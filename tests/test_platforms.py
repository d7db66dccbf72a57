"""Where the kernels run, stood in for: builds of torch, GPUs and triton packages that this machine does not have."""

import subprocess
import sys
from importlib import metadata
from types import ModuleType

import pytest
import torch

from lora_fast import checks, platforms

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Lets each test find out anew, on a build of torch for CUDA with an H100."""
    monkeypatch.setattr(platforms, "_gpu_obstacles", {})
    monkeypatch.setattr(platforms, "triton_obstacle", platforms.triton_obstacle.__wrapped__)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


def test_kernels_run_on_an_h100():
    assert platforms.obstacle(CUDA) is None
    platforms.require("lora-fast tune", None)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_gpu_older_than_ampere_runs_plain_torch(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    cause = f"expected a GPU of sm_80 (Ampere) or later, got sm_{capability[0]}{capability[1]}"
    assert platforms.obstacle(CUDA) == (cause, "")
    with pytest.raises(checks.BackendError, match=r"^lora-fast tune: expected a GPU of sm_80"):
        platforms.require("lora-fast tune", platforms.obstacle(CUDA))


def test_gpus_are_asked_one_by_one_and_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: asked.append(index) or [(7, 5), (9, 0)][index]
    )
    for _ in range(2):
        assert platforms.gpu_obstacle(0) is not None and platforms.gpu_obstacle(1) is None
    assert asked == [0, 1]


def test_rocm_build_runs_plain_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    assert platforms.obstacle(CUDA).cause == "expected a CUDA build of torch, got one for ROCm"


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_other_accelerators_run_plain_torch(kind):
    assert platforms.obstacle(torch.device(kind, 0)).cause == f"expected a CUDA device, got {kind}"


@pytest.mark.parametrize("error", [AssertionError("Torch not compiled with CUDA enabled"), RuntimeError("no GPU")])
def test_device_of_a_fake_tensor_need_not_exist(monkeypatch, error):
    def get_device_capability(index):
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    assert platforms.obstacle(CUDA) is None


def emptied() -> ModuleType:
    """Returns what Python imports where a removed package has left its folder behind."""
    return ModuleType("triton")


def old() -> ModuleType:
    package = ModuleType("triton")
    package.__version__ = "3.5.1"
    return package


@pytest.mark.parametrize(("modules", "got"), [
    ({"triton": None, "triton.language": None}, "no triton package"),
    ({"triton": emptied(), "triton.language": None}, "no triton package"),
    ({"triton": emptied(), "triton.language": ModuleType("triton.language")}, "AttributeError"),
    ({"triton": old(), "triton.language": ModuleType("triton.language")}, "Triton 3.5.1"),
], ids=["missing", "emptied", "broken", "old"])  # fmt: skip
@pytest.mark.parametrize("system", ["linux", "win32", "darwin"])
def test_triton_that_cannot_be_used_has_a_remedy(monkeypatch, modules, got, system):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "platform", system)
    obstacle = platforms.obstacle(CUDA)
    assert obstacle.cause.startswith(f"expected Triton 3.6 or later, got {got}")
    assert obstacle.remedy == (f"pip install '{platforms.fitting_triton()}'" if system == "linux" else "")


@pytest.mark.parametrize(("requires", "version", "expected"), [
    (['triton==3.6.0; platform_system == "Linux" and platform_machine == "x86_64"'], "2.10.0+cu128", "triton==3.6.0"),
    (["filelock", 'triton~=3.8.0 ; platform_system == "Linux"'], "2.14.1+cu130", "triton~=3.8.0"),
    (["filelock"], "2.13.0+cpu", "triton~=3.7.0"),
    (["triton-rocm==3.6.0"], "2.11.0+rocm7.1", "triton~=3.6.0"),
    (None, "2.99.0", "triton>=3.6"),
])  # fmt: skip
def test_fitting_triton_is_what_torch_requires_or_its_release_was_built_for(monkeypatch, requires, version, expected):
    monkeypatch.setattr(metadata, "requires", lambda package: requires)
    monkeypatch.setattr(torch, "__version__", version)
    assert platforms.fitting_triton() == expected


WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"


def run_without_triton(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT_TRITON + code], capture_output=True, text=True)


def test_everything_but_kernels_imports_without_triton():
    code = """
import importlib, pkgutil, lora_fast
for module in pkgutil.walk_packages(lora_fast.__path__, "lora_fast."):
    if not module.name.startswith("lora_fast.kernels."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError:
            print(module.name)
"""
    process = run_without_triton(code)
    needing = ["lora_fast.batches.grouped", "lora_fast.cli.tune.search"]  # imported where kernels run
    assert process.returncode == 0 and process.stdout.split() == needing, process.stderr


@pytest.mark.parametrize(("arguments", "code", "printed"), [
    ("--help", 0, "lora-fast finetune"),
    ("tune --show", 0, "Nothing measured yet"),
    ("inspect", 2, "lora-fast inspect: expected Triton 3.6 or later, got no triton package; pip install 'triton"),
    ("bench --quick", 2, "lora-fast bench: expected Triton 3.6 or later, got no triton package; pip install 'triton"),
])  # fmt: skip
def test_commands_without_triton_work_or_name_it(tmp_path, monkeypatch, arguments, code, printed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    process = run_without_triton(
        f"from lora_fast.cli import main\nsys.argv = ['lora-fast', *{arguments.split()}]\nmain()"
    )
    assert process.returncode == code and printed in process.stdout + process.stderr, process.stderr
