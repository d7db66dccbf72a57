"""Compiles the catalogue's launches for every arch without a GPU and checks them against the rules of lora-fast
inspect.

By default the layer's kernels are compiled for sm_90 with every rank, dtype and value of an option. Two variants of
those of groups and one of the others are compiled at one rank, and one at some other ranks. For sm_120, and of the GEMM
for sm_80, one or two variants are compiled at one rank. ``-m budget`` compiles all cases for all archs; test_launch.py
launches layers on the limits of cards.
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
GROUP = ["group_project", "group_linear", "group_grad_s_b", "group_grad_a", "group_grad_x"]
FOUR_BIT = ["four_bit_linear", "four_bit_grad_x"]
FULL = (90,)
SHARES = {"thin": THIN, "gemm": GEMM, "group": GROUP}
SHARES["rest"] = [op for op in catalogue.OPS if op not in THIN + GEMM + GROUP]
# By default sm_90 and sm_120, whose cards have the least shared memory, the GEMM also for sm_80, and groups and what is
# no part of a layer for sm_90.
ELSEWHERE = {arch for arch in rules.ARCHS if arch not in FULL}
RARE = {"gemm": (86, 89, 100), "group": ELSEWHERE, "rest": ELSEWHERE}
PLACES = [
    pytest.param(
        share, arch, id=f"{share}-sm_{arch}", marks=[pytest.mark.budget] * (arch in RARE.get(share, (80, 86, 89, 100)))
    )
    for share in SHARES
    for arch in rules.ARCHS
]


def sample(ops: list[str], arch: int) -> list[catalogue.Case]:
    """Returns, of a layer's ops, cases that contain every value. Of ``GROUP`` it returns the first and last variant at
    each op's second rank. Of ops outside a layer it returns the last variant at the second or only rank, and one at the
    largest rank of a dtype (of ``FOUR_BIT`` at none). Where an op has a stochastic form, which is the same kernel, it
    returns the op's at the largest rank and the stochastic form's at the second. For archs that are not in ``FULL`` it
    returns the first and last variant (of ops outside a layer, the last) at the second rank."""
    chosen = []
    for op in ops:
        if arch in FULL and op in THIN + GEMM:
            chosen += with_every_value([case for case in catalogue.cases([op]) if case.runs_on(arch)])
            continue
        ranks: dict[tuple, list[catalogue.Case]] = {}
        for case in filter(lambda case: case.runs_on(arch), catalogue.cases([op])):
            ranks.setdefault((case.dtype, case.r), []).append(case)
        without_noise = arch in FULL and f"{op}_stochastic" in ops
        largest = max(ranks, key=lambda place: place[1])
        second = list(ranks)[:2][-1]
        for i, (place, cases) in enumerate(ranks.items()):
            ends = cases if len(cases) < 2 else [cases[0], cases[-1]]
            if place == second and not without_noise:
                chosen += ends if op in THIN + GEMM + GROUP * (arch in FULL) else ends[-1:]
            elif arch in FULL and op not in GROUP + FOUR_BIT and place == largest and not op.endswith("_stochastic"):
                chosen.append(ends[i % len(ends)])
    return chosen


def with_every_value(cases: list[catalogue.Case]) -> list[catalogue.Case]:
    """Returns a sample, chosen greedily, in which every rank, dtype and value of an option occurs."""

    def facts(case):
        return {("r", case.r), ("dtype", case.dtype), *case.variant.items()}

    missing, chosen = set().union(*map(facts, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(facts(case) & missing)))
        missing -= facts(chosen[-1])
    return chosen


def everything(ops: list[str], arch: int) -> list[catalogue.Case]:
    return [case for case in catalogue.cases(ops) if case.runs_on(arch)]


ALL = pytest.param(everything, marks=pytest.mark.budget)


@pytest.mark.parametrize("share, arch", PLACES)
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
