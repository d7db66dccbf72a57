"""lora-fast doctor: the whole of it here, and what it says of a broken installation."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from typer.testing import CliRunner

from lora_fast import set_backend
from lora_fast.cli import app, checkup
from lora_fast.kernels import tuned


def invoke(*options: str):
    return CliRunner().invoke(app, ["doctor", *options])


@pytest.fixture
def few(monkeypatch):
    """Replaces the checks; the core's layer works."""

    def set_checks(*checks):
        works = checkup.Check("layer, torch backend", True, checkup._torch_layer, "")
        monkeypatch.setattr(checkup, "checks", lambda: [works, *checks])

    return set_checks


def broken(core: bool) -> checkup.Check:
    def run():
        raise RuntimeError("no such thing\nmore of it")

    return checkup.Check("some part", core, run, "pip install something")


def test_all_of_it_works_here():
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["core_works"] and found["versions"]["torch"] == torch.__version__
    assert found["backend"]["name"] == ("triton" if torch.cuda.is_available() else "torch")
    seen = {check["name"]: check for check in found["checks"]}
    assert [name for name, check in seen.items() if not check["works"]] == []
    assert seen["compiling a kernel"]["seen"].endswith("0 spills")
    assert seen["fusing a PEFT model"]["seen"].startswith("fused 2 layers")


def test_what_is_not_core_is_told_with_its_remedy_and_exit_code_0(few):
    few(broken(core=False))
    result = invoke()
    assert result.exit_code == 0
    assert "some part: RuntimeError: no such thing" in result.output and "pip install something" in result.output
    assert "The core works; what does not: some part." in result.output


def test_a_broken_core_is_an_exit_code(few):
    few(broken(core=True))
    result = invoke()
    assert result.exit_code == 1 and "the core does not work here: some part" in result.output
    as_json = invoke("--json")
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["core_works"] is False


def test_a_backend_that_cannot_run_is_no_core(few, monkeypatch):
    few()
    monkeypatch.setattr(checkup, "which_backend", lambda: ("none", "expected a CUDA device"))
    result = invoke()
    assert result.exit_code == 1 and "expected a CUDA device" in result.output


def test_a_wrong_layer_is_found(monkeypatch):
    monkeypatch.setattr(checkup, "layer_error", lambda device: 1e-3)
    check = next(check for check in checkup.checks() if check.name == "layer, torch backend")
    finding = checkup.examine(check)
    assert finding.core and not finding.works and "off by 1.0e-03" in finding.seen


def test_the_layer_is_compared_with_its_formula(monkeypatch):
    from lora_fast import reference

    right = reference.grad_a
    device = torch.device("cpu")
    with set_backend("torch"):
        assert checkup.layer_error(device) < checkup.ERROR
        monkeypatch.setattr(reference, "grad_a", lambda *arguments: 1.01 * right(*arguments))
        assert checkup.layer_error(device) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("driver", "works"), [(checkup.NO_DRIVER, True), ("580.65.06", False)], ids=["none", "580"])
def test_a_driver_without_a_gpu_in_torch_is_named(monkeypatch, driver, works):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checkup, "_driver", lambda: driver)
    finding = checkup.examine(checkup.checks()[0])
    assert finding.name == "GPU" and finding.works is works and ("580" in finding.seen) is not works


def test_a_damaged_file_of_tune_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.path().parent.mkdir()
    tuned.path().write_text("{")
    check = next(check for check in checkup.checks() if check.name == "tuned choices")
    finding = checkup.examine(check)
    assert not finding.works and "tuned.json" in finding.seen and finding.remedy == "lora-fast tune --clear"


def test_a_failure_in_another_process_says_its_last_line():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        checkup._in_a_process("1 / 0")


def test_no_driver_is_said(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert checkup.versions()["driver"] == checkup.NO_DRIVER
