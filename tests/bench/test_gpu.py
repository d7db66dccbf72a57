"""bench/gpu.py: what fails in a section is reported and the rest goes on; budgets; the carried cache; goals and
verdicts; README's GPU table."""

import asyncio
import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import readme_table
import torch
import triton

from gpu_sections import (
    compile_cache,
    counters,
    goals,
    memcheck,
    native_tests,
    plot,
    stages,
    timings,
)
from gpu_sections import section as gpu_section
from suite import (
    cases,
    registry,
)
from suite import comparison as measure

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
SETTING = measure.Setting(torch.device("cpu"), triton=False)

# ---- What fails

PROGRAM = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(BENCH)!r})
import torch
from gpu_sections.section import Figures, Options, Progress, Section, work
from suite.comparison import Provider, Unavailable

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def fail():
    raise RuntimeError("out of luck")

def fine():
    return {{"ok": True}}

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

    return [("first", fine), ("raises", fail), ("raises again", fail), ("hangs", lambda: time.sleep(60)), ("dies", die),
            ("compared", compared), ("last", fine)]

def slow(options):
    return [("first", fine), ("slow", lambda: time.sleep(60)), ("never", fine)]

def long(options):
    return [("first", lambda: time.sleep(2) or fine()), ("not begun", fine)]

def broken(options):
    fail()

def shared(options):
    return [(str(i), fine) for i in range(5)]

given = sys.argv[sys.argv.index("--work") + 1 : sys.argv.index("--share")]
options = dict(zip(sys.argv[1::2], sys.argv[2::2])) if len(given) == 1 else None
at = lambda name: sys.argv[sys.argv.index(name) + 1]
known = {{"jobs": (jobs, 60, 1), "slow": (slow, 60, 60), "long": (long, 1, 60), "broken": (broken, 60, 60),
          "shared": (shared, 60, 60)}}
sections = {{name: Section(*known[name], 1) for name in given}}
share = tuple(map(int, at("--share").split("/")))
progress, figures = Progress.of(Path(at("--progress"))), Figures(Path(at("--figures")))
sys.exit(not work(sections, Options("device", torch.device("cpu"), figures, progress, share=share)))
"""


@pytest.fixture
def in_processes(monkeypatch, tmp_path):
    """Runs sections of PROGRAM within some seconds. Returns their figures."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(gpu_section, "PROGRAM", tmp_path / "program.py")

    def run(names, seconds, share=(0, 1)):
        figures = gpu_section.Figures(tmp_path / "figures.jsonl")
        asyncio.run(gpu_section.in_processes(names, share, "device", seconds, figures, tmp_path))
        return figures.read()

    return run


def test_what_fails_costs_nothing_else(in_processes):
    """Jobs that raise, one that hangs, one that kills its process, providers that do; the next section follows."""
    found = in_processes(["jobs", "broken", "shared"], 120)
    figures = found["jobs"]
    assert list(figures) == ["first", "raises", "raises again", "hangs", "dies", "compared", "last"]
    assert figures["first"] == figures["last"] == {"ok": True}
    assert figures["raises"] == figures["raises again"] == {"ok": False, "error": "RuntimeError: out of luck"}
    assert figures["hangs"] == {"ok": False, "error": "took too long"}
    assert figures["dies"] == {"ok": False, "error": "killed by SIGKILL"}
    lost = {"dies": "killed by SIGKILL", "raises": "RuntimeError: out of luck"}
    assert figures["compared"] == lost | {"works": "measured"}
    assert found["broken"] == {"its jobs": {"ok": False, "error": "RuntimeError: out of luck"}}
    assert list(found["shared"]) == list("01234")


def test_processes_share_a_section(in_processes):
    in_processes(["shared"], 60, (0, 2))
    assert list(in_processes(["shared"], 60, (1, 2))["shared"]) == ["0", "2", "4", "1", "3"]


def test_a_lane_out_of_time_keeps_what_it_has(in_processes):
    found = in_processes(["slow"], 15)["slow"]
    assert found == {"first": {"ok": True}, "slow": {"ok": None, "error": "out of time: ended after 15 s"}}


def test_a_section_out_of_time_says_what_it_has_not_begun(in_processes):
    found = in_processes(["long", "shared"], 60)
    assert found["long"] == {
        "first": {"ok": True},
        "not begun": {"ok": None, "error": "not begun: 1 s were over"},
    }
    assert list(found["shared"]) == list("01234")


