"""Runs the tests of kernels and layers natively, over many processes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from gpu_sections import compile_cache
from gpu_sections.section import Jobs, Options

TESTS = Path(__file__).resolve().parents[2] / "tests"
MARGIN = 14  # seconds for the start and the end of the process that waits for pytest
LONGEST = 1 << 20  # characters of the output that are kept
PROCESSES = 14  # each takes more than half a gigabyte of a GPU's memory
# Which tests run. addopts is reset, so the import mode must be given again: files in different folders share names.
SELECTION = ("-o", "addopts=", "--import-mode=importlib", "-m", "gpu and not budget")
WORDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
OUTCOME = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({WORDS}) (\S+::.*)$|^(\S+::.*?) ({WORDS})")  # with xdist, without


def suite(options: Options) -> Jobs:
    """Runs the kernel and layer tests (pytest -m gpu) natively, in 14 processes."""
    return [] if options.mode == "stub" else [("pytest -m gpu", lambda: run(options))]


def run(options: Options) -> dict:
    """Runs pytest. When the time is over, the results so far count."""
    if importlib.util.find_spec("pytest") is None:
        return {"ok": None, "error": "pytest is not installed here: the tests have not run"}
    verbose = ["-v", "--tb=short", "-W", "ignore"]
    plugins = ["-p", "no:cacheprovider", "-p", "gpu_sections.compile_cache"]
    command = [sys.executable, "-m", "pytest", *SELECTION, *verbose, *plugins]
    if importlib.util.find_spec("xdist") and options.mode != "interpreter":
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    command += ["kernels/test_linalg.py", "-k", "inverse"] if options.mode == "interpreter" else []
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "40"]  # seconds, for a kernel that hangs
    output = options.figures.path.with_name("suite.log")  # remains if this process is killed
    with output.open("w") as file:
        try:
            status = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=TESTS,
                timeout=options.seconds - MARGIN, env=compile_cache.test_environment(),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = None
    text = output.read_text(errors="replace")
    output.write_text(text[-LONGEST:])
    return outcome(text, status)


def outcome(output: str, status: int | None) -> dict:
    """Evaluates pytest's output, a line for each test, and its exit status (None if it ran out of time)."""
    results = [(m[1] or m[4], m[2] or m[3]) for m in map(OUTCOME.match, output.splitlines()) if m]
    counts = Counter(word.lower() for word, _ in results)
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)  # from the summary, with reasons
    failures = failures or [name.strip() for word, name in results if word in ("FAILED", "ERROR")]
    if status is None:
        return {"ok": False if failures else None, "error": "out of time", **counts, "failures": failures[:30]}
    if status == 0 and counts["passed"]:
        return {"ok": True, **counts, "failures": []}
    error = "; ".join(failures[:3]) or "no test ran"
    return {"ok": False, "error": error, **counts, "failures": failures[:30], "tail": output[-1500:]}
