"""``lora-fast inspect``: rows, JSON, exit codes, and the rules themselves."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import triton
from typer.testing import CliRunner

from lora_fast.cli import app
from lora_fast.kernels.inspection import rules
from lora_fast.kernels.inspection.catalogue import Case

CLEAN = {
    "kernel": "lora_linear_kernel",
    "arch": 90,
    "stack": 0,
    "spills": 0,
    "shared": 1024,
    "tensor_core": 6,
    "tma_loads": 2,
    "tf32": 0,
    "in_flight": 1,
    "ahead": 2,
    "step": 88,
}
ALIGNED = Case("linear", "bfloat16", 16, {"adapter": None, "strategy": "fused", "padding": 0})


def run(*options: str):
    return CliRunner().invoke(app, ["inspect", *options])


def test_json_and_table_show_the_same_kernels(monkeypatch):
    options = ("--op", "small_inverse", "--op", "gram", "--arch", "80", "--rank", "16", "--processes", "1")
    as_json = run(*options, "--json")
    assert as_json.exit_code == 0, as_json.output
    rows = {row["kernel"]: row for row in json.loads(as_json.stdout)}
    assert rows.keys() == {"lora_gram_kernel", "lora_small_inverse_kernel"}
    gram = rows["lora_gram_kernel"]
    assert 0 < gram["registers"] <= 255 and 0 < gram["occupancy"] <= 1 and 0 < gram["wide_accesses"] <= gram["accesses"]
    assert 1.0 <= gram["traffic"] <= 1.05 and rows["lora_small_inverse_kernel"]["traffic"] is None
    monkeypatch.setattr(sys.modules["lora_fast.cli.inspect"], "measure", lambda *_: list(rows.values()))
    table = run(*options)
    assert table.exit_code == 0 and "2 kernels, no rule broken." in table.stdout
    assert f"{gram['wide_accesses']}/{gram['accesses']}" in table.stdout


def test_broken_rule_has_exit_code_1(monkeypatch):
    row = CLEAN | {"op": "linear", "dtype": "bfloat16", "r": 16, "variant": {}, "tile": {"num_warps": 4}}
    row |= {"registers": 255, "occupancy": 0.125, "accesses": 1, "wide_accesses": 1, "traffic": None}
    row |= {"broken": ["8 bytes of stack"]}
    monkeypatch.setattr(sys.modules["lora_fast.cli.inspect"], "measure", lambda *_: [row])
    shown = run("--op", "linear")
    assert shown.exit_code == 1 and "8 bytes of stack" in shown.stdout and "1 with a broken rule" in shown.stdout


A_KERNEL_THAT_SPILLS = """
import sys
import torch, triton, triton.language as tl
from lora_fast.cli import app
from lora_fast.kernels.inspection import catalogue

