"""What the catalogue's launches compile to and how much they move, held to the rules, without a GPU.

``compile_case`` needs Triton as it is, ``count_case`` its interpreter (``TRITON_INTERPRET=1`` before triton is
imported): one process each.
"""

from __future__ import annotations

import re
import warnings

import triton

from .. import device, tiles
from . import compiler, interpreter
from .catalogue import OPS, Case

ARCHS = tuple(device.CARDS)
GEMMS = ("lora_linear_kernel", "lora_gluon_linear_kernel")
ASYNCHRONOUS = (90, 100)  # archs whose tensor cores work on a product while the program goes on
# What ptxas keeps on the stack outside a GEMM's loop, a number or two a tile: Triton's version, arch, cases, bytes of a
# thread at most.
STRAYS = (("3.9", 90, r"grad_x b?float16 r=\d+ (adapter float32 )?strategy fused dropout 0.1", 8),)
GLOBAL_ACCESS = r"LDG\.|LDGSTS\.|STG\."
WIDE_ACCESS = rf"({GLOBAL_ACCESS})(\S+\.)?128(\.|$)"


def compile_case(case: Case, arch: int) -> list[dict]:
    """A row for each launch of the case: where it comes from, what it uses, ``broken``: the rules it breaks."""
    with tiles.assume(arch=arch), compiler.recorded() as launches:
        case.run()
    return [_row(case, arch, launch) for launch in launches]


def _row(case: Case, arch: int, launch: compiler.Launch) -> dict:
    kernel, used = compiler.compile_roomy(launch, arch)
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
    """Nothing spills but ``STRAYS``, shared memory fits, 16-bit products run on tensor cores, float32 ones are not
    rounded to TF32 (unless torch is set so), and the GEMM reads 16-bit matrices through TMA from sm_90 on where their
    rows are aligned, nowhere else. There its main loop is pipelined: loads are a step ahead, and where tensor cores are
    asynchronous a step leaves a product in flight."""
    arch, half = row["arch"], case.dtype != "float32"
    streams = row["in_flight"] is not None
    tma = streams and arch >= 90
    place = triton.__version__.rpartition(".")[0], arch
    known = [most for *where, cases, most in STRAYS if (*where,) == place and re.fullmatch(cases, str(case))]
    stray = 0 < row["stack"] <= max(known, default=0)
    rules = {
        f"{row['spills']} spills": row["spills"] > 0 and not stray,
        f"{row['stack']} bytes of stack": row["stack"] > 0 and not stray,
        f"{row['shared']} bytes of shared memory": row["shared"] > device.CARDS[arch].shared_memory,
        "no tensor-core instruction": half and row["kernel"] in OPS[case.op].tensor_cores and not row["tensor_core"],
        f"{row['tma_loads']} TMA loads": tma != (row["tma_loads"] > 0),
        f"{row['tf32']} products in TF32": row["tf32"] > 0,
        "no product in flight": streams and arch in ASYNCHRONOUS and row["in_flight"] < 1,
        "no load ahead": streams and row["ahead"] < 1,
    }
    return [rule for rule, broken in rules.items() if broken]


def count_case(case: Case, arch: int) -> float:
    """Bytes that the launches of a counted case ask of memory, over each operand once."""
    warnings.simplefilter("ignore", RuntimeWarning)  # of numpy: values are what memory held
    with tiles.assume(arch=arch), interpreter.traffic() as counted:
        least = case.run()
    return counted.total / least
