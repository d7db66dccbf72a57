"""bench/gpu.py: failures in a section, time budgets, the portable cache, goals and verdicts, README's GPU table."""

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
from collecting import collected_here

from gpu_sections import compile_cache, counters, goals, memcheck, native_tests, plot, section, stages, timings
from lora_fast.measure.ceilings import Cost
from suite import cases, comparison, registry

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
SETTING = comparison.Setting(torch.device("cpu"), triton=False)

# What runs sections in processes needs nothing of these, and importing them takes seconds a process.
LIGHT = f"""
import os, signal, sys, time
from pathlib import Path
from unittest.mock import MagicMock
sys.path.insert(0, {str(BENCH)!r})
measure = ("lora_fast", "lora_fast.measure", "lora_fast.measure.ceilings", "lora_fast.measure.clock")
sys.modules.update(dict.fromkeys(("torch", "gpu_sections.compile_cache", *measure), MagicMock()))
"""

# ---- Failures

PROGRAM = f"""{LIGHT}
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
        outcomes = {{}}
        for name, run in (("dies", die), ("raises", fail), ("works", lambda: None)):
            try:
                options.surviving(name, provider(run))()
                outcomes[name] = "measured"
            except Unavailable as reason:
                outcomes[name] = str(reason)
        return outcomes

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

def at(name):
    return sys.argv[sys.argv.index(name) + 1]

known = {{"jobs": (jobs, 60, 1), "slow": (slow, 60, 60), "long": (long, 1, 60), "broken": (broken, 60, 60),
          "shared": (shared, 60, 60)}}
sections = {{name: Section(*known[name], 1) for name in given}}
share = tuple(map(int, at("--share").split("/")))
progress, figures = Progress.of(Path(at("--progress"))), Figures(Path(at("--figures")))
sys.exit(not work(sections, Options("device", torch.device("cpu"), figures, progress, share=share)))
"""