@triton.jit
def lora_hungry_kernel(x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    b_x = tl.load(x + i)  # 512 registers a thread, all needed after the sum
    tl.store(x + i, b_x * tl.sum(b_x))

def hungry(r, dtype):
    lora_hungry_kernel[(1,)](torch.empty(1 << 14, dtype=dtype), SIZE=1 << 14, num_warps=1)

catalogue.OPS["hungry"] = catalogue.Op(hungry, {"float32": (16,)})
command = sys.modules["lora_fast.cli.inspect"]
command._in_parallel = lambda work, jobs, *options: [work(job) for job in jobs]  # others would not know this op
app(["inspect", "--op", "hungry", "--arch", "90", "--no-traffic"])
"""


def test_spilling_kernel_has_exit_code_1(tmp_path):
    script = tmp_path / "hungry.py"  # a file, since Triton reads a kernel's source
    script.write_text(A_KERNEL_THAT_SPILLS)
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, script], env=compiling, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    assert "sm_90 lora_hungry_kernel of hungry, fp32 r16, w1: " in process.stdout and " spills" in process.stdout
    assert "1 kernel, 1 with a broken rule." in process.stdout


A_LOOP_THAT_IS_NOT_PIPELINED = """
import importlib.util, sys
from pathlib import Path
from lora_fast.cli import app
from lora_fast.kernels.linear import gemm

loop = "tl.num_programs(0), disable_licm=True)"
source, planted = Path(gemm.__file__).read_text(), Path(sys.argv[1])
assert source.count(loop) == 1
planted.write_text(source.replace(loop, "tl.num_programs(0), flatten=True)"))  # an earlier version of the GEMM
spec = importlib.util.spec_from_file_location("lora_fast.kernels.linear.planted", planted)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
gemm.lora_linear_kernel = module.lora_linear_kernel
command = sys.modules["lora_fast.cli.inspect"]
command._in_parallel = lambda work, jobs, *options: [work(job) for job in jobs]
chosen = lambda case: case.dtype == "bfloat16" and case.variant["strategy"] == "fused"
command._jobs = lambda *options, jobs=command._jobs: [job for job in jobs(*options) if chosen(job[0])]
app(["inspect", "--op", "linear", "--arch", "90", "--rank", "16", "--no-traffic"])
"""


def test_loop_without_a_pipeline_has_exit_code_1(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(A_LOOP_THAT_IS_NOT_PIPELINED)
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, tmp_path / "planted_linear.py"]
    process = subprocess.run(command, env=compiling, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    assert "sm_90 lora_linear_kernel of linear, bf16 r16 fused, " in process.stdout
    assert process.stdout.count("no product in flight") == 3  # adapters in 16 bits, in float32, no bias
    assert "fused padding 4, " not in process.stdout.split("r: rank.")[0].splitlines()[-1]


def test_error_names_the_case(monkeypatch):
    command = sys.modules["lora_fast.cli.inspect"]
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda *arguments: ThreadPoolExecutor(1))
    with command.Progress(disable=True) as progress, pytest.raises(ZeroDivisionError) as raised:
        command._in_parallel(lambda job: 1 / 0, [(ALIGNED, 90)], 1, False, progress)
    assert raised.value.__notes__ == [f"lora-fast inspect: {ALIGNED} for sm_90"]


def test_row_is_readable_in_a_terminal_of_80_columns(monkeypatch):
    variant = {"adapter": "float32", "strategy": "fused", "padding": 0, "dropout": 0.1, "bias": True}
    tile = {"BLOCK_T": 128, "BLOCK_OUT": 256, "BLOCK_IN": 64, "BLOCK_R": 32, "num_warps": 8, "num_stages": 3}
    row = CLEAN | {"op": "grad_x", "dtype": "bfloat16", "r": 16, "variant": variant, "tile": tile, "broken": []}
    row |= {"registers": 168, "occupancy": 0.125, "accesses": 120, "wide_accesses": 32, "traffic": 1.02}
    monkeypatch.setattr(sys.modules["lora_fast.cli.inspect"], "measure", lambda *_: [row])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", run("--op", "grad_x").stdout)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in shown and "32/120" in lines[2]
    assert lines.index(next(line for line in lines[3:] if not line.strip())) <= 6  # the row takes four lines at most
    for word in ("bf16", "r16", "adapter", "fused", "dropout", "bias", "t128", "out256", "in64", "w8"):
        assert word in shown


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"spills": 3}, "3 spills"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 1 << 20}, "1048576 bytes of shared memory"),
        ({"tensor_core": 0}, "no tensor-core instruction"),
        ({"tma_loads": 0}, "0 TMA loads"),
        ({"tf32": 4}, "4 products in TF32"),
        ({"in_flight": 0}, "no product in flight"),
        ({"ahead": 0}, "no load ahead"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_rule_is_broken_by_a_change(change, rule):
    assert rules.broken(ALIGNED, CLEAN) == []
    assert rules.broken(ALIGNED, CLEAN | change) == [rule]


def test_known_stray_is_allowed_and_nothing_beyond_it(monkeypatch):
    place = triton.__version__.rpartition(".")[0], 90, r"linear bfloat16 r=\d6 strategy fused"
    monkeypatch.setattr(rules, "ALLOWED_SPILLS", ((*place, 8),))
    stray = CLEAN | {"spills": 2, "stack": 8}
    assert rules.broken(ALIGNED, stray) == []
    assert rules.broken(ALIGNED, stray | {"stack": 16}) == ["2 spills", "16 bytes of stack"]
    assert rules.broken(ALIGNED, stray | {"arch": 100}) == ["2 spills", "8 bytes of stack"]
    assert rules.broken(ALIGNED._replace(r=32), stray) == ["2 spills", "8 bytes of stack"]


def test_tma_is_neither_expected_before_hopper_nor_with_unaligned_rows():
    unaligned = ALIGNED._replace(variant=ALIGNED.variant | {"padding": 4})
    assert rules.broken(ALIGNED, CLEAN | {"arch": 80, "tma_loads": 0, "in_flight": 0}) == []
    assert rules.broken(unaligned, CLEAN | {"in_flight": None, "ahead": None}) == ["2 TMA loads"]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--arch", "70"), "--arch: expected one of 80, 86, 89, 90, 100, 120, got 70"),
        (("--op", "prject"), "--op: expected one of project"),
        (("--op", "transform", "--rank", "3"), "--rank: expected some of 8, 16, 64, 128, got 3"),
    ],
)
def test_unknown_value_is_named(options, message):
    shown = run(*options)
    assert shown.exit_code == 2 and message in shown.output
