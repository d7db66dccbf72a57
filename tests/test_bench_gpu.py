"""bench/gpu.py: what fails in a section is reported and the rest goes on; goals and verdicts; README's GPU table."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))  # its files import each other by their bare names, as scripts do

import gpu  # noqa: E402
import gpu_goals  # noqa: E402
import gpu_memcheck  # noqa: E402
import gpu_section  # noqa: E402
import gpu_timings  # noqa: E402
import measure  # noqa: E402
import readme_table  # noqa: E402
import shapes  # noqa: E402
import suite  # noqa: E402

SETTING = measure.Setting(torch.device("cpu"), triton=False)

# ---- What fails

PROGRAM = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(BENCH)!r})
import torch
from gpu_section import Options, Progress, Section, run
from measure import Provider, Unavailable

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def fail():
    raise RuntimeError("out of luck")

def provider(run):
    return lambda: Provider(run)

def jobs(options):
    def compared():
        found = {{}}
        for name, one in (("dies", die), ("raises", fail), ("works", lambda: None)):
            try:
                options.surviving(name, provider(one))()
                found[name] = "measured"
            except Unavailable as reason:
                found[name] = str(reason)
        return found

    yield "first", lambda: {{"ok": True}}
    yield "raises", fail
    yield "hangs", lambda: time.sleep(60)
    yield "dies", die
    yield "compared", compared
    yield "last", lambda: {{"ok": True}}

def slow(options):
    yield "first", lambda: {{"ok": True}}
    yield "slow", lambda: time.sleep(60)

def broken(options):
    fail()
    yield

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
each = 60 if given["--section"] == "slow" else 1
section = Section({{"jobs": jobs, "slow": slow, "broken": broken}}[given["--section"]], 60, each)
options = Options(False, torch.device("cpu"), 1.0, Progress.of(Path(given["--json"])))
sys.exit(not run(given["--section"], section, options, again=True))
"""


@pytest.fixture
def in_processes(monkeypatch, tmp_path):
    """Runs a section of PROGRAM within some seconds."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(gpu_section, "PROGRAM", tmp_path / "program.py")

    def run(name, seconds):
        section = gpu_section.Section(None, 60, 1)
        return asyncio.run(gpu_section.in_processes(name, section, seconds, tmp_path, []))

    return run


def test_what_fails_costs_nothing_else(in_processes):
    """A job that raises, one that hangs, one that kills its process, and providers that do."""
    found = in_processes("jobs", 120)
    assert "error" not in found
    figures = found["figures"]
    assert list(figures) == ["first", "raises", "hangs", "dies", "compared", "last"]
    assert figures["first"] == figures["last"] == {"ok": True}
    assert figures["raises"] == {"ok": False, "error": "RuntimeError: out of luck"}
    assert figures["hangs"] == {"ok": False, "error": "took more than 1 s"}
    assert figures["dies"] == {"ok": False, "error": "killed by SIGKILL"}
    lost = {"dies": "killed by SIGKILL", "raises": "RuntimeError: out of luck"}
    assert figures["compared"] == lost | {"works": "measured"}


def test_the_first_of_several_errors_is_told():
    try:
        try:
            raise ValueError("no such kernel")
        finally:
            raise RuntimeError("capture failed")
    except RuntimeError as error:
        assert gpu_section.of_chain(error) == "RuntimeError: capture failed, after ValueError: no such kernel"


def test_a_section_out_of_time_keeps_what_it_has(in_processes):
    found = in_processes("slow", 15)
    assert found["figures"] == {"first": {"ok": True}, "slow": {"ok": None, "error": "out of time"}}
    assert found["error"] == "out of time after 15 s" and found["seconds"] < 30


def test_a_section_that_cannot_begin_is_not_tried_for_ever(in_processes):
    assert in_processes("broken", 60)["error"] == "ended with exit status 1"


def test_a_device_that_answers_no_more_ends_the_process(monkeypatch, tmp_path):
    """After an illegal access everything raises: the provider is left out, and the next process goes on."""

    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_section, "wait", lost)
    progress = gpu_section.Progress(tmp_path / "found.json", running="4096→4096")
    options = gpu_section.Options(True, SETTING.device, 1.0, progress)
    with pytest.raises(SystemExit):
        options.surviving("ours", lambda: measure.Provider(lambda: None))()
    found = gpu_section.Progress.of(tmp_path / "found.json")
    assert "illegal" in found.lost["4096→4096"]["ours"] and not found.running and not found.figures


@pytest.mark.parametrize(
    "output, status, ok",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= Invalid __global__ write\n========= ERROR SUMMARY: 2 errors", 1, False),
        ("========= ERROR SUMMARY: 0 errors", 1, False),
        ("========= Error: Device not supported.", 1, None),
        ("", 255, None),
    ],
    ids=["clean", "memory errors", "a wrong result", "device refused", "did not start"],
)
def test_what_compute_sanitizer_says(output, status, ok):
    assert gpu_memcheck.verdict(output, status, checked=True)["ok"] is ok


def test_without_compute_sanitizer_nothing_is_known():
    assert gpu_memcheck.verdict("", 0, checked=False)["ok"] is None
    assert gpu_memcheck.verdict("", 1, checked=False)["ok"] is False


def test_dry_run_of_some_sections():
    """The rest, and the whole of these: python bench/gpu.py --dry-run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "gpu.py"), "--dry-run", "--only", "errors", "memcheck"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "── errors" in done.stdout and "fused: ok" in done.stdout and "checked by=not installed" in done.stdout
    assert not list((BENCH / "results").glob("cpu-*.json"))