@pytest.fixture
def in_processes(monkeypatch, tmp_path):
    """Returns a function that runs sections of PROGRAM within some seconds and returns their figures."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(section, "PROGRAM", tmp_path / "program.py")

    def run(names, seconds, share=(0, 1)):
        figures = section.Figures(tmp_path / "figures.jsonl")
        asyncio.run(section.in_processes(names, share, "device", seconds, figures, tmp_path))
        return figures.read()

    return run


def test_a_failing_job_does_not_stop_the_others(in_processes):
    """Some jobs raise, hang or kill their process, and so do some providers; the next section still runs."""
    sections = in_processes(["jobs", "broken", "shared"], 120)
    figures = sections["jobs"]
    assert list(figures) == ["first", "raises", "raises again", "hangs", "dies", "compared", "last"]
    assert figures["first"] == figures["last"] == {"ok": True}
    assert figures["raises"] == figures["raises again"] == {"ok": False, "error": "RuntimeError: out of luck"}
    assert figures["hangs"] == {"ok": False, "error": "took too long"}
    assert figures["dies"] == {"ok": False, "error": "killed by SIGKILL"}
    lost = {"dies": "killed by SIGKILL", "raises": "RuntimeError: out of luck"}
    assert figures["compared"] == lost | {"works": "measured"}
    assert sections["broken"] == {"its jobs": {"ok": False, "error": "RuntimeError: out of luck"}}
    assert list(sections["shared"]) == list("01234")


def test_processes_share_the_jobs_of_a_section(in_processes):
    in_processes(["shared"], 60, (0, 2))
    assert list(in_processes(["shared"], 60, (1, 2))["shared"]) == ["0", "2", "4", "1", "3"]


def test_a_lane_out_of_time_keeps_its_figures(in_processes):
    figures = in_processes(["slow"], 6)["slow"]
    assert figures == {"first": {"ok": True}, "slow": {"ok": None, "error": "out of time: ended after 6 s"}}


def test_a_section_out_of_time_names_the_jobs_not_begun(in_processes):
    sections = in_processes(["long", "shared"], 60)
    assert sections["long"] == {
        "first": {"ok": True},
        "not begun": {"ok": None, "error": "not begun: the 1 s were over"},
    }
    assert list(sections["shared"]) == list("01234")


def test_a_process_that_cannot_start_is_not_retried_forever(in_processes, tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text("raise SystemExit(3)")
    assert in_processes(["jobs"], 60) == {"jobs": {"its process": {"ok": False, "error": "ended with exit status 3"}}}


def test_describe_includes_the_cause_of_an_error():
    try:
        try:
            raise ValueError("no such kernel")
        finally:
            raise RuntimeError("capture failed")
    except RuntimeError as error:
        assert section.describe(error) == "RuntimeError: capture failed, after ValueError: no such kernel"


def test_a_lost_device_ends_the_process(monkeypatch, tmp_path):
    """After an illegal memory access every call raises: the provider is left out, and the next process continues."""

    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(section, "wait", lost)
    progress = section.Progress(tmp_path / "progress.json", running=("layers", "4096→4096"))
    figures = section.Figures(tmp_path / "figures.jsonl")
    options = section.Options("device", SETTING.device, figures, progress)
    with pytest.raises(SystemExit):
        options.surviving("ours", lambda: comparison.Provider(lambda: None))()
    saved = section.Progress.of(tmp_path / "progress.json")
    assert "illegal" in saved.lost["layers: 4096→4096"]["ours"] and not saved.running and not figures.read()


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
def test_memcheck_verdict_of_an_output(output, status, complete, ok):
    assert memcheck.verdict(output, status, checked=True, complete=complete)["ok"] is ok


def test_memcheck_verdict_without_the_tool_is_unknown_or_wrong():
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
def test_outcome_of_a_pytest_output(output, status, expected):
    outcome = native_tests.outcome(output, status)
    assert (outcome["ok"], outcome.get("passed", 0), outcome["failures"]) == expected


def test_native_tests_collect_every_file_marked_gpu():
    """A second ``pytestmark`` would replace the first one, and the file would not run."""
    files = {path for path in native_tests.TESTS.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    marked = sorted(str(path.relative_to(ROOT)) for path in files - {Path(__file__).resolve()})
    collected = {node.partition("::")[0] for node in collected_here(marked, *native_tests.SELECTION)}
    assert len(marked) > 10 and sorted(collected) == marked


def test_parse_reads_ncus_counters():
    lines = ['"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for launch, (kernel, microseconds) in enumerate([("lora_a(long)", "1,500"), ("lora_b", "90"), ("lora_a", "2,500")]):
        unit = "ns" if kernel == "lora_b" else "us"
        lines.append(f'"{launch}","{kernel}","gpu__time_duration.sum","{unit}","{microseconds}"')
        lines.append(f'"{launch}","{kernel}","sm__warps_active.avg.pct_of_peak_sustained_active","%","n/a"')
        lines.append(f'"{launch}","{kernel}","launch__registers_per_thread","register/thread","{64 + launch}"')
    kernels = counters.parse("==PROF== noise\n" + "\n".join(lines))
    assert kernels == [
        {"kernel": "lora_a", "µs": 2500.0, "registers": 66.0},
        {"kernel": "lora_b", "µs": 0.09, "registers": 65.0},
    ]
    assert counters.parse("==ERROR== no counters") == []


def run_gpu(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment)


def test_dry_run_of_some_sections(tmp_path):
    """All sections in full: python bench/gpu.py --dry-run --stage 1, --stage 2."""
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
        ([], "expected either a stage"),
        (["--stage", "1", "--only", "layers"], "expected either a stage"),
        (["--stage", "1", "--out", "there"], "no CUDA device"),
        (["--stage", "1", "--out", __file__], "expected a folder without results"),
        (["--stage", "1", "--out", "there", "--cache", "nothing.tar.xz"], "no such file"),
        (["--only", "nothing"], "expected some of errors, graphs"),
        (["--dry", "--stage", "1"], "unrecognized"),
    ],
)
def test_gpu_refuses_wrong_arguments(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_gpu_needs_only_torch_and_triton():
    """A GPU machine may have no other packages."""
    extras = ("typer", "rich", "matplotlib", "jinja2", "peft", "transformers", "pytest", "pytest_benchmark", "psutil")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import gpu; print(len(gpu.SECTIONS))"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True)
    assert done.stdout.strip() == str(len(gpu.SECTIONS)), done.stderr


# ---- Budgets


@pytest.mark.parametrize("number, seconds", [(1, 210), (2, 400)])
def test_budgets_and_estimates_fit_in_the_stage(number, seconds):
    """A lane fits in its phase, the phases fit in the stage, and each estimate fits in the section's budget."""
    stage = stages.STAGES[number]
    assert stage.seconds == seconds
    assert stage.compile + sum(phase.seconds for phase in stage.phases) + stages.END <= seconds
    sketch = section.Options("device", SETTING.device, section.Figures(Path(os.devnull)), section.Progress())
    for phase in stage.phases:
        for lane in phase.lanes:
            sections = [stages.SECTIONS[name] for name in lane]
            with gpu.tiles.assume(arch=90):
                estimates = [stages.estimate(name, len(stages.SECTIONS[name].jobs(sketch))) for name in lane]
            assert stages.START + sum(estimates) <= phase.seconds
            assert all(e <= s.seconds for e, s in zip(estimates, sections, strict=True))
            assert stages.START + sum(member.seconds for member in sections) <= phase.seconds
            assert all(member.each <= member.seconds for member in sections)


