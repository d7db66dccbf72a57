"""Tests of the strategy "gluon". Without an H100 its kernel runs on a machine in Python (gluon_machine.py), which must
give results within the error budget for every allowed delay and detect planted mistakes. The machine code is tested
too."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from types import FunctionType, SimpleNamespace

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton needs Linux", allow_module_level=True)

import gluon_machine
from budget import check, error
from launching import DEVICE, poisoned_empty, randn

from lora_fast.kernels import linear, tiles
from lora_fast.kernels.launch import LaunchError
from lora_fast.kernels.linear import gluon_gemm
from lora_fast.ops.reference import linear as reference

pytestmark = pytest.mark.gpu

SEED, SCALING = (1 << 40) + 5, 1.5
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int, padding: int = 8) -> torch.Tensor:
    """Returns a random matrix with NaN between its rows."""
    whole = torch.full((rows, columns + padding), float("nan"), dtype=dtype, device=DEVICE)
    whole[:, :columns] = randn(rows, columns, seed=seed)
    return whole[:, :columns]


def operands(
    n: int, k: int, m: int, r: int, dtype: torch.dtype, factor: torch.dtype, forward: bool, bias: bool
) -> dict:
    """Returns the operands of a GEMM from left (n, k) to (n, m). thin and factor are S and b forward, dS and a
    backward, in PEFT's dtypes."""
    thin = randn(n, r, seed=3).to(torch.promote_types(dtype, factor))
    return {
        "left": matrix(n, k, dtype, 1),
        "weight": matrix(m, k, dtype, 2) if forward else matrix(k, m, dtype, 2),
        "bias": randn(m, seed=4).to(dtype) if bias else None,
        "thin": thin,
        "factor": matrix(m, r, factor, 5) if forward else matrix(r, m, factor, 5),
    }


def formula(left, weight, bias, thin, factor, forward: bool, mask) -> torch.Tensor:
    """Returns the result of PEFT's formula (backward: its derivative), computed in the dtypes of the operands."""
    base = left @ (weight.T if forward else weight)
    base = base if bias is None else base + bias
    added = SCALING * (thin @ factor.T) if forward else thin @ factor
    return (base + (added if mask is None else added * mask)).to(left.dtype)


def computed(
    tensors: dict, forward: bool, dropout: float, late: float = 0.5, seed: int = 0, change=None, in_memory: bool = False
) -> torch.Tensor:
    """Returns the kernel's result, from the GPU if it is a Hopper GPU, else from the machine in Python."""
    left, weight, bias, thin, factor = tensors.values()
    seed_of_mask = torch.tensor(SEED, device=DEVICE) if in_memory else SEED
    keep = linear.draw_mask(left, dropout, seed_of_mask) if dropout else None
    shape = len(left), weight.shape[0 if forward else 1]
    with tiles.assume(arch=90), poisoned_empty():
        gemm = gluon_gemm.GluonGemm(left, weight, bias, factor, thin.shape[1], bool(dropout), forward, shape)
        if not HOPPER:
            gemm.launch.go = lambda stream, operands, numbers: gluon_machine.launch(
                gemm.launch, operands, numbers, late, seed, change
            )
        return gemm(*tensors.values(), SCALING if forward else 1.0, keep)


def mask_of(tensors: dict, dropout: float) -> torch.Tensor | None:
    n, m = len(tensors["left"]), tensors["weight"].shape[1]
    return reference.philox_mask(SEED, n, m, dropout).to(DEVICE) if dropout else None


# n, k, m, r, dtype, factor, forward, bias, dropout, with ragged edges, several tiles a program and ranks of every kind
CASES = (
    (130, 200, 264, 16, BF16, BF16, True, True, 0.0),
    (300, 64, 520, 8, BF16, FP32, True, False, 0.0),
    (1, 72, 8, 1, BF16, FP32, True, True, 0.0),
    (129, 136, 768, 24, FP16, FP32, True, True, 0.0),
    (257, 8, 256, 64, FP16, FP16, True, False, 0.0),
    (64, 448, 512, 100, BF16, FP32, True, True, 0.0),
    (130, 200, 264, 16, BF16, BF16, False, False, 0.1),
    (200, 128, 264, 40, BF16, FP32, False, False, 0.5),
    (385, 72, 520, 8, FP16, FP32, False, False, 0.1),
    (17, 320, 16, 3, FP16, FP16, False, False, 0.0),
    (140, 64, 256, 256, BF16, FP32, False, False, 0.9),
)