def test_gpu_needs_no_package_of_the_command_line():
    """A GPU machine may have torch and Triton alone."""
    extras = ("typer", "rich", "matplotlib", "jinja2", "peft", "transformers", "pytest", "pytest_benchmark", "psutil")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import gpu; print(len(gpu.SECTIONS))"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True)
    assert done.stdout.strip() == "10", done.stderr


def test_seconds_of_the_sections_fit():
    """What is timed runs alone, and leaves three minutes for the checks."""
    alone = [section for section in gpu.SECTIONS.values() if section.alone]
    assert sum(section.seconds for section in alone) <= 60 * gpu.MINUTES - 180
    assert all(section.each <= section.seconds for section in gpu.SECTIONS.values())


# ---- Goals


# figure → goal, measured, verdict, of the made-up results below
EXPECTED = {
    "PEFT / ours, 4096→4096, r=16, 8192 tokens, bfloat16": ("≥ 1.3", "1.35", "met"),
    "PEFT / ours, 4096→4096, r=16, 8192 tokens, dropout 0.1, bfloat16": ("≥ 1.5", "1.35", "missed"),
    "addmm_ / ours, 4096→4096, r=16, 8192 tokens, bfloat16": ("≥ 1.15", "1.15", "met"),
    "ours / frozen linear, 4096→4096, r=16, 8192 tokens, bfloat16": ("≤ 1.12", "1.25", "missed"),
    "PEFT / ours, 4096→14336, r=16, 8192 tokens, bfloat16": ("≥ 1.25", "1.2", "missed"),
    "PEFT / ours, 4096→14336, r=16, 8192 tokens, dropout 0.1, bfloat16": ("≥ 1.5", "–", "not measured"),
    "addmm_ / ours, 4096→14336, r=16, 8192 tokens, bfloat16": ("≥ 1.15", "–", "not measured"),
    "ours / frozen linear, 4096→14336, r=16, 8192 tokens, bfloat16": ("≤ 1.12", "1", "met"),
    "LoRAAdamW(ILoRA) / torch's fused AdamW, 224 pairs, r=16": ("≤ 1.3", "1.25", "met"),
    "PEFT's Riemannian / LoRAAdamW(PiLoRA), 224 pairs, r=16": ("≥ 20", "19", "missed"),
    "224 Cayley inverses, r=16, one launch": ("≤ 20 µs", "10 µs", "met"),
    "the same with torch.linalg.inv in a loop / ours": ("≥ 100", "99", "missed"),
    "NB-LoRA training step / LoRA's": ("≤ 1.02", "1.02", "met"),
    "ScaLoRA (every 10 steps) training step / LoRA's": ("≤ 1.03", "–", "not measured"),
}


