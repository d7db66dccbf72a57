"""Tests the launches that a GPU's driver receives from a layer, through Triton's real launch path into the stub driver
(stub_driver.py). With the limits of four cards every layer launches, plans launch the same as Triton's JIT, and a
kernel that does not fit raises an error that names it."""

import itertools
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

if sys.platform != "linux":
    pytest.skip("Triton needs Linux", allow_module_level=True)

import stub_driver
import stub_runs

from lora_fast.kernels.launch import MOST_REGISTERS, takes_more_registers

pytestmark = pytest.mark.skipif(stub_driver.COMPILER is None, reason="needs a C compiler, which builds the stub driver")
RUNS = Path(stub_runs.__file__)


@cache
def run(command: str, arch: int = 90) -> dict:
    """Returns the result of a command of stub_runs.py. It runs in another process, because Triton's driver cannot be
    replaced once it is in use."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    words = [sys.executable, "-W", "ignore", RUNS, command, "--arch", str(arch)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


SAMPLES = [
    pytest.param("sample", arch, 40, 100, marks=[] if arch == 90 else pytest.mark.budget) for arch in stub_runs.ARCHS
]


# By default an H100, and dropout on a 4090, which has the least shared memory.
@pytest.mark.parametrize("command, arch, cases, kernels", [*SAMPLES, ("dropout", 89, 20, 50)])
def test_layers_launch_on_each_card(command, arch, cases, kernels):
    """Covers ranks 1 … 256, adapter dtypes, dropout, bias, 1 … 8,192 tokens and GEMM strategies. Every pair of values
    of two dimensions occurs in one case. ``make launches`` runs all combinations."""
    result = run(command, arch)
    assert result["failures"] == []
    assert result["cases"] >= cases and result["launches"] > 5 * result["cases"] and result["kernels"] > kernels
    assert result["spilling"] == {}


def test_sample_contains_every_pair_of_values():
    cases = stub_runs.pairwise()
    for first, second in itertools.combinations_with_replacement(stub_runs.DIMENSIONS, 2):
        pairs = {(case[first], case[second]) for case in cases}
        n_first, n_second = len(stub_runs.DIMENSIONS[first]), len(stub_runs.DIMENSIONS[second])
        assert len(pairs) == (n_first if first == second else n_first * n_second), (first, second)


def test_plans_launch_the_same_as_the_jit():
    """Runs 210 random calls that differ in shapes, strides, alignment, dtypes, bias, dropout, stream, device, TF32 or
    the gradients that are needed."""
    result = run("proof")
    assert result["differences"] == []
    assert result["launches"] > 500 and result["plans"] > 100
    assert min(result["changes"].values()) >= 3, result["changes"]
    assert result["kernels"]["lora_linear_kernel"] >= 50, result["kernels"]


@pytest.mark.budget
@pytest.mark.parametrize("arch", stub_runs.ARCHS)
def test_groups_launch_on_each_card(arch):
    """Covers two to four members with ranks 1 … 256 as ``test_layers_launch_on_each_card`` does."""
    result = run("groups", arch)
    assert result["failures"] == [] and result["spilling"] == {}
    assert result["cases"] >= 25 and result["launches"] > 10 * result["cases"]


def test_plans_of_groups_launch_the_same_as_the_jit():
    """A group of three takes 2 launches forward and 5 backward, and every kernel of groups is among the launched. The
    gradients of members with nodes of their own have plans, too."""
    result = run("group_proof")
    assert result["differences"] == [] and result["plans"] > 30
    names = ["project", "linear", "grad_s_b", "sum", "grad_a", "sum", "grad_x"]
    assert result["usual"] == [f"lora_group_{name}_kernel" for name in names]
    assert "lora_group_update_kernel" in result["kernels"]


DORA_KERNELS = "weight_norms", "column_scale", "column_scale_backward", "project", "scaled_update", "scaled_grads"
FOUR_BIT = [pytest.param("four_bit_proof", arch, marks=pytest.mark.budget) for arch in stub_runs.ARCHS]


@pytest.mark.parametrize("command, arch", [("four_bit", 90), *FOUR_BIT])
def test_plans_over_four_bit_weights_launch_the_same_as_the_jit(command, arch):
    """A call has a plan for each of both GEMMs. Double quantisation takes a launch more for each."""
    result = run(command, arch)
    assert result["differences"] == [] and result["spilling"] == []
    assert result["kernels"].count("lora_four_bit_kernel") == 2 * result["calls"]
    assert result["kernels"].count("lora_absmax_kernel") == 2
    assert result["plans"] >= 0.9 * result["calls"]


DORA = [pytest.param("dora_proof", arch, marks=pytest.mark.budget) for arch in stub_runs.ARCHS]


@pytest.mark.parametrize("command, arch", [("dora", 90), *DORA])
def test_plans_of_dora_launch_the_same_as_the_jit(command, arch):
    """A call has a plan for each of its five functions. 768 columns take token splits of the column scale's backward,
    whose sum is a launch more."""
    result = run(command, arch)
    assert result["differences"] == [] and result["spilling"] == []
    assert result["kernels"][:6] == [f"lora_{name}_kernel" for name in DORA_KERNELS]
    assert {"lora_sum_partials_kernel", "lora_grad_a_kernel"} <= {*result["kernels"]}
    assert result["plans"] >= 15


def test_kernel_that_spills_is_launched_with_more_registers():
    result = run("spilling")
    assert all(result["same_launches"]) and all(result["other_cubins"]) and len(result["other_cubins"]) == 7


@pytest.mark.parametrize(
    "options, warps, more",
    [
        ({}, 8, True),
        ({"maxnreg": 128}, 8, True),
        ({"maxnreg": MOST_REGISTERS}, 8, False),
        ({"maxnreg": 128}, 16, False),
    ],
)
def test_kernel_takes_more_registers_where_its_limit_is_lower(options, warps, more):
    """Such a kernel is spd_inverse above rank 64, which spills at its limit on sm_120."""
    compiled = SimpleNamespace(metadata=SimpleNamespace(num_warps=warps))
    assert takes_more_registers(compiled, options) is more


def test_backward_under_autocast_computes_in_forwards_dtypes():
    """The plan is made once inside the autocast region and once outside."""
    assert run("backward_in_autocast")["dtypes"] == [["torch.float32"]] * 4


def test_gluon_launches_if_it_was_measured_and_can_run():
    """Plans launch the same as the JIT. TMA cannot address rows of 515 elements, so the last case uses another strategy
    forward."""
    result = run("gluon")
    assert result["differences"] == []
    count = [launched.count("lora_gluon_linear_kernel") for launched in result["launched"]]
    assert count == [2, 2, 2, 2, 2, 1]
    assert not any("gluon" in name for launched in run("gluon", 80)["launched"] for name in launched)


def test_batch_sizes_share_compiled_kernels():
    """A layer whose GEMM is mostly cuBLAS's loads at most two compiled variants more than it has kernels. In a layer
    that takes different ways for different batch sizes a kernel has several roles, so there are up to four more
    (docs/measured.md has the counts)."""
    loaded = run("variants")
    narrow, wide = loaded["4096 → 64, float32"], loaded["4096 → 4096, float32"]
    assert sum(narrow.values()) <= len(narrow) + 2, narrow
    assert sum(wide.values()) <= len(wide) + 4, wide


def test_capture_after_a_warm_up_loads_no_module():
    """The warm-up has its seed on the host, the capture on the device. Both use the same compiled kernels."""
    result = run("capture")
    for way in ("by estimate", "cublas thin"):
        assert result[way]["loads"] == 0 and result[way]["launches"] >= 5
    assert "CAPTURE_UNSUPPORTED" in result["refused"]  # the stub does detect loads during a capture


def test_optimizer_step_is_launched_by_plans():
    """Plans launch the same as the JIT for any addresses of the gradients and either place of the learning rate. A
    capture after one step loads and copies nothing. Pairs that are not aligned take launches of their own."""
    result = run("optimizer_steps")
    assert result["differences"] == [] and not any(result["loads"].values())
    assert len(result["launches"]) == 24
    for words, launched in result["launches"].items():
        expected = stub_runs.STEPS[words.split(",")[0]]
        small = sum(name in ("lora_imbalance_kernel", "lora_spd_solve_kernel") for name in launched)
        assert expected <= len(launched) <= 2 * expected + small, (words, launched)


def test_public_functions_use_other_kernels_for_unaligned_matrices():
    """A plan that was made for aligned matrices must not be used for others."""
    result = run("public_functions")
    aligned, others = result["cubins"]
    assert len(aligned) == 2 and not set(aligned) & set(others)
    expected = ["step", "gram", "gram", "scalora_solve", "scales", "merge"]
    assert result["launched"] == [f"lora_{name}_kernel" for name in expected]


def test_kernel_that_does_not_fit_raises_before_its_launch():
    result = run("too_large", 89)
    words = ("lora_grad_a_kernel", "BLOCK_T=128", "NVIDIA GeForce RTX 4090", "101376", "204800 bytes", "set_backend")
    for word in words:
        assert word in result["error"], result["error"]
    assert "lora_grad_a_kernel" not in result["launched"] and "lora_grad_a_kernel" in result["after"]
    assert run("too_large", 90)["error"] is None


def test_launch_hooks_see_every_launch():
    result = run("hooks")
    assert result["seen"] == result["launched"] and len(result["seen"]) == 7


def test_threads_share_plans():
    result = run("threads")
    assert result["errors"] == [] and result["kept"] <= 3 and result["launches"] > 500


def test_launch_waits_for_the_load_by_another_thread():
    """Triton stores a kernel's launcher before it has loaded the kernel."""
    assert run("loads") == []


def test_carveout_takes_effect_at_the_next_call():
    """Forward and backward have 1,024 tiles each, on 132 multiprocessors."""
    programs = [[count, count] for count in (132, 112, 132, 100, 128, 112)]
    assert run("carveout") == [each for each in programs for _ in range(2)]
