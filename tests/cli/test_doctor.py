"""``lora-fast doctor`` on this machine, and its findings on broken installations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pinned_versions import pinned
from typer.testing import CliRunner

from lora_fast import backend, platforms, set_backend
from lora_fast.cli import app
from lora_fast.cli.doctor import checkup, installation
from lora_fast.kernels import tiles, tuned

TROUBLESHOOTING = (Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def invoke(*options: str):
    return CliRunner().invoke(app, ["doctor", *options])


@pytest.fixture
def few(monkeypatch):
    """Replaces the checks by one that works and those that are given."""

    def set_checks(*checks):
        works = checkup.Check("layer, torch backend", True, checkup._torch_layer, "")
        monkeypatch.setattr(checkup, "checks", lambda: [works, *checks])

    return set_checks


def broken(core: bool) -> checkup.Check:
    """Returns a check that fails."""

    def run():
        raise RuntimeError("no such thing\nmore of it")

    return checkup.Check("some part", core, run, "pip install something")


def test_doctor_works_on_this_machine():
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    installed = report["versions"]["torch"].split("+")[0]  # PyPI's CUDA build has +cu130 in __version__ only
    assert report["core_works"] and installed == torch.__version__.split("+")[0]
    assert report["backend"]["name"] == ("triton" if torch.cuda.is_available() else "torch")
    findings = {check["name"]: check for check in report["checks"]}
    has_gpu = torch.cuda.is_available() or installation.driver() != installation.NO_DRIVER
    states = {name: finding["state"] for name, finding in findings.items() if finding["state"] != "works"}
    assert states == ({} if has_gpu else {"GPU": "none"})
    assert findings["compiling a kernel"]["seen"].endswith("0 spills")
    assert findings["fusing a PEFT model"]["seen"].startswith("fused 2 layers")


def test_broken_optional_part_has_a_remedy_and_exit_code_0(few):
    few(broken(core=False))
    result = invoke()
    assert result.exit_code == 0
    assert "some part: RuntimeError: no such thing" in result.output and "pip install something" in result.output
    assert "The core works. These parts do not: some part." in result.output


def test_broken_core_has_exit_code_1(few):
    few(broken(core=True))
    result = invoke()
    assert result.exit_code == 1 and "the core does not work: some part" in result.output
    as_json = invoke("--json")
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["core_works"] is False


def test_backend_that_cannot_run_has_exit_code_1(few, monkeypatch):
    few()
    monkeypatch.setattr(installation, "which_backend", lambda: ("none", "expected a CUDA device"))
    result = invoke()
    assert result.exit_code == 1 and "expected a CUDA device" in result.output


def test_layer_check_fails_for_a_wrong_layer(monkeypatch):
    monkeypatch.setattr(checkup, "layer_error", lambda device: 1e-3)
    finding = examined("layer, torch backend")
    assert finding.core and finding.state == checkup.FAILS and "off by 1.0e-03" in finding.seen


def test_layer_error_is_relative_to_the_formula(monkeypatch):
    from lora_fast.ops.reference import linear as reference

    grad_a = reference.grad_a
    device = torch.device("cpu")
    with set_backend("torch"):
        assert checkup.layer_error(device) < checkup.ERROR[torch.float32]
        monkeypatch.setattr(reference, "grad_a", lambda *arguments: 1.01 * grad_a(*arguments))
        assert checkup.layer_error(device) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", checkup.ERROR, ids=str)
@pytest.mark.parametrize("strategy", ["fused", "cublas"])
def test_kernels_are_within_the_allowed_error(dtype, strategy):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with set_backend("triton"), tiles.assume(strategy=strategy):
        assert 0 < checkup.layer_error(device, dtype) < checkup.ERROR[dtype]


def examined(name: str) -> checkup.Finding:
    """Returns the finding of the check of this name."""
    return checkup.examine(next(check for check in checkup.checks() if check.name == name))


NEW = installation.TESTED | {"torch": "99.1.0"}
OLD = installation.TESTED | {"torch": "2.9.1+cu128", "peft": "0.17.0"}
FEW = {name: version for name, version in installation.TESTED.items() if name not in ("transformers", "matplotlib")}


@pytest.mark.parametrize(("installed", "seen", "remedy"), [
    (NEW, "as required; newer than the tested ones: torch 99.1.0", ""),
    (OLD, "needed: torch>=2.10, peft>=0.18", "pip install 'torch>=2.10' 'peft>=0.18'"),
    (FEW, "needed: transformers>=5.0, matplotlib>=3.9", "pip install 'transformers>=5.0' 'matplotlib>=3.9'"),
], ids=["newer", "too old", "missing"])  # fmt: skip
def test_versions_are_checked_against_the_requirements(monkeypatch, installed, seen, remedy):
    monkeypatch.setattr(installation, "version", lambda package: installed.get(package, installation.ABSENT))
    finding = examined("versions")
    assert (finding.state == checkup.FAILS) is bool(remedy)
    assert (finding.seen, finding.remedy) == (seen, remedy)


def test_tested_versions_equal_constraints_newest_txt():
    versions = pinned("constraints-newest.txt")
    assert {name: versions[name] for name in installation.TESTED} == installation.TESTED


def no_gpu(monkeypatch, driver: str, cuda: str | None) -> None:
    """Lets torch see no GPU, beside this driver and as a build for this CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(installation, "driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def test_missing_driver_is_no_failure(monkeypatch):
    no_gpu(monkeypatch, installation.NO_DRIVER, None)
    finding = examined("GPU")
    assert finding.state == checkup.ABSENT and "--gpus all" in finding.remedy


def test_torch_for_cpus_beside_a_driver_fails(monkeypatch):
    no_gpu(monkeypatch, "580.65.06", None)
    finding = examined("GPU")
    assert finding.state == checkup.FAILS and "580.65.06" in finding.seen and "a build for CPUs" in finding.seen
    assert finding.remedy.startswith("Install a build of torch for CUDA")


def test_driver_too_old_for_torch_is_reported_in_torch_words(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    no_gpu(monkeypatch, "470.82", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    finding = examined("GPU")
    assert finding.state == checkup.FAILS and "is too old (found version 11040)" in finding.seen
    assert "update it" in finding.remedy and "CUDA_VISIBLE_DEVICES" in finding.remedy


@pytest.fixture
def a_gpu(monkeypatch):
    """Gives the machine an H100 without memory, which tests replace."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(platforms, "_gpu_obstacles", {})
    monkeypatch.setattr(platforms, "triton_obstacle", platforms.triton_obstacle.__wrapped__)


def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))


def rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")


def no_triton(monkeypatch):
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    version = installation.version
    monkeypatch.setattr(installation, "version", lambda name: "not installed" if name == "triton" else version(name))


def xpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: torch.device("xpu"))


@pytest.mark.parametrize("change", [old_gpu, rocm, no_triton, xpu])
def test_docs_and_doctor_agree_on_machines_that_run_plain_torch(monkeypatch, a_gpu, change):
    change(monkeypatch)
    finding = examined("GPU")
    assert finding.state == checkup.ABSENT and finding.seen.startswith("plain torch runs on it: ")
    cause = finding.seen.removeprefix("plain torch runs on it: ")
    row = next(line for line in TROUBLESHOOTING.splitlines() if line.startswith(f"  | `{cause}`"))
    has_pip, has_torch = "pip install 'triton" in finding.remedy, "LORA_FAST_BACKEND=torch" in finding.remedy
    assert has_pip is ("`pip` command" in row) and has_torch is not has_pip
    names = [check.name for check in checkup.checks()]
    assert "layer, Triton kernels" not in names and ("compiling a kernel" in names) is (change is not no_triton)
    with set_backend("auto"):
        assert cause in backend.fallback(installation.accelerator())


def test_gpu_that_runs_the_kernels_is_named(a_gpu):
    assert checkup._gpu() == "sm_90"


def test_missing_triton_is_an_optional_part(monkeypatch):
    no_triton(monkeypatch)
    monkeypatch.setattr(platforms, "triton_obstacle", platforms.triton_obstacle.__wrapped__)
    finding = examined("Triton")
    assert finding.state == checkup.ABSENT and finding.remedy.startswith("pip install 'triton")


@pytest.mark.parametrize(("installed", "fitting", "state"), [
    ("3.8.0", "triton~=3.8.0", "works"),
    ("3.8.2", "triton~=3.8.0", "works"),
    ("3.6.0", "triton==3.6.0", "works"),
    ("3.9.0", "triton~=3.8.0", "fails"),
    ("3.7.1", "triton==3.6.0", "fails"),
])  # fmt: skip
def test_triton_that_torch_was_not_built_for_fails(monkeypatch, installed, fitting, state):
    monkeypatch.setattr(installation, "version", lambda name: installed)
    monkeypatch.setattr(platforms, "fitting_triton", lambda: fitting)
    finding = examined("Triton")
    assert finding.state == state and finding.remedy == (f"pip install '{fitting}'" if state == "fails" else "")
    assert installed in finding.seen and (state == "works" or f"was built for {fitting}" in finding.seen)


def test_interpreter_left_on_fails_the_kernel_check(monkeypatch):
    for value in ("1", "true", "On"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        finding = checkup.examine(checkup.Check("layer, Triton kernels", True, checkup._gpu_layer, ""))
        assert finding.state == checkup.FAILS and finding.remedy == "Unset TRITON_INTERPRET."


@pytest.mark.parametrize(("variable", "value", "seen"), [
    ("CC", "/no/such/compiler", "FileNotFoundError"),
    ("CC", "false", "RuntimeError: false: exit code 1"),
    ("PATH", "", "neither gcc nor clang"),
], ids=["not there", "broken", "none"])  # fmt: skip
def test_broken_compiler_is_named(monkeypatch, variable, value, seen):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(variable, value)
    finding = examined("C compiler")
    assert finding.state == checkup.FAILS and seen in finding.seen and "install gcc" in finding.remedy


def test_damaged_file_of_tune_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.path().parent.mkdir()
    tuned.path().write_text("{")
    finding = examined("tuned choices")
    assert finding.state == checkup.FAILS and "tuned.json" in finding.seen
    assert finding.remedy == "lora-fast tune --clear"


def test_failure_in_another_process_reports_its_last_line():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        checkup._run_in_process("1 / 0")


def test_versions_report_a_missing_driver(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert installation.versions()["driver"] == installation.NO_DRIVER