def test_a_process_that_cannot_begin_is_not_tried_for_ever(in_processes, tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text("raise SystemExit(3)")
    assert in_processes(["jobs"], 60) == {"jobs": {"its process": {"ok": False, "error": "ended with exit status 3"}}}


def test_the_first_of_several_errors_is_told():
    try:
        try:
            raise ValueError("no such kernel")
        finally:
            raise RuntimeError("capture failed")
    except RuntimeError as error:
        assert gpu_section.of_chain(error) == "RuntimeError: capture failed, after ValueError: no such kernel"


def test_a_device_that_answers_no_more_ends_the_process(monkeypatch, tmp_path):
    """After an illegal access everything raises: the provider is left out, and the next process goes on."""

    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_section, "wait", lost)
    progress = gpu_section.Progress(tmp_path / "found.json", running=("layers", "4096→4096"))
    figures = gpu_section.Figures(tmp_path / "figures.jsonl")
    options = gpu_section.Options("device", SETTING.device, figures, progress)
    with pytest.raises(SystemExit):
        options.surviving("ours", lambda: measure.Provider(lambda: None))()
    found = gpu_section.Progress.of(tmp_path / "found.json")
    assert "illegal" in found.lost["layers: 4096→4096"]["ours"] and not found.running and not figures.read()


CLEAN, ERRORS = "========= ERROR SUMMARY: 0 errors", "========= Invalid write\n========= ERROR SUMMARY: 2 errors"


@pytest.mark.parametrize(
    "output, status, complete, ok",
    [
        (CLEAN, 0, True, True),
        (CLEAN, 0, False, None),
        (ERRORS, 1, True, False),
        (CLEAN, 1, False, False),
        ("========= Error: Device not supported.", 1, False, None),
        ("", 255, False, None),
        ("", None, False, None),
    ],
    ids=["clean", "some have not run", "memory errors", "a wrong result", "device refused", "did not start", "late"],
)
def test_what_compute_sanitizer_says(output, status, complete, ok):
    assert memcheck.verdict(output, status, checked=True, complete=complete)["ok"] is ok


def test_without_compute_sanitizer_nothing_is_known():
    assert memcheck.verdict("", 0, checked=False, complete=True)["ok"] is None
    assert memcheck.verdict("", 1, checked=False, complete=False)["ok"] is False


@pytest.mark.parametrize(
    "output, status, expected",
    [
        ("[gw1] [ 50%] PASSED test_a.py::test_x[1] \n[gw0] [100%] PASSED test_a.py::test_y ", 0, (True, 2, [])),
        (
            "test_a.py::test_x[1 - 2] PASSED [ 50%]\ntest_a.py::test_y FAILED [100%]\nFAILED test_a.py::test_y - nan",
            1,
            (False, 1, ["test_a.py::test_y - nan"]),
        ),
        ("[gw1] [ 50%] PASSED test_a.py::test_x ", None, (None, 1, [])),
        ("[gw1] [ 50%] FAILED test_a.py::test_x ", None, (False, 0, ["test_a.py::test_x"])),
        ("no tests ran", 5, (False, 0, [])),
    ],
    ids=["green", "red, one process", "late", "late and red", "nothing ran"],
)
def test_what_pytest_says(output, status, expected):
    found = native_tests.outcome(output, status)
    assert (found["ok"], found.get("passed", 0), found["failures"]) == expected