def test_timed_sections_run_alone():
    for stage in (*stages.STAGES.values(), stages.stage_of(list(stages.SECTIONS))):
        assert len(stage.phases[1].lanes) == 1
        assert sum(stages.SECTIONS[name].processes for name in stage.phases[1].lanes[0]) == len(
            stage.phases[1].lanes[0]
        )


def test_every_section_is_in_a_stage():
    staged = {name for stage in stages.STAGES.values() for name in stage.sections}
    assert staged == set(stages.SECTIONS)
    assert set(stages.stage_of(["layers", "grid", "suite"]).sections) == {"layers", "grid", "suite"}
    assert {goal.section for goal in goals._goals()} | set(goals.CHECKS) <= staged


def test_report_is_short_however_much_fails():
    """The table stays complete, and some failures of each section are listed."""
    failing = {f"figure {i}": {"ok": False, "error": "x" * 1000} for i in range(200)}
    unknown = {f"figure {i}": {"ok": None, "error": "y" * 1000} for i in range(200)}
    late = {"training": {"one": {"ok": False, "error": "killed by SIGKILL"}}}
    text = gpu.report({"errors": failing, "graphs": unknown} | late, list(stages.SECTIONS), {})
    assert len(text) <= gpu.MOST_PRINTED and "not measured" in text and "failures: 201" in text
    assert "training: one: killed by SIGKILL" in text and "errors: and 196 more" in text and "not known: 200" in text


@pytest.mark.parametrize("number", stages.STAGES)
def test_plan_adds_up(number):
    """The estimate of a phase is that of its longest lane; the total contains all phases."""
    stage = stages.STAGES[number]
    text = gpu.plan(f"stage{number}", stage)
    assert "none of them measured" in text
    for name in stage.sections:
        assert any(line.startswith(name) for line in text.splitlines())
    columns = re.findall(r"(\d+) s +(\d+) s", text)
    section_rows = len(stage.sections)
    phases = [
        pair for pair, line in zip(columns, re.findall(r".*\d+ s +\d+ s.*", text), strict=True) if "longest" in line
    ]
    assert len(columns) == section_rows + len(phases) + 3  # compile, end, in all
    for column, tolerance in ((0, 3), (1, 0)):  # estimates are rounded
        first, *_, end, total = (int(pair[column]) for pair in columns)
        assert abs(total - first - end - sum(int(pair[column]) for pair in phases)) <= tolerance


