"""The tests of kernels and layers, run natively over many processes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from gpu_section import Jobs, Options

TESTS = Path(__file__).resolve().parents[1] / "tests"
PROCESSES = 14  # each takes more than half a gigabyte of a GPU's memory for itself
WORDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
OUTCOME = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({WORDS}) (\S+::.*)$|^(\S+::.*?) ({WORDS})")  # with xdist, without


def suite(options: Options) -> Jobs:
    """Kernel and layer tests (pytest -m gpu) natively, 14 processes at a time."""
    return [] if options.mode == "stub" else [("pytest -m gpu", lambda: run(options))]


def run(options: Options) -> dict:
    """What they come to, also where they run out of time."""
    if importlib.util.find_spec("pytest") is None:
        return {"ok": None, "error": "pytest is not installed here: the tests have not run"}
    options_of_pytest = "-o addopts= -v -p no:cacheprovider -p gpu_cache -W ignore".split()
    command = [sys.executable, "-m", "pytest", *options_of_pytest, "-m", "gpu and not budget"]
    spread = importlib.util.find_spec("xdist") is not None
    if spread and options.mode != "interpreter":
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    command += ["test_solve_kernels.py", "-k", "inverse"] if options.mode == "interpreter" else []
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    late = False
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TESTS,
            timeout=options.seconds - 10, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        late, output, status = True, (error.stdout or b"").decode(errors="replace"), None
    return outcome(output, status, late)


def outcome(output: str, status: int | None, late: bool) -> dict:
    """Of pytest's lines, one a test; ``late``: it was ended."""
    results = [(m[1] or m[4], m[2] or m[3]) for m in map(OUTCOME.match, output.splitlines()) if m]
    counts = Counter(word.lower() for word, _ in results)
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)  # of the summary, with reasons
    failures = failures or [name.strip() for word, name in results if word in ("FAILED", "ERROR")]
    if late:
        return {"ok": False if failures else None, "error": "out of time", **counts, "failures": failures[:30]}
    ok, tail = status == 0 and counts["passed"] > 0, "" if status == 0 else output[-1500:]
    return {"ok": ok, **counts, "failures": failures[:30], "tail": tail}