def test_every_gpu_file_runs_there():
    """A second ``pytestmark`` would replace the first one, and the file would not run."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "-m", "gpu and not budget"]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    collected = {line.partition("::")[0].rpartition("/")[2] for line in done.stdout.splitlines() if "::" in line}
    assert len(marked) > 10 and marked - {"test_bench_gpu.py"} == collected


def test_what_ncu_says():
    lines = ['"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for launch, (kernel, microseconds) in enumerate([("lora_a(long)", "1,500"), ("lora_b", "90"), ("lora_a", "2,500")]):
        unit = "ns" if kernel == "lora_b" else "us"
        lines.append(f'"{launch}","{kernel}","gpu__time_duration.sum","{unit}","{microseconds}"')
        lines.append(f'"{launch}","{kernel}","sm__warps_active.avg.pct_of_peak_sustained_active","%","n/a"')
        lines.append(f'"{launch}","{kernel}","launch__registers_per_thread","register/thread","{64 + launch}"')
    found = counters.parse("==PROF== noise\n" + "\n".join(lines))
    assert found == [
        {"kernel": "lora_a", "µs": 2500.0, "registers": 66.0},
        {"kernel": "lora_b", "µs": 0.09, "registers": 65.0},
    ]
    assert counters.parse("==ERROR== no counters") == []


def run_gpu(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment)


def test_dry_run_of_some_sections(tmp_path):
    """The rest, and the whole of these: python bench/gpu.py --dry-run --stage 1, --stage 2."""
    done = run_gpu("--dry-run", "--only", "inverses", "memcheck", "suite", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked by=not installed" in done.stdout and "on the stub driver: ok: True" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "dry-run.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines] == ["suite", "memcheck", "inverses"]
    assert lines[0]["values"]["ok"] and lines[0]["values"]["passed"] > 1
    assert {row["provider"] for row in lines[2]["values"]["rows"]} == {"torch, loop", "torch, batched", "ours"}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--stage", "1"], "--out DIR"),
        ([], "name a stage"),
        (["--stage", "1", "--only", "layers"], "name a stage"),
        (["--stage", "1", "--out", "there"], "no CUDA device"),
        (["--stage", "1", "--out", __file__], "name another one"),
        (["--stage", "1", "--out", "there", "--cache", "nothing.tar.xz"], "no such file"),
        (["--only", "nothing"], "there are errors, graphs"),
        (["--dry", "--stage", "1"], "unrecognized"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, expected):
    done = run_gpu(*arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and expected in done.stderr


def test_gpu_needs_no_package_of_the_command_line():
    """A GPU machine may have torch and Triton alone."""
    extras = ("typer", "rich", "matplotlib", "jinja2", "peft", "transformers", "pytest", "pytest_benchmark", "psutil")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import gpu; print(len(gpu.SECTIONS))"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True)
    assert done.stdout.strip() == str(len(gpu.SECTIONS)), done.stderr


# ---- Budgets


@pytest.mark.parametrize("number, seconds", [(1, 210), (2, 400)])
def test_budgets_and_estimates_fit(number, seconds):
    """A lane fits in its phase, the phases in the stage, the estimate of each section in its budget."""
    stage = stages.STAGES[number]
    assert stage.seconds == seconds
    assert stage.compile + sum(phase.seconds for phase in stage.phases) + stages.END <= seconds
    sketch = gpu_section.Options(
        "device", SETTING.device, gpu_section.Figures(Path(os.devnull)), gpu_section.Progress()
    )
    for phase in stage.phases:
        for lane in phase.lanes:
            sections = [stages.SECTIONS[name] for name in lane]
            with gpu.tiles.assume(arch=90):
                estimates = [stages.estimate(name, len(stages.SECTIONS[name].jobs(sketch))) for name in lane]
            assert stages.START + sum(estimates) <= phase.seconds
            assert all(e <= s.seconds for e, s in zip(estimates, sections, strict=True))
            assert stages.START + sum(section.seconds for section in sections) <= phase.seconds
            assert all(section.each <= section.seconds for section in sections)


def test_what_is_timed_runs_alone():
    for stage in (*stages.STAGES.values(), stages.some(list(stages.SECTIONS))):
        assert len(stage.phases[1].lanes) == 1
        assert sum(stages.SECTIONS[name].processes for name in stage.phases[1].lanes[0]) == len(
            stage.phases[1].lanes[0]
        )


def test_every_section_is_in_a_stage():
    staged = {name for stage in stages.STAGES.values() for name in stage.sections}
    assert staged == set(stages.SECTIONS)
    assert set(stages.some(["layers", "grid", "suite"]).sections) == {"layers", "grid", "suite"}
    assert {goal.section for goal in goals._goals()} | set(goals.CHECKS) <= staged


def test_the_report_is_short_enough():
    """However much fails, the table stays, and of each section something."""
    failing = {f"figure {i}": {"ok": False, "error": "x" * 1000} for i in range(200)}
    unknown = {f"figure {i}": {"ok": None, "error": "y" * 1000} for i in range(200)}
    late = {"training": {"one": {"ok": False, "error": "killed by SIGKILL"}}}
    text = gpu.report({"errors": failing, "graphs": unknown} | late, list(stages.SECTIONS), {})
    assert len(text) <= gpu.MOST_PRINTED and "not measured" in text and "failures: 201" in text
    assert "training: one: killed by SIGKILL" in text and "errors: and 196 more" in text and "not known: 200" in text


@pytest.mark.parametrize("number", stages.STAGES)
def test_the_plan_adds_up(number):
    """Of a phase its longest lane counts, in estimates; of the stage all phases."""
    stage = stages.STAGES[number]
    text = gpu.plan(f"stage{number}", stage)
    assert "none of them measured" in text
    for name in stage.sections:
        assert any(line.startswith(name) for line in text.splitlines())
    columns = re.findall(r"(\d+) s +(\d+) s", text)
    of_sections = len(stage.sections)
    phases = [
        pair for pair, line in zip(columns, re.findall(r".*\d+ s +\d+ s.*", text), strict=True) if "longest" in line
    ]
    assert len(columns) == of_sections + len(phases) + 3  # compile, end, in all
    for column, tolerance in ((0, 3), (1, 0)):  # estimates are rounded
        first, *_, end, total = (int(pair[column]) for pair in columns)
        assert abs(total - first - end - sum(int(pair[column]) for pair in phases)) <= tolerance


# ---- A whole stage


STAND_IN = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(BENCH)!r})
from gpu_sections.section import Figures, Progress
import os

at = lambda name: sys.argv[sys.argv.index(name) + 1]
names = sys.argv[sys.argv.index("--work") + 1 : sys.argv.index("--share")]
figures, progress = Figures(Path(at("--figures"))), Progress(Path(at("--progress")), complete=True)
part = at("--share").split("/")[0]
for name in names:
    if "stub" in sys.argv:
        entry = Path(os.environ["TRITON_CACHE_DIR"]) / f"kernel-{{name}}"
        entry.mkdir(parents=True, exist_ok=True)
        (entry / "kernel.cubin").write_bytes(b"code")
        figures.add(name, f"job {{part}}", {{"ok": True, "misses": 1, "hits": 2}})
    else:
        figures.add(name, f"figure {{part}}", {{"ok": name != "graphs"}})
progress.save()
"""