# ---- A whole stage


STAND_IN = f"""{LIGHT}
from gpu_sections.section import Figures, Progress

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


def test_a_stage_runs_from_start_to_end(monkeypatch, tmp_path, capfd):
    """It compiles, checks, times and reports, with a stand-in for the work of its processes."""
    (tmp_path / "program.py").write_text(STAND_IN)
    monkeypatch.setattr(section, "PROGRAM", tmp_path / "program.py")
    for name in compile_cache.environment(tmp_path):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it afterwards
    out = tmp_path / "out"
    run = gpu.Run("stage1", stages.STAGES[1], out)
    run.on_device([])
    assert run.right is False  # graphs are wrong
    figures = section.Figures(out / "stage1.jsonl").read()
    n = gpu.COMPILERS * len(run.stage.sections)
    counts = {"hits": 2 * n, "misses": n, "failures": [], "carried": 0, "of another Triton": 0}
    assert figures["compile"]["kernels"] == {"ok": True} | counts
    assert figures["conditions"]["machine"]["device"] == "cpu" and len(figures["errors"]) == 3
    assert figures["compile"]["new kernels"] == {"packed": len(run.stage.sections), "no room": 0}
    assert {path.name for path in out.iterdir()} == {"stage1.jsonl", "stage1.txt", "stage1-cache.tar.xz"}
    printed, report = capfd.readouterr().out, (out / "stage1.txt").read_text()
    assert report in printed and "failures: 1\ngraphs: figure 0" in report and "errors: 3 figures" in report
    with tarfile.open(out / "stage1-cache.tar.xz") as tar:
        assert set(tar.getnames()) == {f"kernel-{name}/kernel.cubin" for name in run.stage.sections}


# ---- The checks detect wrong results


def test_errors_detect_a_wrong_layer(monkeypatch, tmp_path):
    from gpu_sections import errors

    options = section.Options("interpreter", SETTING.device, section.Figures(tmp_path / "a.jsonl"), section.Progress())
    case = 33, 40, 24, 3, None, torch.float32, 0.1, options
    assert errors.judge(*case)["ok"]
    right = errors.lf.functional.lora_linear
    for wrong in (
        lambda x, weight, bias, a, b, scaling, dropout, seed: right(
            x, weight, bias, a, b, 1.02 * scaling, dropout, seed
        ),
        lambda x, weight, bias, a, b, scaling, dropout, seed: right(x, weight, bias, a, b, scaling, dropout, seed + 1),
        lambda x, weight, bias, a, b, *others: right(x, weight, bias, a.bfloat16().float(), b, *others),
    ):
        monkeypatch.setattr(errors.lf.functional, "lora_linear", wrong)
        assert not errors.judge(*case)["ok"]


def test_families_detect_a_wrong_result():
    from gpu_sections import families

    right = torch.ones(8, 8)

    def judged(got):
        family = lambda elements, d, r, device: ({"x": got}, {"x": right})
        return families.judged(family, 64, 8, 8, SETTING.device)["ok"]

    assert (
        judged(right) and not judged(right * 1.01) and not judged(right.bfloat16() * 1.03) and judged(right.bfloat16())
    )
    assert not judged(torch.full((8, 8), float("nan")))


def test_relative_error_of_a_nan_is_infinite():
    assert comparison.relative_error(torch.tensor([float("nan"), 1.0]), torch.ones(2, dtype=torch.float64)) == float(
        "inf"
    )


def test_timings_detect_a_wrong_or_failing_provider(tmp_path):
    """Timed results are checked, too."""
    figures = section.Figures(tmp_path / "figures.jsonl")
    options = section.Options("interpreter", SETTING.device, figures, section.Progress(running=("a", "b")))

    def exact():
        return {"x": torch.ones(3, dtype=torch.float64)}

    def provider(value):
        return lambda: comparison.Provider(lambda: None, results=lambda _: {"x": torch.full((3,), value)})

    case = cases.Case("linear", "", ((8, 8),), 2, 4, "bfloat16", variant="y")
    costs = {"forward": Cost(1, 1)}
    for value, ok in ((1.0, None), (1.1, False), (float("nan"), False)):
        compared = comparison.Comparison({"torch": provider(2.0), "ours": provider(value)}, costs, exact)
        assert timings.measured(case, compared, options, 0.0).get("ok") is ok

    def fails():
        raise RuntimeError("out of luck")

    for lost, ok in (("ours, gluon", False), ("PEFT", None)):
        compared = comparison.Comparison({"torch": provider(2.0), "ours": provider(1.0), lost: fails}, costs, exact)
        values = timings.measured(case, compared, options, 0.0)
        assert values["ok"] is ok and "out of luck" in values["error"] and len(values["rows"]) == 3


def test_repeats_count_differing_calls():
    from gpu_sections import repeats

    results = iter([torch.zeros(3)] * 3 + [torch.tensor([0.0, 0.0, 1e-7])] + [torch.zeros(3)] * 2)
    assert repeats.differing(lambda: [next(results)], 5) == {"ok": False, "runs": 5, "differing": 1}


# ---- The portable cache


def a_cache(folder: Path, names: str) -> Path:
    """Writes a cache like Triton's, with the leftovers of a process that was killed."""
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


