"""Compiles the catalogue's launches, counts their traffic, and checks both against the rules, without a GPU.

``compile_case`` needs Triton's compiler and ``count_case`` its interpreter (``TRITON_INTERPRET=1`` set before triton is
imported), so they need different processes.
"""

from __future__ import annotations

import re
import warnings

import triton

from .. import device, tiles
from . import compiler, interpreter
from .catalogue import OPS, Case

ARCHS = tuple(device.CARDS)
GEMMS = (
    "lora_linear_kernel", "lora_gluon_linear_kernel", "lora_group_linear_kernel", "lora_group_grad_x_kernel",
    "lora_four_bit_kernel",
)  # fmt: skip
# Triton waits for a product whose operand the step itself has written to shared memory.
WAITING = ("lora_four_bit_kernel",)
ASYNCHRONOUS = (90, 100)  # archs whose tensor cores compute a product while the program continues
# Allowed spills outside a GEMM's loop, of one or two numbers a tile: Triton's version, arch, cases, most bytes a
# thread.
ALLOWED_SPILLS = (
    ("3.6", 120, r"(linear|grad_x) b?float16 r=\d+ (adapter float32 )?strategy fused.*", 8),
    ("3.9", 90, r"grad_x b?float16 r=\d+ (adapter float32 )?strategy fused dropout 0.1", 8),
)
GLOBAL_ACCESS = r"LDG\.|LDGSTS\.|STG\."
WIDE_ACCESS = rf"({GLOBAL_ACCESS})(\S+\.)?128(\.|$)"


def compile_case(case: Case, arch: int) -> list[dict]:
    """Returns a row for each launch of the case: its kernel and case, the resources it uses, and ``broken``, the rules
    that it breaks."""
    with tiles.assume(arch=arch), compiler.recorded() as launches:
        case.run()
    return [_row(case, arch, launch) for launch in launches]


def _row(case: Case, arch: int, launch: compiler.Launch) -> dict:
    kernel, used = compiler.compile_as_launched(launch, arch)
    name = launch.kernel.__name__
    tensor_core = compiler.GEMM_TENSOR_CORE if name in GEMMS else compiler.TENSOR_CORE
    streams = name in GEMMS and case.dtype != "float32" and not case.variant["padding"]
    loop = compiler.main_loop(kernel) if streams else None
    row = {
        "op": case.op,
        "kernel": name,
        "dtype": case.dtype,
        "r": case.r,
        "variant": case.variant,
        "tile": {k: v for k, v in launch.arguments.items() if k.startswith(("BLOCK", "CHUNK"))} | launch.options,
        "arch": arch,
        "registers": used.registers,
        "stack": used.stack,
        "spills": used.spills,
        "shared": used.shared,
        "occupancy": used.occupancy(arch),
        "tensor_core": used.count(tensor_core[arch]),
        "tma_loads": used.count("UTMALDG"),
        "tf32": len(re.findall(r"mma\S*tf32", kernel.asm["ptx"])),
        "in_flight": loop and loop.in_flight,
        "ahead": loop and loop.ahead,
        "step": loop and loop.instructions,
        "accesses": used.count(GLOBAL_ACCESS),
        "wide_accesses": used.count(WIDE_ACCESS),
        "hash": kernel.metadata.hash,
    }
    return row | {"broken": broken(case, row)}


def broken(case: Case, row: dict) -> list[str]:
    """Returns the rules that a launch breaks.

    Only ``ALLOWED_SPILLS`` spill, shared memory fits, 16-bit products run on tensor cores, and float32 products do not
    use TF32 (unless torch is set to it). The GEMM loads by TMA exactly if the arch is sm_90 or later and its 16-bit
    matrices have aligned rows. The GEMM's main loop is then pipelined: loads are at least one step ahead, and if tensor
    cores are asynchronous, a step leaves a product in flight (except for ``WAITING``).
    """
    arch, half = row["arch"], case.dtype != "float32"
    streams = row["in_flight"] is not None
    tma = streams and arch >= 90
    place = triton.__version__.rpartition(".")[0], arch
    limits = [most for *where, cases, most in ALLOWED_SPILLS if (*where,) == place and re.fullmatch(cases, str(case))]
    allowed = 0 < row["stack"] <= max(limits, default=0)
    rules = {
        f"{row['spills']} spills": row["spills"] > 0 and not allowed,
        f"{row['stack']} bytes of stack": row["stack"] > 0 and not allowed,
        f"{row['shared']} bytes of shared memory": row["shared"] > device.CARDS[arch].shared_memory,
        "no tensor-core instruction": half and row["kernel"] in OPS[case.op].tensor_cores and not row["tensor_core"],
        f"{row['tma_loads']} TMA loads": tma != (row["tma_loads"] > 0),
        f"{row['tf32']} products in TF32": row["tf32"] > 0,
        "no product in flight": (
            streams and arch in ASYNCHRONOUS and row["kernel"] not in WAITING and row["in_flight"] < 1
        ),
        "no load ahead": streams and row["ahead"] < 1,
    }
    return [rule for rule, broken in rules.items() if broken]


def count_case(case: Case, arch: int) -> float:
    """Returns the bytes that a counted case loads and stores, divided by the bytes of each operand once."""
    warnings.simplefilter("ignore", RuntimeWarning)  # from numpy: the operands are uninitialised memory
    with tiles.assume(arch=arch), interpreter.traffic() as counted:
        least = case.run()
    return counted.total / least
