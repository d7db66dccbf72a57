"""The microbenchmark suite: results of every op by every provider at tiny sizes, the files of a run, changes."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import peft
import peft.optimizers
import pytest
import torch
from collecting import collected_here

from gpu_sections import timings
from lora_fast.kernels import tiles
from lora_fast.measure.ceilings import Ceilings
from suite import cases, changes, comparison, registry, report
from suite.comparison import Provider, Setting, Unavailable
from suite.ops import providers

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
SETTING = Setting(torch.device("cpu"), triton=False)
CEILINGS = Ceilings("float32", 1e11, 1e10)
ULPS = 64  # the inverse is conditioned worst; a wrong formula causes far larger errors
TINY = registry.cases(registry.OPS, cases.SCALES["tiny"])


def measured_rows(case, compared):
    return comparison.measure(case, compared, SETTING, CEILINGS, 0.0, comparison.simply)


def rows_of(case):
    """Returns the rows of a case by every provider except torch.compile, which takes long."""
    compared = registry.module(case.op).build(case, SETTING)
    compared.providers.pop("torch.compile", None)
    return measured_rows(case, compared)


def skip_where_peft_lacks(case):
    """Skips cases that PEFT before 0.21 has no optimizer for."""
    if "PiLoRA" in case.variant and not hasattr(peft.optimizers, "create_riemannian_optimizer"):
        pytest.skip(f"PEFT {peft.__version__} has no Riemannian optimizer")


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op}: {case.name}".replace("→", "->"))
def test_every_provider_computes_the_op(case):
    """Every error is a few roundings; times, memory and cost are measured."""
    skip_where_peft_lacks(case)
    rows = rows_of(case)
    assert "ours" in {row.provider for row in rows}
    for row in rows:
        assert not row.unavailable
        assert 0 < row.p20 <= row.p50 <= row.p80 and row.bytes > 0 and row.operations > 0 and row.peak >= 0
        assert row.error is None or row.error <= ULPS * torch.finfo(torch.float32).eps, row.provider


@pytest.mark.parametrize("case", [case for case in TINY if case.op in ("step", "merge")], ids=lambda case: case.name)
def test_every_run_starts_from_the_same_state(case):
    """The results of every run equal the first run's to the bit, so that no measurement diverges. Where the learning
    rate changes by less than a hundredth, they are nearly equal."""
    skip_where_peft_lacks(case)
    same = partial(torch.allclose, rtol=0, atol=1e-5) if "moving" in case.variant else torch.equal
    for build in registry.module(case.op).build(case, SETTING).providers.values():
        provider = build()

        def results(provider=provider):
            value = comparison.once(provider)
            return provider.results(value) if provider.results else dict(enumerate(provider.excluded))

        first = {name: t.detach().clone() for name, t in results().items()}
        for _ in range(3):
            last = results()
        assert first and all(same(first[name], last[name]) for name in first)


def test_measure_reports_the_error_of_a_wrong_result():
    case = next(case for case in TINY if case.op == "project")
    compared = registry.module("project").build(case, SETTING)
    compared.providers = {"wrong": lambda: Provider(lambda: {"s": torch.zeros(16, 4)}, results=lambda x: x)}
    (row,) = measured_rows(case, compared)
    assert row.error == pytest.approx(1.0)


def test_measure_gives_an_unavailable_provider_a_row_with_its_reason():
    def missing():
        raise Unavailable("no such package")

    case = next(case for case in TINY if case.op == "project")
    compared = registry.module("project").build(case, SETTING)
    compared.providers["other"] = missing
    compared.providers.pop("torch.compile")
    rows = measured_rows(case, compared)
    assert [row.unavailable for row in rows if row.provider == "other"] == ["no such package"]


@pytest.mark.parametrize(
    "dtype, arch, gluon", [("bfloat16", 90, True), ("float32", 90, False), ("bfloat16", 80, False)]
)
def test_layer_has_a_provider_for_each_strategy_that_runs(dtype, arch, gluon):
    case = cases.Case("layer", "", ((64, 48),), 4, 16, dtype, 0.0)
    with tiles.assume(arch=arch):
        _, layer_providers = providers.layer(case, Setting(torch.device("cpu"), triton=True))
    ours = [name for name in layer_providers if name.startswith("ours")]
    assert ours == ["ours", "ours, fused", "ours, cublas", *(["ours, gluon"] if gluon else [])]


def test_decode_runs_the_forward_of_one_token_without_gradients():
    case = next(case for case in TINY if case.op == "decode")
    built = registry.module("decode").build(case, SETTING).providers
    values = [comparison.once(build()) for name, build in built.items() if name != "torch.compile"]
    assert {(tuple(y.shape), y.requires_grad) for y in values} == {((1, case.shape[1]), False)}


def test_saved_bytes_of_the_layer_are_x_and_s():
    case = next(case for case in TINY if case.op == "layer")
    saved = {row.provider: row.saved for row in rows_of(case)}
    (d_in, _), element = case.shape, 4
    assert saved["ours"] == case.n_tokens * (d_in + case.r) * element
    assert saved["addmm_"] == case.n_tokens * d_in * element


def test_cost_of_the_layer_counts_each_operand_once():
    """The forward pass reads x, W, a, b and writes y and S."""
    case = cases.Case("layer", "", ((64, 64),), 16, 128, "bfloat16")
    cost = registry.module("layer").build(case, SETTING).costs["forward"]
    assert cost.bytes == 2 * (128 * 64 * 2 + 64 * 64 + 128 * 16) + 4 * (2 * 16 * 64)  # adapters are float32
    assert cost.operations == 2 * 128 * (64 * 64 + 16 * (64 + 64))


def test_rounds_run_providers_in_turns():
    order = []
    sides = {name: Provider(lambda name=name: order.append(name)) for name in "abc"}
    rounds = comparison.Rounds(sides, SETTING.device)
    for _ in range(3):
        rounds.run()
    assert "".join(order) == "abcbcacab"


def test_models_have_their_published_shapes():
    assert len(cases.MODELS["Llama-3-8B"].pairs) == 224 and len(cases.MODELS["SmolLM2-135M"].pairs) == 210
    every = cases.distinct(tuple(cases.MODELS))
    assert set(timings.SHAPES) <= set(every) and (18944, 3584) in every and len(every) == 12
    assert set(cases.SCALES["gpu"].ranks) == {8, 16, 32, 64, 128}


def test_cases_survive_json():
    for case in TINY:
        assert cases.from_dict(json.loads(json.dumps(asdict(case)))) == case


def run_of(rows, device="a CPU"):
    versions = {"lora-fast": "0.1.0", "torch": "2"}
    environment = {"device": device, "machine": "x86_64", "python": "3", "versions": versions}
    return {
        "environment": environment, "scale": "tiny", "on_gpu": False, "load": "0", "cores": 1, "timestamp": "now",
        "tests": ["project"], "what": {"project": "S", "layer": "y"}, "ceilings": [asdict(CEILINGS)],
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip


@pytest.fixture(scope="module")
def run():
    rows = [row for case in TINY if case.op in ("project", "layer") for row in rows_of(case)]
    rows += [comparison.Row(asdict(TINY[0]), "absent", "full", unavailable="<not> installed")]
    return run_of(rows)


def test_report_writes_all_files_of_a_run(run, tmp_path):
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


def test_changes_beyond_noise_are_marked(run):
    assert not any(change.beyond_noise for change in changes.compare(run, run))
    slower = json.loads(json.dumps(run))
    changed = next(row for row in slower["rows"] if row["provider"] == "ours" and row["mode"] == "full")
    changed["ratio"] = [value / 100 for value in changed["ratio"]]
    marked = [change for change in changes.compare(run, slower) if change.beyond_noise]
    assert [(change.provider, change.mode) for change in marked] == [("ours", "full")]
    assert marked[0].times == pytest.approx(0.01)


def test_changes_between_devices_compare_ratios_alone(run):
    first = run["rows"][0]["provider"]
    other = {**run, "environment": {**run["environment"], "device": "another"}}
    assert first in {change.provider for change in changes.compare(run, run)}
    assert first not in {change.provider for change in changes.compare(run, other)}


def test_every_test_of_the_registry_is_collected():
    """A node id that no longer exists would stop ``bench/run.py`` before it measures anything."""
    nodes = dict.fromkeys(node for op in registry.OPS for node in registry.TESTS[op])
    files = dict.fromkeys(node.partition("::")[0] for node in nodes)
    collected = set(collected_here(files, "-o", "addopts=--import-mode=importlib"))
    collected |= {node.partition("[")[0] for node in collected}
    assert not [node for node in nodes if node not in collected]


def test_run_measures_nothing_after_a_failed_test(tmp_path):
    """Runs run.py with a failing test in place of an op's tests."""
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    code = f"from suite import registry; registry.TESTS['project'] = ({str(red)!r},)\nimport run; run.main()"
    command = [sys.executable, "-c", code, "project", "--scale", "tiny", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == 1 and "a test failed" in done.stderr and not (tmp_path / "out").exists()


def test_bench_command_runs_the_suite(monkeypatch, tmp_path, capfd):
    from typer.testing import CliRunner

    from lora_fast.cli import app

    shown = CliRunner().invoke(app, ["bench", "--help"])
    assert shown.exit_code == 0 and "lora-fast bench --quick" in shown.output
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["bench", "nothing"]).exit_code == 2
    assert "expected some of project" in capfd.readouterr().err