def test_a_packed_cache_unpacks_in_another_place(tmp_path):
    cache, archive = a_cache(tmp_path / "here", "abc"), tmp_path / "cache.tar.xz"
    names = compile_cache.entries(cache)
    assert names == {f"{k}/{file}" for k in "abc" for file in (f"{k}.cubin", f"{k}.json", f"__grp__{k}.json")}
    assert compile_cache.pack(cache, names, archive, most=1) == []
    assert compile_cache.unpack(archive, tmp_path / "there") == (2, 1), "another Triton compiled one of them"
    assert compile_cache.entries(tmp_path / "there") == names
    group = json.loads((tmp_path / "there" / "a" / "__grp__a.json").read_text())["child_paths"]
    assert group["a.cubin"] == str(tmp_path / "there" / "a" / "a.cubin")
    assert (tmp_path / "there/a/a.cubin").read_bytes() == (cache / "a/a.cubin").read_bytes()


def test_an_archive_keeps_to_its_limit(tmp_path):
    """It contains all files of a kernel or none."""
    cache, archive = a_cache(tmp_path / "here", "abcdefgh"), tmp_path / "cache.tar.xz"
    left = compile_cache.pack(cache, compile_cache.entries(cache), archive, most=9000 / compile_cache.MEBIBYTE)
    assert archive.stat().st_size <= 9000 and 0 < len(left) < 24 and len(left) % 3 == 0
    assert sum(compile_cache.unpack(archive, tmp_path / "there")) == 8 - len(left) // 3


