"""Every kernel × configuration, compiled for sm_80, sm_90 and sm_100 without a GPU: no spill, no stack, shared memory
within the arch's limit, tensor-core instructions, and TMA loads in the GEMM from sm_90 on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_fast.kernels.compiled import SHARED_LIMIT

SMALL, LARGE = "1,8,16", "64,128,256"
KERNELS = {
    "lora_project_kernel",
    "lora_linear_kernel",
    "lora_update_kernel",
    "lora_grad_s_b_kernel",
    "lora_grad_a_kernel",
    "lora_sum_partials_kernel",
}


def compile_layer(arch: int, dtype: str, ranks: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worker = [sys.executable, str(Path(__file__).with_name("compile_layer.py")), str(arch), dtype, ranks]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not torch.cuda.is_available() and sys.platform != "linux", reason="Triton needs Linux")
@pytest.mark.parametrize("arch", [80, 90, 100], ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize(
    "dtype, ranks",
    [("bfloat16", SMALL), ("bfloat16", LARGE), ("float16", "16"), ("float32", "16,128")],
    ids=lambda value: value.replace(",", "_"),
)
def test_layer_compiles_clean(arch, dtype, ranks):
    rows = compile_layer(arch, dtype, ranks)
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        where = f"sm_{arch} {row}"
        assert row["stack"] == 0 and row["spills"] == 0, where
        assert row["shared"] <= SHARED_LIMIT[arch], where
        if dtype == "float32" or row["kernel"] == "lora_sum_partials_kernel":
            continue
        assert row["tensor_core"] > 0, where
        if row["kernel"] == "lora_linear_kernel":
            assert row["gemm_tensor_core"] > 0, where
            assert (row["tma_loads"] > 0) == (arch >= 90 and row["aligned"]), where
