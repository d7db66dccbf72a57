"""What a GPU's driver gets from a layer, by the real launch path of Triton on the stub driver (stub_driver.py): on the
limits of four cards everything launches, launch plans say what Triton's JIT would say, what does not fit is named."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("Triton needs Linux", allow_module_level=True)

import stub_driver
import stub_runs

pytestmark = pytest.mark.skipif(stub_driver.COMPILER is None, reason="needs a C compiler, which builds the stub driver")
RUNS = Path(stub_runs.__file__)


@cache
def run(command: str, arch: int = 90) -> dict:
    """In a process of its own: the driver cannot be changed under Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    words = [sys.executable, "-W", "ignore", RUNS, command, "--arch", str(arch)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", stub_runs.ARCHS, ids="sm_{}".format)
def test_layers_launch_on_each_card(arch):
    """Ranks 1 … 256, adapter dtypes, dropout, bias, 1 … 8,192 tokens, GEMM strategies: every two values of any two
    meet. ``make launches`` runs all combinations."""
    result = run("sample", arch)
    assert result["failures"] == []
    assert result["cases"] >= 40 and result["launches"] > 5 * result["cases"] and result["kernels"] > 100
    assert result["spilling"] == {}


def test_the_sample_meets_every_pair():
    cases = stub_runs.pairwise()
    for one in stub_runs.DIMENSIONS:
        for other in stub_runs.DIMENSIONS:
            pairs = {(case[one], case[other]) for case in cases}
            expected = len(stub_runs.DIMENSIONS[one]) * (len(stub_runs.DIMENSIONS[other]) if one != other else 1)
            assert len(pairs) == expected, (one, other)


def test_a_plan_launches_what_the_jit_would():
    """210 random calls, of which each changes something: shapes, strides, alignment, dtypes, bias, dropout, stream,
    device, TF32, which gradients are needed."""
    result = run("proof")
    assert result["differences"] == []
    assert result["launches"] > 500 and result["plans"] > 100
    assert min(result["changes"].values()) >= 3, result["changes"]
    assert result["kernels"]["lora_linear_kernel"] >= 50, result["kernels"]


def test_a_kernel_that_spills_is_launched_with_more_registers():
    result = run("roomy")
    assert all(result["alike"]) and all(result["others"]) and len(result["others"]) == 7


def test_backward_in_an_autocast_region_computes_in_forwards_dtypes():
    """Whether its plan was made inside one or outside."""
    assert run("backward_in_autocast")["dtypes"] == [["torch.float32"]] * 4


def test_gluon_launches_where_it_was_measured_and_can_run():
    """By its plan as by Triton's JIT. Rows of 515 elements TMA does not address: there another strategy runs."""
    result = run("gluon")
    assert result["differences"] == []
    count = [launched.count("lora_gluon_linear_kernel") for launched in result["launched"]]
    assert count == [2, 2, 2, 2, 2, 1]
    assert not any("gluon" in name for launched in run("gluon", 80)["launched"] for name in launched)


def test_batch_sizes_share_compiled_kernels():
    """Two more than there are kernels, on a layer whose GEMM is cuBLAS's mostly; on one that takes every way with its
    batch size a kernel has several roles (docs/measured.md has how many), and no more variants than these."""
    loaded = run("variants")
    narrow, wide = loaded["4096 → 64, float32"], loaded["4096 → 4096, float32"]
    assert sum(narrow.values()) <= len(narrow) + 2, narrow
    assert sum(wide.values()) <= len(wide) + 4, wide


def test_a_capture_after_a_warm_up_loads_nothing():
    """A seed of the host, then one on the device: the same compiled kernels."""
    result = run("capture")
    for way in ("by estimate", "cublas thin"):
        assert result[way]["loads"] == 0 and result[way]["launches"] >= 5
    assert "CAPTURE_UNSUPPORTED" in result["refused"]


def test_an_optimizers_step_is_launched_by_plans():
    """They say what Triton's JIT would say, wherever gradients and the learning rate are; a capture after one step
    loads and copies nothing. Pairs that are not aligned are launched apart."""
    result = run("optimizer_steps")
    assert result["differences"] == [] and not any(result["loads"].values())
    assert len(result["launches"]) == 24
    for words, launched in result["launches"].items():
        expected = stub_runs.STEPS[words.split(",")[0]]
        small = sum(name in ("lora_imbalance_kernel", "lora_spd_solve_kernel") for name in launched)
        assert expected <= len(launched) <= 2 * expected + small, (words, launched)


def test_public_functions_launch_what_their_tensors_allow():
    """A plan that was made for aligned matrices is not taken for others."""
    result = run("public_functions")
    aligned, others = result["cubins"]
    assert len(aligned) == 2 and not set(aligned) & set(others)
    expected = ["step", "gram", "gram", "scalora_solve", "scales", "merge"]
    assert result["launched"] == [f"lora_{name}_kernel" for name in expected]


def test_what_does_not_fit_is_named_before_its_launch():
    result = run("too_large", 89)
    said = ("lora_grad_a_kernel", "BLOCK_T=128", "NVIDIA GeForce RTX 4090", "101376", "204800 bytes", "set_backend")
    for word in said:
        assert word in result["error"], result["error"]
    assert "lora_grad_a_kernel" not in result["launched"] and "lora_grad_a_kernel" in result["after"]
    assert run("too_large", 90)["error"] is None


def test_launch_hooks_see_every_launch():
    result = run("hooks")
    assert result["seen"] == result["launched"] and len(result["seen"]) == 7


def test_threads_share_plans():
    result = run("threads")
    assert result["errors"] == [] and result["kept"] <= 3 and result["launches"] > 500