def made_up() -> dict:
    """Results under the names that the sections give."""
    layer = lambda d_out, dropout: shapes.Case(
        "layer", "", ((4096, d_out),), 16, gpu_timings.N_TOKENS, "bfloat16", dropout
    ).name
    scale = shapes.Scale({}, (gpu_timings.MODEL,), (gpu_timings.RANK,), ("bfloat16",), (0.0,), 0, 0)
    grouped = lambda op, of: {f"{op}: {case.name}": of for case in suite.module(op).cases(scale)}
    eager, wide = {"PEFT": 13.5, "addmm_": 11.5, "ours": 10.0, "frozen linear": 8.0}, {"PEFT": 12.0, "addmm_": None}
    layers = {
        layer(4096, 0.0): rows("full", eager),
        layer(4096, 0.1): rows("full", eager),
        layer(14336, 0.0): rows("full", wide | {"ours": 10.0, "frozen linear": 10.0}),
        layer(14336, 0.1): {"ok": False, "error": "took more than 60 s"},
    }
    ours = {"ours": 10.0}
    step = rows("forward", ours | {"torch's fused AdamW alone": 8.0, "PEFT's Riemannian": 190.0})
    training = {"LoRA": {"over LoRA": [1.0] * 3}, "NB-LoRA": {"over LoRA": [1.0, 1.02, 1.1]}, "ScaLoRA": {}}
    return {
        "layers": {"figures": {"ceilings": {}} | layers, "error": "out of time after 170 s"},
        "steps": {"figures": grouped("step", step)},
        "small": {"figures": grouped("solve", rows("forward", ours | {"torch, loop": 990.0}))},
        "training": {"figures": {gpu_goals.TRAINING: training}},
    }


def rows(mode: str, medians: dict) -> dict:
    return {"rows": [{"provider": name, "mode": mode, "p50": p50} for name, p50 in medians.items()]}


def test_every_goal_has_its_row_and_its_verdict():
    """Met, missed, not measured: a provider that failed, a figure that failed, a section cut short."""
    timed = [row for row in gpu_goals.verdicts(made_up()) if row.goal != "all"]
    assert {row.figure: row[1:] for row in timed} == EXPECTED


def test_providers_of_the_goals_are_those_of_the_suite():
    """By name: a renamed provider would be "not measured" for ever."""
    scale = shapes.Scale({}, (gpu_timings.MODEL,), (gpu_timings.RANK,), ("bfloat16",), (0.0,), 0, 0)
    names = set(suite.module("layer").build(shapes.Case("layer", "", ((8, 8),), 2, 4), SETTING).providers)
    for op in ("step", "solve"):
        for case in suite.module(op).cases(scale):
            names |= set(suite.module(op).build(replace(case, pairs=((8, 8),), r=2), SETTING).providers)
    wanted = {"PEFT", "addmm_", "ours", "frozen linear", "torch, loop"}
    assert wanted | {"torch's fused AdamW alone", "PEFT's Riemannian"} <= names


def test_nothing_measured_is_no_verdict():
    assert {row.verdict for row in gpu_goals.verdicts({})} == {"not measured"}


@pytest.mark.parametrize(
    "figures, verdict",
    [([True, True], "met"), ([True, False], "missed"), ([True, None], "not measured"), ([], "not measured")],
)
def test_checks_are_met_only_if_all_are_right(figures, verdict):
    section = {"figures": {str(i): {"ok": ok} for i, ok in enumerate(figures)}}
    (row,) = [row for row in gpu_goals.verdicts({"repeats": section}) if row.figure == gpu_goals.CHECKS["repeats"]]
    assert row.verdict == verdict


# ---- README


def test_readme_shows_the_newest_results():
    text = (ROOT / "README.md").read_text()
    assert readme_table.with_table(text, BENCH / "results") == text, "run python bench/readme_table.py"
    if readme_table.newest(BENCH / "results") is None:
        assert "Not verified on a GPU" in text


def test_table_of_results(tmp_path):
    assert "Not verified on a GPU" in readme_table.table(tmp_path)
    verdict = gpu_goals.Verdict("PEFT / ours", "≥ 1.3", "1.4", "met")._asdict()
    where = {"device": "H", "driver": "1", "torch": "2", "triton": "3"}
    for date, figure in (("2030-01-02", "new"), ("2030-01-01", "old")):
        found = {"conditions": {**where, "date": date}, "verdicts": [{**verdict, "figure": figure}]}
        (tmp_path / f"h-{date}.json").write_text(json.dumps(found))
    shown = readme_table.table(tmp_path)
    assert "| new | ≥ 1.3 | 1.4 | met |" in shown and "old" not in shown and "2030-01-02" in shown