def test_bench_command_without_the_repository_explains_itself(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from lora_fast.cli import app

    monkeypatch.setattr(sys.modules["lora_fast.cli.bench"], "SUITE", tmp_path / "bench" / "run.py")
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 2 and "part of the repository, not of the package" in done.output


# ---- Times of a device


class Device:
    """A model of a CUDA device: it has a clock for the host and one for the device, which works in order."""

    type = "cuda"

    def __init__(self, monkeypatch):
        self.host, self.device = 0.0, 0.0
        monkeypatch.setattr(comparison.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(comparison, "mark", lambda device: self.enqueue(0.0))
        monkeypatch.setattr(comparison, "seconds_between", lambda start, end: end - start)
        monkeypatch.setattr(comparison, "flush_cache", lambda device: self.enqueue(1e-4))
        monkeypatch.setattr(comparison, "keep_busy", lambda device, seconds: self.enqueue(seconds))
        monkeypatch.setattr(comparison, "wait", lambda device: self.wait())

    def enqueue(self, seconds: float) -> float:
        """Returns the time at which the device will have finished."""
        self.device = max(self.host, self.device) + seconds
        return self.device

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def op(self, host: float, device: float, waits: bool = False) -> None:
        self.host += host
        self.enqueue(device)
        if waits:
            self.wait()


def test_rounds_time_device_and_host_apart(monkeypatch):
    """The device's time excludes the host's; where that is impossible, the provider is marked as exposed."""
    device = Device(monkeypatch)

    def light():
        for _ in range(4):
            device.op(20e-6, 5e-6)

    providers = {
        "light": Provider(light, lambda value: device.op(300e-6, 40e-6)),
        "waits": Provider(lambda: device.op(20e-6, 5e-6, waits=True), lambda value: device.op(20e-6, 5e-6)),
        "slow host": Provider(lambda: device.op(80e-3, 5e-6), lambda value: device.op(1e-6, 5e-6)),
    }
    rounds = comparison.timed(providers, device, 0.5, comparison.simply)
    assert rounds.times("light", "forward") == pytest.approx([20] * len(rounds.runs["light"]), abs=1e-3)
    assert rounds.times("light", "full") == pytest.approx([60] * len(rounds.runs["light"]), abs=1e-3)
    assert rounds.host_times("light", "full") == pytest.approx([380] * len(rounds.runs["light"]), abs=1e-3)
    assert [name for name in providers if rounds.is_exposed(name)] == ["waits", "slow host"]
    assert rounds.head_start["light"] == pytest.approx(2.5 * 380e-6)
