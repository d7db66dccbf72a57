"""Runs every case of the suite as a benchmark of pytest-benchmark, whose rounds run each provider once, in turn. The
rows go into the benchmark's extra_info, and bench/run.py reads them from pytest-benchmark's JSON."""

from dataclasses import asdict

import pytest

from lora_fast.measure.ceilings import measure_ceilings
from suite.cases import SCALES
from suite.comparison import measure
from suite.registry import OPS, cases, here, module

CEILINGS = {}


def pytest_generate_tests(metafunc):
    scale = SCALES[metafunc.config.getoption("--scale")]
    ops = tuple(filter(None, metafunc.config.getoption("--ops").split(","))) or OPS
    chosen = cases(ops, scale)
    metafunc.parametrize("case", chosen, ids=[f"{case.op}: {case.name}".replace("→", "->") for case in chosen])


@pytest.fixture
def scale(pytestconfig):
    return SCALES[pytestconfig.getoption("--scale")]


def test_op(case, scale, benchmark):
    setting = here()
    if case.dtype not in CEILINGS:
        CEILINGS[case.dtype] = measure_ceilings(setting.device, case.dtype)
    comparison = module(case.op).build(case, setting)
    if not scale.compiled:
        comparison.providers.pop("torch.compile", None)

    def drive(run, rounds):
        benchmark.pedantic(run, rounds=rounds)

    rows = measure(case, comparison, setting, CEILINGS[case.dtype], scale.seconds, drive)
    benchmark.extra_info["rows"] = [asdict(row) for row in rows]
    benchmark.extra_info["ceilings"] = asdict(CEILINGS[case.dtype])