def test_keys_do_not_depend_on_earlier_compilations(tmp_path):
    """Triton before 3.9 would make them depend on these."""
    code = """if 1:
        import sys; sys.path.insert(0, {!r})
        from gpu_sections import compile_cache; compile_cache.use()
        from lora_fast.kernels.linear.gemm import lora_linear_kernel
        from lora_fast.kernels.linear.grads import lora_grad_a_kernel
        from lora_fast.kernels.linear.project import lora_project_kernel
        kernels = [lora_linear_kernel, lora_project_kernel, lora_grad_a_kernel]
        keys = {{kernel.__name__: kernel.cache_key for kernel in kernels[::{}]}}
        print(sorted(keys.items()))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= compile_cache.environment(tmp_path)

    def keys(step):
        return subprocess.check_output([sys.executable, "-c", code.format(str(BENCH), step)], env=environment)

    assert keys(1) == keys(-1)


def test_an_unpacked_cache_has_every_kernel(tmp_path):
    """Nothing is compiled the second time, because the keys are portable."""
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
        counts.append(gpu.compiled(section.Figures(tmp_path / f"{name}.jsonl")))
    assert counts[0]["misses"] > 0 == counts[1]["misses"] and counts[1]["hits"] == counts[0]["misses"]


# ---- Goals


# figure → goal, measured, verdict of the example results below
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
    "host time of a layer for one token without gradients, ours / PEFT": ("≤ 1", "1.25", "missed"),
    "LoRAAdamW(ILoRA) / torch's fused AdamW, 224 pairs, r=16": ("≤ 1.3", "1.25", "met"),
    "PEFT's Riemannian / LoRAAdamW(PiLoRA), 224 pairs, r=16": ("≥ 20", "19", "missed"),
    "host time, LoRAAdamW(AdamW) / torch's fused AdamW, moving gradients": ("≤ 0.5", "1.25", "missed"),
    "host time, LoRAAdamW(ILoRA) / torch's fused AdamW, moving gradients": ("≤ 0.8", "1.25", "missed"),
    "host time, LoRAAdamW(PiLoRA) / torch's fused AdamW, moving gradients": ("≤ 1", "1.25", "missed"),
    "224 Cayley inverses, r=16, one launch": ("≤ 20 µs", "10 µs", "met"),
    "torch.linalg.inv in a loop / those 224 inverses": ("≥ 100", "99", "missed"),
    "NB-LoRA training step / LoRA's": ("≤ 1.02", "1.02", "met"),
    "ScaLoRA (every 10 steps) training step / LoRA's": ("≤ 1.03", "–", "not measured"),
    "PEFT / ours, the least over all ranks and numbers of tokens": ("≥ 1", "0.9", "missed"),
    "a training step of Llama-3-8B (public anchor 12,473)": ("≥ 14000 tokens/s", "14,100 tokens/s", "met"),
    "that step's peak memory / PEFT's": ("≤ 0.8", "0.75", "met"),
}


def example_results() -> dict:
    """Returns invented results under the names that the sections use."""
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
        timings.ONE_TOKEN.name: rows("forward", {"PEFT": 8.0, "ours": 10.0}),
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


def test_every_goal_has_a_row_and_a_verdict():
    """A failed provider, a failed figure and a section that was cut short are "not measured"."""
    rows = [row for row in goals.verdicts(example_results(), stages.SECTIONS) if row.goal != "all"]
    verdicts = {row.figure: row[1:] for row in rows if not (row.verdict == "not measured" and "GEMM" in row.figure)}
    assert verdicts == EXPECTED


def test_an_incomplete_grid_is_not_measured():
    """The least over a part of the grid proves nothing."""
    least = lambda results: next(row for row in goals.verdicts(results, ["grid"]) if "the least" in row.figure)
    results = example_results()
    del results["grid"]["3"]
    assert least(results).verdict == "not measured"
    results["grid"]["3"] = rows("full", {"ours": None, "PEFT": 9.0})
    assert least(results).verdict == "not measured"


def test_a_time_that_includes_the_host_is_marked():
    """A figure with another provider's exposed time is marked; with ours exposed it is "not measured"."""
    inverses = lambda results: goals.verdicts(results, ["inverses"])[1]
    results = example_results()
    (figure,) = [values for name, values in results["inverses"].items() if "inverse" in name]
    for row in figure["rows"]:
        row["exposed"] = row["provider"] == "torch, loop"
    assert inverses(results).measured == "99 (with the host's)"
    for row in figure["rows"]:
        row["exposed"] = row["provider"] == "ours"
    assert inverses(results).verdict == "not measured"


def test_each_stage_has_its_own_goals():
    first, second = (goals.verdicts(example_results(), stages.STAGES[number].sections) for number in (1, 2))
    assert not {row.figure for row in first} & {row.figure for row in second}
    assert {row.figure for row in (*first, *second)} == {
        row.figure for row in goals.verdicts(example_results(), stages.SECTIONS)
    }


def test_providers_of_the_goals_exist_in_the_suite():
    """A renamed provider would be "not measured" forever."""
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