def test_a_stage_from_start_to_end(monkeypatch, tmp_path, capfd):
    """Compiled, checked, timed, told: with a stand-in for the work of its processes."""
    (tmp_path / "program.py").write_text(STAND_IN)
    monkeypatch.setattr(gpu_section, "PROGRAM", tmp_path / "program.py")
    for name in compile_cache.environment(tmp_path):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
    out = tmp_path / "out"
    run = gpu.Run("stage1", stages.STAGES[1], out)
    run.on_device([])
    assert run.right is False  # graphs are wrong
    found = gpu_section.Figures(out / "stage1.jsonl").read()
    n = gpu.COMPILERS * len(run.stage.sections)
    counts = {"hits": 2 * n, "misses": n, "failures": [], "carried": 0, "of another Triton": 0}
    assert found["compile"]["kernels"] == {"ok": True} | counts
    assert found["conditions"]["machine"]["device"] == "cpu" and len(found["errors"]) == 3
    assert found["compile"]["new kernels"] == {"packed": len(run.stage.sections), "no room": 0}
    assert {path.name for path in out.iterdir()} == {"stage1.jsonl", "stage1.txt", "stage1-cache.tar.xz"}
    printed, told = capfd.readouterr().out, (out / "stage1.txt").read_text()
    assert told in printed and "failures: 1\ngraphs: figure 0" in told and "errors: 3 figures" in told
    with tarfile.open(out / "stage1-cache.tar.xz") as tar:
        assert set(tar.getnames()) == {f"kernel-{name}/kernel.cubin" for name in run.stage.sections}


# ---- The meters see what is wrong


def test_a_wrong_layer_is_seen(monkeypatch, tmp_path):
    from gpu_sections import errors

    options = gpu_section.Options(
        "interpreter", SETTING.device, gpu_section.Figures(tmp_path / "a.jsonl"), gpu_section.Progress()
    )
    case = 33, 40, 24, 3, None, torch.float32, 0.1, options
    assert errors.judge(*case)["ok"]
    right = errors.lf.functional.lora_linear
    for wrong in (
        lambda x, weight, bias, a, b, scaling, dropout, seed: right(
            x, weight, bias, a, b, 1.02 * scaling, dropout, seed
        ),
        lambda x, weight, bias, a, b, scaling, dropout, seed: right(x, weight, bias, a, b, scaling, dropout, seed + 1),
        lambda x, weight, bias, a, b, *rest: right(x, weight, bias, a.bfloat16().float(), b, *rest),
    ):
        monkeypatch.setattr(errors.lf.functional, "lora_linear", wrong)
        assert not errors.judge(*case)["ok"]


def test_a_wrong_family_is_seen():
    from gpu_sections import families

    right = torch.ones(8, 8)
    of = lambda got: lambda elements, d, r, device: ({"x": got}, {"x": right})
    judged = lambda got: families.judged(of(got), 64, 8, 8, SETTING.device)["ok"]
    assert (
        judged(right) and not judged(right * 1.01) and not judged(right.bfloat16() * 1.03) and judged(right.bfloat16())
    )
    assert not judged(torch.full((8, 8), float("nan")))


def test_a_result_that_is_no_number_is_seen():
    assert measure.relative_error(torch.tensor([float("nan"), 1.0]), torch.ones(2, dtype=torch.float64)) == float("inf")