@pytest.mark.parametrize("late", (0.0, 0.5, 1.0), ids=("early", "mixed", "late"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_kernel_is_within_the_error_budget(case, late):
    """``late`` is the probability that a copy or product is delayed until a wait requires it."""
    *sizes, dtype, factor, forward, bias, dropout = case
    tensors = operands(*sizes, dtype, factor, forward, bias)
    mask = mask_of(tensors, dropout)
    exact = formula(*(t if t is None else t.double() for t in tensors.values()), forward, mask)
    peft = formula(*(t if t is None else t.contiguous() for t in tensors.values()), forward, mask)
    result = computed(tensors, forward, dropout, late, in_memory=factor is FP32)
    check("result", result, exact, error(peft, exact), dtype)


def test_dropout_keeps_nan_and_infinity():
    """A dropped NaN or infinity gives NaN, so no result of its token is finite."""
    tensors = operands(130, 64, 256, 16, BF16, FP32, False, False)
    tensors["thin"][3], tensors["thin"][5] = float("nan"), float("inf")
    result = computed(tensors, False, 0.5)
    assert result[3].isnan().all() and not result[4].isnan().any()
    assert not result[5].isfinite().any()


def test_order_of_partitions_changes_no_bit():
    """Ten machines run the partitions in different orders."""
    tensors = operands(200, 200, 520, 40, BF16, FP32, False, False)
    first = computed(tensors, False, 0.1, seed=1)
    assert all(torch.equal(first, computed(tensors, False, 0.1, seed=seed)) for seed in range(2, 11))


# ---- Mistakes that the machine must detect


def without(name: str, **members):
    """Returns a change that replaces a function by one that does nothing, or ``members`` of a module."""
    return lambda names: {name: SimpleNamespace(**vars(names[name]) | members) if members else nothing}


def within(function: str, **members):
    """Returns a change that replaces members of mbarrier in one function of the kernel."""

    def change(names):
        changed = names | {"mbarrier": SimpleNamespace(**vars(names["mbarrier"]) | members)}
        return {function: FunctionType(names[function].__code__, changed, function)}

    return change


def one_product_more(names):
    wait = names["warpgroup_mma_wait"]
    return {"warpgroup_mma_wait": lambda pendings, values: wait(pendings and pendings + 1, values)}


def nothing(*ignored, **also):
    pass


def rewritten(function: str, *replaced: tuple[str, str]):
    """Returns a change that replaces pieces of one function's source: pairs of the old and the new text."""

    def change(names):
        source = inspect.getsource(getattr(gluon_gemm, function).fn)
        source = source[source.index("def ") :]
        for old, new in replaced:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        namespace = dict(names)
        exec("from __future__ import annotations\n" + source, namespace)
        return {function: namespace[function]}

    return change


HANDED_BACK = "        mbarrier.arrive(thin_empty, count=1)\n"
PLANTS = {
    "the mask is handed back before it was read": rewritten(
        "multiply",
        (HANDED_BACK, ""),
        ("        if TRANSPOSED:\n            b_acc *= scaling\n", HANDED_BACK),
    ),
    "a buffer is handed back while a product reads it": one_product_more,
    "no fence": without("fence_async_shared"),
    "the second half is written over the first": without("tma", store_wait=nothing),
    "fetch does not wait for empty buffers": within("fetch", wait=nothing),
    "multiply does not wait for full buffers": within("multiply", wait=nothing),
    "prepare does not wait for empty buffers": within("prepare", wait=nothing),
    "multiply hands nothing back": within("multiply", arrive=nothing),
    "fetch expects half the bytes": lambda names: within(
        "fetch", expect=lambda barrier, n_bytes: names["mbarrier"].expect(barrier, n_bytes // 2)
    )(names),
}


@pytest.mark.skipif(HOPPER, reason="a mistake is not run on a GPU")
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_machine_detects_planted_mistake(plant):
    """At least four of eight runs end with an error or with another result."""
    tensors = operands(200, 320, 520, 40, BF16, FP32, False, False)
    right, detected = computed(tensors, False, 0.1), 0
    for seed in range(8):
        try:
            detected += not torch.equal(right, computed(tensors, False, 0.1, late=0.8, seed=seed, change=plant))
        except gluon_machine.Hazard:
            detected += 1
    assert detected >= 4


# ---- Machine code

COMPILED = """
import sys
from lora_fast.kernels import tiles
from lora_fast.kernels.inspection import catalogue, compiler
variant = {"adapter": "float32", "strategy": "gluon", "padding": 0, "dropout": 0.1}
with tiles.assume(arch=90), compiler.recorded() as launches:
    catalogue.Case("grad_x", "bfloat16", 16, variant).run()
sys.stdout.write(compiler.machine_code(compiler.compile_for(launches[0], 90)))
"""


def test_partition_synchronises_before_one_thread_arrives():
    """One thread of a partition arrives at an mbarrier for all of its threads. The compiler must insert a barrier of
    the partition between its last access to shared memory (or wait for a product) and the arrival."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", done.stdout, re.M)
    arrivals = [i for i, name in enumerate(instructions) if name.startswith("SYNCS.ARRIVE.TRANS64.A1T0")]
    assert len(arrivals) >= 4  # of "prepare"; of "multiply" for the thin buffers, and in and after the loop over d_in
    for arrival in arrivals:
        before = reversed(instructions[:arrival])
        last = next(name for name in before if re.match(r"BAR\.SYNC|LDS|STS|WARPGROUP\.DEPBAR", name))
        assert last.startswith("BAR.SYNC"), instructions[arrival - 20 : arrival + 1]


# ---- Errors


@pytest.mark.parametrize("arch", (80, 100, 120))
def test_other_arch_raises_launch_error(arch):
    x = torch.zeros(16, 64, dtype=BF16)
    message = r"'gluon': expected .* sm_90 GPU, got torch.bfloat16 .*: choose another strategy"
    with tiles.assume(arch=arch, strategy="gluon"), pytest.raises(LaunchError, match=message):
        linear.linear(x, torch.zeros(32, 64, dtype=BF16), None, torch.zeros(16, 8), torch.zeros(32, 8), 1.0)


@pytest.mark.parametrize("dtype, padding", [(FP32, 0), (BF16, 3)])
def test_operands_without_tma_raise_launch_error(dtype, padding):
    x, weight = matrix(16, 64, dtype, 0, padding), torch.zeros(32, 64, dtype=dtype)
    with tiles.assume(arch=90, strategy="gluon"), pytest.raises(LaunchError, match=f"got {dtype} with strides"):
        linear.linear(x, weight, None, torch.zeros(16, 8), torch.zeros(32, 8), 1.0)