def test_verdicts_of_no_results_are_not_measured():
    assert {row.verdict for row in goals.verdicts({}, stages.SECTIONS)} == {"not measured"}


@pytest.mark.parametrize(
    "figures, verdict",
    [([True, True], "met"), ([True, False], "missed"), ([True, None], "not measured"), ([], "not measured")],
)
def test_checks_are_met_only_if_all_figures_are_ok(figures, verdict):
    (row,) = goals.verdicts({"repeats": {str(i): {"ok": ok} for i, ok in enumerate(figures)}}, ["repeats"])
    assert row.verdict == verdict


def test_picture_shows_the_measured_figures(tmp_path):
    results = example_results()
    results["whole"][goals.WHOLE]["ours"]["rounds"] = 10
    drawn = {panel.title: panel for panel in plot.panels(results)}
    assert drawn[goals.WHOLE].bars == {"ours": 14_100.0}
    assert drawn["layers: 4096→14336, r=16, 8192 tokens, bfloat16"].bars == {
        "PEFT": 12.0,
        "ours": 10.0,
        "frozen linear": 10.0,
    }
    assert plot.draw(results, tmp_path / "a.png").startswith("picture") and (tmp_path / "a.png").stat().st_size > 10_000
    assert plot.draw({}, tmp_path / "b.png").startswith("no picture")


# ---- README


def test_readme_table_is_that_of_the_newest_results():
    text = (ROOT / "README.md").read_text()
    assert readme_table.with_table(text, BENCH / "results") == text, "run python bench/readme_table.py"
    if not readme_table.newest(BENCH / "results"):
        assert "Not verified on a GPU" in text


def a_result(folder: Path, stage: int, date: str, device: str, sections: dict) -> Path:
    figures = section.Figures(folder / f"stage{stage}.jsonl")
    machine = {"device": device, "driver": "1", "torch": "2", "triton": "3", "date": date}
    figures.add("conditions", "machine", machine)
    for name, members in sections.items():
        for figure, values in members.items():
            figures.add(name, figure, values)
    return figures.path


def test_table_contains_the_newest_results_of_each_stage(tmp_path):
    """They are copied from a run's folder; the device makes no difference."""
    results = tmp_path / "results"
    assert "Not verified on a GPU" in readme_table.table(results)
    whole = {"whole": example_results()["whole"]}
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
    assert "| 100 repeats give the same bits | all | 1 of 1 | met |" in shown
    assert (
        "| a training step of Llama-3-8B (public anchor 12,473) | ≥ 14000 tokens/s | 14,100 tokens/s | met |" in shown
    )
    assert "NVIDIA H100 80GB HBM3" in shown and "NVIDIA H200" in shown and "2030-01-01" not in shown


def test_figures_skip_a_damaged_line(tmp_path):
    """A process may be killed while it writes."""
    figures = section.Figures(tmp_path / "figures.jsonl")
    figures.add("a", "first", {"ok": True})
    with figures.path.open("ab") as file:
        file.write(b'{"section": "a", "fig\xff')
    figures.add("a", "second", {"ok": True})
    with figures.path.open("a") as file:
        file.write('12\n{"a": 1}\n')
    assert list(figures.read()["a"]) == ["first", "second"] and list(figures.seconds()) == ["a"]


@pytest.mark.parametrize("text", ["", "12\n"], ids=["empty", "no figure"])
def test_take_refuses_a_file_without_gpu_results(tmp_path, text):
    (tmp_path / "stage1.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="conditions lack"):
        readme_table.take(tmp_path, tmp_path / "results")
    a_result(tmp_path, 1, "2030-01-01", "cpu", {})
    with pytest.raises(SystemExit, match="expected figures of a GPU"):
        readme_table.take(tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_take_refuses_a_folder_without_results(tmp_path):
    with pytest.raises(SystemExit, match=r"expected stage1\.jsonl"):
        readme_table.take(tmp_path, tmp_path / "results")