def test_a_wrong_result_of_ours_is_seen(tmp_path):
    """Those that are timed are judged, too."""
    figures = gpu_section.Figures(tmp_path / "figures.jsonl")
    options = gpu_section.Options("interpreter", SETTING.device, figures, gpu_section.Progress(running=("a", "b")))
    exact = lambda: {"x": torch.ones(3, dtype=torch.float64)}
    provider = lambda value: lambda: measure.Provider(lambda: None, results=lambda _: {"x": torch.full((3,), value)})
    case = cases.Case("linear", "", ((8, 8),), 2, 4, "bfloat16", variant="y")
    work = {"forward": measure.Cost(1, 1)}
    for value, ok in ((1.0, None), (1.1, False), (float("nan"), False)):
        comparison = measure.Comparison({"torch": provider(2.0), "ours": provider(value)}, work, exact)
        assert timings.measured(case, comparison, options, 0.0).get("ok") is ok

    def fails():
        raise RuntimeError("out of luck")

    for lost, ok in (("ours, gluon", False), ("PEFT", None)):
        comparison = measure.Comparison({"torch": provider(2.0), "ours": provider(1.0), lost: fails}, work, exact)
        values = timings.measured(case, comparison, options, 0.0)
        assert values["ok"] is ok and "out of luck" in values["error"] and len(values["rows"]) == 3


def test_calls_that_differ_are_seen():
    from gpu_sections import repeats

    results = iter([torch.zeros(3)] * 3 + [torch.tensor([0.0, 0.0, 1e-7])] + [torch.zeros(3)] * 2)
    assert repeats.differing(lambda: [next(results)], 5) == {"ok": False, "runs": 5, "differing": 1}


# ---- The carried cache


def a_cache(folder: Path, names: str) -> Path:
    """As Triton leaves it, with what a process that was ended has left."""
    for name in names:
        entry = folder / name
        entry.mkdir(parents=True)
        version = "1.0" if name == "b" else triton.__version__
        metadata = json.dumps({"triton_version": version}).encode()
        files = {f"{name}.cubin": os.urandom(2000), f"{name}.json": metadata, f"{name}.source": b"text"}
        for file, content in files.items():
            (entry / file).write_bytes(content)
        members = {file: str(entry / file) for file in files}
        (entry / f"__grp__{name}.json").write_text(json.dumps({"child_paths": members}))
        (entry / "tmp.pid_1").mkdir()
        (entry / "tmp.pid_1" / f"{name}.cubin").write_bytes(b"half")
    return folder


def test_a_cache_travels_to_another_place(tmp_path):
    cache, archive = a_cache(tmp_path / "here", "abc"), tmp_path / "cache.tar.xz"
    names = compile_cache.entries(cache)
    assert names == {f"{k}/{file}" for k in "abc" for file in (f"{k}.cubin", f"{k}.json", f"__grp__{k}.json")}
    assert compile_cache.pack(cache, names, archive, most=1) == []
    assert compile_cache.unpack(archive, tmp_path / "there") == (2, 1), "one is of another Triton"
    assert compile_cache.entries(tmp_path / "there") == names
    group = json.loads((tmp_path / "there" / "a" / "__grp__a.json").read_text())["child_paths"]
    assert group["a.cubin"] == str(tmp_path / "there" / "a" / "a.cubin")
    assert (tmp_path / "there/a/a.cubin").read_bytes() == (cache / "a/a.cubin").read_bytes()


def test_an_archive_keeps_to_its_limit(tmp_path):
    """A kernel without its code would be worse than none."""
    cache, archive = a_cache(tmp_path / "here", "abcdefgh"), tmp_path / "cache.tar.xz"
    left = compile_cache.pack(cache, compile_cache.entries(cache), archive, most=9000 / compile_cache.MEBIBYTE)
    assert archive.stat().st_size <= 9000 and 0 < len(left) < 24 and len(left) % 3 == 0
    assert sum(compile_cache.unpack(archive, tmp_path / "there")) == 8 - len(left) // 3


