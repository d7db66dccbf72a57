"""The microbenchmark suite: results of every op by every provider at tiny sizes; the files of a run; comparison."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from gpu_sections import timings
from lora_fast.kernels import tiles
from suite import (
    cases,
    changes,
    registry,
)
from suite import comparison as measure
from suite.ops import providers

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
SETTING = measure.Setting(torch.device("cpu"), triton=False)
CEILINGS = measure.Ceilings("float32", 1e11, 1e10)
ULPS = 64  # of the worst conditioned, the inverse; a wrong formula is wrong by far more
TINY = registry.cases(registry.OPS, cases.SCALES["tiny"])


def rows_of(case):
    comparison = registry.module(case.op).build(case, SETTING)
    comparison.providers.pop("torch.compile", None)
    return measure.measure(case, comparison, SETTING, CEILINGS, 0.0, measure.simply)


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op}: {case.name}".replace("→", "->"))
def test_every_provider_computes_the_op(case):
    """Nobody is further from float64 than a few roundings; times, memory and work are there."""
    rows = rows_of(case)
    assert "ours" in {row.provider for row in rows}
    for row in rows:
        assert not row.unavailable
        assert 0 < row.p20 <= row.p50 <= row.p80 and row.bytes > 0 and row.operations > 0 and row.peak >= 0
        assert row.error is None or row.error <= ULPS * torch.finfo(torch.float32).eps, row.provider


@pytest.mark.parametrize("case", [case for case in TINY if case.op in ("step", "merge")], ids=lambda case: case.name)
def test_every_run_starts_where_the_first_did(case):
    """However long a measurement is, nothing diverges: each run gives the bits of the first, or, where the learning
    rate moves by less than a hundredth, nearly the same."""
    same = partial(torch.allclose, rtol=0, atol=1e-5) if "moving" in case.variant else torch.equal
    for build in registry.module(case.op).build(case, SETTING).providers.values():
        provider = build()
        read = lambda value, of=provider: of.results(value) if of.results else dict(enumerate(of.own))
        first = {name: t.detach().clone() for name, t in read(measure.once(provider)).items()}
        for _ in range(3):
            last = read(measure.once(provider))
        assert first and all(same(first[name], last[name]) for name in first)


def test_a_wrong_result_shows():
    case = next(case for case in TINY if case.op == "project")
    comparison = registry.module("project").build(case, SETTING)
    comparison.providers = {"wrong": lambda: measure.Provider(lambda: {"s": torch.zeros(16, 4)}, results=lambda x: x)}
    (row,) = measure.measure(case, comparison, SETTING, CEILINGS, 0.0, measure.simply)
    assert row.error == pytest.approx(1.0)


def test_what_cannot_run_is_a_row_with_its_reason():
    def missing():
        raise measure.Unavailable("no such package")

    case = next(case for case in TINY if case.op == "project")
    comparison = registry.module("project").build(case, SETTING)
    comparison.providers["other"] = missing
    comparison.providers.pop("torch.compile")
    rows = measure.measure(case, comparison, SETTING, CEILINGS, 0.0, measure.simply)
    assert [row.unavailable for row in rows if row.provider == "other"] == ["no such package"]


@pytest.mark.parametrize(
    "dtype, arch, gluon", [("bfloat16", 90, True), ("float32", 90, False), ("bfloat16", 80, False)]
)
def test_each_strategy_that_runs_is_a_provider(dtype, arch, gluon):
    case = cases.Case("layer", "", ((64, 48),), 4, 16, dtype, 0.0)
    with tiles.assume(arch=arch):
        _, found = providers.layer(case, measure.Setting(torch.device("cpu"), triton=True))
    ours = [name for name in found if name.startswith("ours")]
    assert ours == ["ours", "ours, fused", "ours, cublas", *(["ours, gluon"] if gluon else [])]


def test_saved_bytes_of_the_layer_are_x_and_s():
    case = next(case for case in TINY if case.op == "layer")
    saved = {row.provider: row.saved for row in rows_of(case)}
    (d_in, _), element = case.shape, 4
    assert saved["ours"] == case.n_tokens * (d_in + case.r) * element
    assert saved["addmm_"] == case.n_tokens * d_in * element


def test_work_is_counted_once():
    """x, W, a, b read, y and S written."""
    case = cases.Case("layer", "", ((64, 64),), 16, 128, "bfloat16")
    work = registry.module("layer").build(case, SETTING).work["forward"]
    assert work.bytes == 2 * (128 * 64 * 2 + 64 * 64 + 128 * 16) + 4 * (2 * 16 * 64)  # adapters are float32
    assert work.operations == 2 * 128 * (64 * 64 + 16 * (64 + 64))


def test_providers_take_turns():
    order = []
    sides = {name: measure.Provider(lambda name=name: order.append(name)) for name in "abc"}
    rounds = measure.Rounds(sides, SETTING.device)
    for _ in range(3):
        rounds.run()
    assert "".join(order) == "abcbcacab"


def test_the_table_of_shapes():
    assert len(cases.MODELS["Llama-3-8B"].pairs) == 224 and len(cases.MODELS["SmolLM2-135M"].pairs) == 210
    every = cases.distinct(tuple(cases.MODELS))
    assert set(timings.SHAPES) <= set(every) and (18944, 3584) in every and len(every) == 12
    assert set(cases.SCALES["gpu"].ranks) == {8, 16, 32, 64, 128}


def test_cases_survive_json():
    for case in TINY:
        assert cases.from_dict(json.loads(json.dumps(asdict(case)))) == case


def run_of(rows, device="a CPU"):
    versions = {"lora-fast": "0.1.0", "torch": "2"}
    where = {"device": device, "machine": "x86_64", "python": "3", "versions": versions}
    return {
        "environment": where, "scale": "tiny", "on_gpu": False, "load": "0", "cores": 1, "timestamp": "now",
        "tests": ["project"], "what": {"project": "S", "layer": "y"}, "ceilings": [CEILINGS._asdict()],
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip


@pytest.fixture(scope="module")
def run():
    rows = [row for case in TINY if case.op in ("project", "layer") for row in rows_of(case)]
    rows += [measure.Row(asdict(TINY[0]), "absent", "full", unavailable="<not> installed")]
    return run_of(rows)


def test_files_of_a_run(run, tmp_path):
    report = registry.module("report")
    report.write(tmp_path, run, changes.compare(run, run))
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == json.loads(json.dumps(run["rows"]))
    lines = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text())))
    assert list(lines[0]) == list(report.COLUMNS)
    assert {line["metric_name"] for line in lines} == {"speed", "memory", "saved", "error"}
    assert {line["kernel_operation_mode"] for line in lines} == {"forward", "backward", "full"}
    page = (tmp_path / "bench.html").read_text()
    assert "&lt;not&gt; installed" in page and "<svg" in page and "Not a GPU" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 2


def test_comparison_marks_what_is_beyond_noise(run):
    assert not any(change.beyond_noise for change in changes.compare(run, run))
    slower = json.loads(json.dumps(run))
    changed = next(row for row in slower["rows"] if row["provider"] == "ours" and row["mode"] == "full")
    changed["ratio"] = [value / 100 for value in changed["ratio"]]
    marked = [change for change in changes.compare(run, slower) if change.beyond_noise]
    assert [(change.provider, change.mode) for change in marked] == [("ours", "full")]
    assert marked[0].times == pytest.approx(0.01)


def test_two_devices_are_compared_by_ratios_alone(run):
    first = run["rows"][0]["provider"]
    other = {**run, "environment": {**run["environment"], "device": "another"}}
    assert first in {change.provider for change in changes.compare(run, run)}
    assert first not in {change.provider for change in changes.compare(run, other)}


def test_tests_named_by_the_suite_exist():
    nodes = [node for op in registry.OPS for node in registry.TESTS[op]]
    for path, test in (node.split("::") for node in nodes):
        assert f"def {test.split('[')[0]}(" in (ROOT / path).read_text(), test


def test_a_red_test_means_no_numbers(tmp_path):
    """run.py with a failing test in the place of an op's."""
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    code = f"import suite; suite.TESTS['project'] = ({str(red)!r},)\nimport run; run.main()"
    command = [sys.executable, "-c", code, "project", "--scale", "tiny", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == 1 and "a test is red" in done.stderr and not (tmp_path / "out").exists()


def test_lora_fast_bench_runs_the_suite(tmp_path):
    from typer.testing import CliRunner

    from lora_fast.cli import app

    shown = CliRunner().invoke(app, ["bench", "--help"])
    assert shown.exit_code == 0 and "lora-fast bench --quick" in shown.output
    code = "from lora_fast.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "expected some of project" in done.stderr


def test_lora_fast_bench_without_the_repository(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from lora_fast.cli import app

    monkeypatch.setattr(sys.modules["lora_fast.cli.bench"], "SUITE", tmp_path / "bench" / "run.py")
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 2 and "installed without it" in done.output


# ---- Times of a device


class Device:
    """A CUDA device in words: a clock for the host and one for the device, which does what it is given in order."""

    type = "cuda"

    def __init__(self, monkeypatch):
        self.host, self.device = 0.0, 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(measure, "_mark", lambda device: self.enqueue(0.0))
        monkeypatch.setattr(measure, "_elapsed", lambda start, end: end - start)
        monkeypatch.setattr(measure, "_flush", lambda device: self.enqueue(1e-4))
        monkeypatch.setattr(measure, "_keep_busy", lambda device, seconds: self.enqueue(seconds))
        monkeypatch.setattr(measure, "wait", lambda device: self.wait())

    def enqueue(self, seconds: float) -> float:
        """When it will be done."""
        self.device = max(self.host, self.device) + seconds
        return self.device

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def op(self, host: float, device: float, waits: bool = False) -> None:
        self.host += host
        self.enqueue(device)
        if waits:
            self.wait()


def test_device_and_host_are_timed_apart(monkeypatch):
    """The host's time is not in the device's unless it cannot be kept out, and then the row says so."""
    device = Device(monkeypatch)
    light = lambda: [device.op(20e-6, 5e-6) for _ in range(4)]
    providers = {
        "light": measure.Provider(light, lambda value: device.op(300e-6, 40e-6)),
        "waits": measure.Provider(lambda: device.op(20e-6, 5e-6, waits=True), lambda value: device.op(20e-6, 5e-6)),
        "slow host": measure.Provider(lambda: device.op(80e-3, 5e-6), lambda value: device.op(1e-6, 5e-6)),
    }
    rounds = measure.timed(providers, device, 0.5, measure.simply)
    assert rounds.times("light", "forward") == pytest.approx([20] * len(rounds.runs["light"]), abs=1e-3)
    assert rounds.times("light", "full") == pytest.approx([60] * len(rounds.runs["light"]), abs=1e-3)
    assert rounds.host_times("light", "full") == pytest.approx([380] * len(rounds.runs["light"]), abs=1e-3)
    assert [name for name in providers if rounds.is_exposed(name)] == ["waits", "slow host"]
    assert rounds.head_start["light"] == pytest.approx(2.5 * 380e-6)
