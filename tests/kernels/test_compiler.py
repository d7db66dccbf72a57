"""Compiles the catalogue's launches for every arch without a GPU and checks them against the rules of lora-fast
inspect.

By default every variant of the layer's kernels and every second one of the others is compiled at one rank, and the
first and last variant at the other ranks, for sm_90. For sm_80 and sm_120 two variants are compiled at one rank.
``-m budget`` compiles all cases for all archs; test_launch.py launches layers on the limits of cards.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("Triton needs Linux", allow_module_level=True)

from lora_fast import kernels
from lora_fast.cli.inspect import measure
from lora_fast.kernels.inspection import catalogue, rules

THIN, GEMM = ["project", "grad_s_b", "grad_a"], ["linear", "grad_x", "few_tokens"]
FULL = (90,)
ARCHS = [pytest.param(arch, marks=pytest.mark.budget) if arch in (86, 89, 100) else arch for arch in rules.ARCHS]
SHARES = {"thin": THIN, "gemm": GEMM, "rest": [op for op in catalogue.OPS if op not in THIN + GEMM]}


def sample(ops: list[str], arch: int) -> list[catalogue.Case]:
    """Returns every variant (of ops outside a layer, every second one) at each op's second or only rank, and the first
    and last variant at the other ranks. For archs that are not in ``FULL`` it returns the first and last variant at the
    second rank."""
    chosen = []
    for op in ops:
        ranks: dict[tuple, list[catalogue.Case]] = {}
        for case in filter(lambda case: case.runs_on(arch), catalogue.cases([op])):
            ranks.setdefault((case.dtype, case.r), []).append(case)
        second = list(ranks)[:2][-1]
        for place, cases in ranks.items() if arch in FULL else [(second, ranks[second])]:
            many = place == second and arch in FULL
            chosen += cases[: -1 : 1 if op in THIN + GEMM else 2] if many else cases[:1]
            chosen += cases[-1:] if len(cases) > 1 or many else []
    return chosen


def everything(ops: list[str], arch: int) -> list[catalogue.Case]:
    return [case for case in catalogue.cases(ops) if case.runs_on(arch)]


ALL = pytest.param(everything, marks=pytest.mark.budget)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("cases", [sample, ALL], ids=["some", "all"])
def test_compiled_launches_break_no_rule(cases, share, arch):
    rows = measure([(case, arch) for case in cases(SHARES[share], arch)], traffic=False, processes=1)
    assert {row["op"] for row in rows} == set(SHARES[share])
    broken = [f"{row['kernel']} {row['dtype']} r={row['r']} {row['variant']}: {row['broken']}" for row in rows]
    assert not any(row["broken"] for row in rows), "\n".join(
        line for line, row in zip(broken, rows, strict=True) if row["broken"]
    )


def test_catalogue_launches_every_kernel():
    code = (
        "from lora_fast.kernels import tiles\nfrom lora_fast.kernels.inspection import catalogue, compiler\n"
        "with tiles.assume(arch=90), compiler.recorded() as launches:\n"
        "    for case in catalogue.cases(): case.run()\n"
        "print(*{launch.kernel.__name__ for launch in launches})"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sources = [path.read_text(encoding="utf-8") for path in Path(kernels.__file__).parent.rglob("*.py")]
    defined = {name for source in sources for name in re.findall(r"^def (lora_\w+_kernel)\(", source, re.M)}
    assert set(done.stdout.split()) == defined