def test_keys_do_not_depend_on_what_was_compiled_before(tmp_path):
    """Triton before 3.9 lets them."""
    code = """if 1:
        import sys; sys.path.insert(0, {!r})
        import gpu_cache; gpu_cache.use()
        from lora_fast.kernels import grads, linear, project
        kernels = [linear.lora_linear_kernel, project.lora_project_kernel, grads.lora_grad_a_kernel]
        keys = {{kernel.__name__: kernel.cache_key for kernel in kernels[::{}]}}
        print(sorted(keys.items()))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= compile_cache.environment(tmp_path)
    run = lambda step: subprocess.check_output([sys.executable, "-c", code.format(str(BENCH), step)], env=environment)
    assert run(1) == run(-1)


def test_a_filled_cache_is_hit_from_another_place(tmp_path):
    """With the keys that travel: nothing is compiled the second time."""
    counts = []
    for name in ("filled", "carried"):
        cache = tmp_path / name
        if counts:
            compile_cache.pack(
                tmp_path / "filled", compile_cache.entries(tmp_path / "filled"), tmp_path / "a.tar.xz", most=1
            )
            compile_cache.unpack(tmp_path / "a.tar.xz", cache)
        share = ("--work", "inverses", "--mode", "stub", "--figures", str(tmp_path / f"{name}.jsonl"))
        done = run_gpu(*share, **compile_cache.environment(cache), **compile_cache.stub_environment())
        assert done.returncode == 0, done.stderr
        counts.append(gpu.compiled(gpu_section.Figures(tmp_path / f"{name}.jsonl")))
    assert counts[0]["misses"] > 0 == counts[1]["misses"] and counts[1]["hits"] == counts[0]["misses"]


# ---- Goals


# figure → goal, measured, verdict, of the made-up results below
EXPECTED = {
    "our GEMM, fused / cuBLAS alone, 4096→4096, r=16, y, 8192 tokens, bfloat16": ("≤ 1.05", "1.04", "met"),
    "our GEMM, gluon / cuBLAS alone, 4096→4096, r=16, y, 8192 tokens, bfloat16": ("≤ 1.01", "1.02", "missed"),
    "PEFT / ours, 4096→4096, r=16, 8192 tokens, bfloat16": ("≥ 1.3", "1.35", "met"),
    "PEFT / ours, 4096→4096, r=16, 8192 tokens, dropout 0.1, bfloat16": ("≥ 1.5", "1.35", "missed"),
    "addmm_ / ours, 4096→4096, r=16, 8192 tokens, bfloat16": ("≥ 1.15", "1.15", "met"),
    "ours / frozen linear, 4096→4096, r=16, 8192 tokens, bfloat16": ("≤ 1.12", "1.25", "missed"),
    "PEFT / ours, 4096→14336, r=16, 8192 tokens, bfloat16": ("≥ 1.25", "1.2", "missed"),
    "PEFT / ours, 4096→14336, r=16, 8192 tokens, dropout 0.1, bfloat16": ("≥ 1.5", "–", "not measured"),
    "addmm_ / ours, 4096→14336, r=16, 8192 tokens, bfloat16": ("≥ 1.15", "–", "not measured"),
    "ours / frozen linear, 4096→14336, r=16, 8192 tokens, bfloat16": ("≤ 1.12", "1", "met"),
    "host time of a layer, ours / PEFT": ("≤ 0.75", "0.741", "met"),
    "LoRAAdamW(ILoRA) / torch's fused AdamW, 224 pairs, r=16": ("≤ 1.3", "1.25", "met"),
    "PEFT's Riemannian / LoRAAdamW(PiLoRA), 224 pairs, r=16": ("≥ 20", "19", "missed"),
    "host time, LoRAAdamW(AdamW) / torch's fused AdamW, moving gradients": ("≤ 0.5", "1.25", "missed"),
    "host time, LoRAAdamW(ILoRA) / torch's fused AdamW, moving gradients": ("≤ 0.8", "1.25", "missed"),
    "host time, LoRAAdamW(PiLoRA) / torch's fused AdamW, moving gradients": ("≤ 1", "1.25", "missed"),
    "224 Cayley inverses, r=16, one launch": ("≤ 20 µs", "10 µs", "met"),
    "torch.linalg.inv in a loop / those 224 inverses": ("≥ 100", "99", "missed"),
    "NB-LoRA training step / LoRA's": ("≤ 1.02", "1.02", "met"),
    "ScaLoRA (every 10 steps) training step / LoRA's": ("≤ 1.03", "–", "not measured"),
    "PEFT / ours, every layer, rank and number of tokens: the least": ("≥ 1", "0.9", "missed"),
    "a training step of Llama-3-8B (public anchor 12,473)": ("≥ 14000 tokens/s", "14,100 tokens/s", "met"),
    "that step's peak memory / PEFT's": ("≤ 0.8", "0.75", "met"),
}


def made_up() -> dict:
    """Results under the names that the sections give."""
    n = timings.N_TOKENS
    layer = lambda d_out, dropout: cases.Case("layer", "", ((4096, d_out),), 16, n, "bfloat16", dropout).name
    gemm = cases.Case("linear", "", ((4096, 4096),), 16, n, "bfloat16", variant="y").name
    scale = cases.Scale({}, (timings.MODEL,), (timings.RANK,), ("bfloat16",), (0.0,), 0, 0)
    grouped = lambda op, values: {f"{op}: {case.name}": values for case in registry.module(op).cases(scale)}
    eager, wide = {"PEFT": 13.5, "addmm_": 11.5, "ours": 10.0, "frozen linear": 8.0}, {"PEFT": 12.0, "addmm_": None}
    layers = {
        layer(4096, 0.0): rows("full", eager),
        layer(4096, 0.1): rows("full", eager),
        layer(14336, 0.0): rows("full", wide | {"ours": 10.0, "frozen linear": 10.0}),
        layer(14336, 0.1): {"ok": False, "error": "took too long"},
    }
    ours = {"ours": 10.0}
    steps = {"torch's fused AdamW alone": 8.0, "torch's fused AdamW": 8.0, "PEFT's Riemannian": 190.0}
    training = {"LoRA": {"over LoRA": [1.0] * 3}, "NB-LoRA": {"over LoRA": [1.0, 1.02, 1.1]}, "ScaLoRA": {}}
    engines = {"ours": {"tokens a second": 14_100.0, "peak GiB": 30.0}, "PEFT": {"peak GiB": 40.0}}
    return {
        "gemm": {gemm: rows("forward", {goals.CUBLAS: 100.0, "ours, fused": 104.0, "ours, gluon": 102.0})},
        "layers": layers,
        "steps": grouped("step", rows("forward", ours | steps)),
        "inverses": grouped("solve", rows("forward", ours | {"torch, loop": 990.0})),
        "training": {goals.TRAINING: training},
        "grid": {str(i): rows("full", ours | {"PEFT": 9.0 + i}) for i in range(16)},
        "whole": {goals.WHOLE: engines},
    }


def rows(mode: str, medians: dict) -> dict:
    hosts = {name: None if p50 is None else (0.0, p50, 0.0) for name, p50 in medians.items()}
    return {
        "rows": [
            {"provider": name, "mode": mode, "p50": p50, "host": hosts[name], "exposed": False}
            for name, p50 in medians.items()
        ]
    }


def test_every_goal_has_its_row_and_its_verdict():
    """Met, missed, not measured: a provider that failed, a figure that failed, a section cut short."""
    found = [row for row in goals.verdicts(made_up(), stages.SECTIONS) if row.goal != "all"]
    found = {row.figure: row[1:] for row in found if not (row.verdict == "not measured" and "GEMM" in row.figure)}
    assert found == EXPECTED


def test_a_grid_with_holes_is_not_measured():
    """The least of what is left says nothing."""
    least = lambda results: next(row for row in goals.verdicts(results, ["grid"]) if "the least" in row.figure)
    results = made_up()
    del results["grid"]["3"]
    assert least(results).verdict == "not measured"
    results["grid"]["3"] = rows("full", {"ours": None, "PEFT": 9.0})
    assert least(results).verdict == "not measured"


def test_the_host_s_time_in_a_figure_shows():
    """Of others it is told; of ours it is no figure."""
    inverses = lambda results: goals.verdicts(results, ["inverses"])[1]
    results = made_up()
    (figure,) = [values for name, values in results["inverses"].items() if "inverse" in name]
    for row in figure["rows"]:
        row["exposed"] = row["provider"] == "torch, loop"
    assert inverses(results).measured == "99 (with the host's)"
    for row in figure["rows"]:
        row["exposed"] = row["provider"] == "ours"
    assert inverses(results).verdict == "not measured"


def test_a_stage_is_judged_by_its_own_goals():
    first, second = (goals.verdicts(made_up(), stages.STAGES[number].sections) for number in (1, 2))
    assert not {row.figure for row in first} & {row.figure for row in second}
    assert {row.figure for row in (*first, *second)} == {
        row.figure for row in goals.verdicts(made_up(), stages.SECTIONS)
    }


def test_providers_of_the_goals_are_those_of_the_suite():
    """By name: a renamed provider would be "not measured" for ever."""
    scale = cases.Scale({}, (timings.MODEL,), (timings.RANK,), ("bfloat16",), (0.0,), 0, 0)
    names = set(registry.module("layer").build(cases.Case("layer", "", ((8, 8),), 2, 4), SETTING).providers)
    names |= set(
        registry.module("linear").build(cases.Case("linear", "", ((8, 8),), 2, 4, variant="y"), SETTING).providers
    )
    for op in ("step", "solve"):
        for case in registry.module(op).cases(scale):
            names |= set(registry.module(op).build(replace(case, pairs=((8, 8),), r=2), SETTING).providers)
    wanted = {"PEFT", "addmm_", "ours", "frozen linear", "torch, loop", goals.CUBLAS}
    assert wanted | {"torch's fused AdamW alone", "torch's fused AdamW", "PEFT's Riemannian"} <= names


def test_nothing_measured_is_no_verdict():
    assert {row.verdict for row in goals.verdicts({}, stages.SECTIONS)} == {"not measured"}


@pytest.mark.parametrize(
    "figures, verdict",
    [([True, True], "met"), ([True, False], "missed"), ([True, None], "not measured"), ([], "not measured")],
)
def test_checks_are_met_only_if_all_are_right(figures, verdict):
    (row,) = goals.verdicts({"repeats": {str(i): {"ok": ok} for i, ok in enumerate(figures)}}, ["repeats"])
    assert row.verdict == verdict


def test_the_picture_shows_what_was_measured(tmp_path):
    results = made_up()
    results["whole"][goals.WHOLE]["ours"]["rounds"] = 10
    drawn = {panel.title: panel for panel in plot.panels(results)}
    assert drawn[goals.WHOLE].bars == {"ours": 14_100.0}
    assert drawn["layers: 4096→14336, r=16, 8192 tokens, bfloat16"].bars == {
        "PEFT": 12.0,
        "ours": 10.0,
        "frozen linear": 10.0,
    }
    assert plot.draw(results, tmp_path / "a.png").startswith("picture") and (tmp_path / "a.png").stat().st_size > 10_000
    assert "nothing" in plot.draw({}, tmp_path / "b.png")


# ---- README


def test_readme_shows_the_newest_results():
    text = (ROOT / "README.md").read_text()
    assert readme_table.with_table(text, BENCH / "results") == text, "run python bench/readme_table.py"
    if not readme_table.newest(BENCH / "results"):
        assert "Not verified on a GPU" in text


def a_result(folder: Path, stage: int, date: str, device: str, sections: dict) -> Path:
    figures = gpu_section.Figures(folder / f"stage{stage}.jsonl")
    where = {"device": device, "driver": "1", "torch": "2", "triton": "3", "date": date}
    figures.add("conditions", "machine", where)
    for section, of in sections.items():
        for name, values in of.items():
            figures.add(section, name, values)
    return figures.path


def test_results_come_into_the_table(tmp_path):
    """Taken from a run's folder; of each stage the newest, whatever it was measured on."""
    results = tmp_path / "results"
    assert "Not verified on a GPU" in readme_table.table(results)
    whole = {"whole": made_up()["whole"]}
    for stage, date, device, sections in (
        (1, "2030-01-01", "NVIDIA H100 80GB HBM3", {"repeats": {"a": {"ok": False}}}),
        (1, "2030-01-03", "NVIDIA H100 80GB HBM3", {"repeats": {"a": {"ok": True}}}),
        (2, "2030-01-02", "NVIDIA H200", whole),
    ):
        folder = tmp_path / f"{stage}-{date}"
        folder.mkdir()
        (a_result(folder, stage, date, device, sections).with_suffix(".png")).write_bytes(b"picture")
        readme_table.take(folder, results)
    names = {path.name for path in results.iterdir()}
    assert "nvidia-h100-80gb-hbm3-2030-01-03-stage1.jsonl" in names and "nvidia-h200-2030-01-02-stage2.png" in names
    shown = readme_table.table(results)
    assert "| 100 repeats, the same bits | all | 1 of 1 | met |" in shown
    assert (
        "| a training step of Llama-3-8B (public anchor 12,473) | ≥ 14000 tokens/s | 14,100 tokens/s | met |" in shown
    )
    assert "NVIDIA H100 80GB HBM3" in shown and "NVIDIA H200" in shown and "2030-01-01" not in shown


def test_a_damaged_line_costs_itself_alone(tmp_path):
    """A process may be ended while it writes."""
    figures = gpu_section.Figures(tmp_path / "figures.jsonl")
    figures.add("a", "first", {"ok": True})
    with figures.path.open("ab") as file:
        file.write(b'{"section": "a", "fig\xff')
    figures.add("a", "second", {"ok": True})
    with figures.path.open("a") as file:
        file.write('12\n{"a": 1}\n')
    assert list(figures.read()["a"]) == ["first", "second"] and list(figures.seconds()) == ["a"]


@pytest.mark.parametrize("text, said", [("", "conditions lack"), ("12\n", "conditions lack")])
def test_a_file_that_is_no_result_is_named(tmp_path, text, said):
    (tmp_path / "stage1.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=said):
        readme_table.take(tmp_path, tmp_path / "results")
    a_result(tmp_path, 1, "2030-01-01", "cpu", {})
    with pytest.raises(SystemExit, match="no GPU"):
        readme_table.take(tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no stage1\.jsonl"):
        readme_table.take(tmp_path, tmp_path / "results")
