"""The test suite, run natively."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from gpu_section import Jobs, Options

TESTS = Path(__file__).resolve().parents[1] / "tests"
MOST = 8  # processes on one GPU: each takes more than half a gigabyte of it for itself


def suite(options: Options) -> Jobs:
    """The whole test suite natively, a process for each file, several at a time."""
    if importlib.util.find_spec("pytest") is None:
        yield "pytest", lambda: {"ok": None, "error": "pytest is not installed here: the suite has not run"}
        return
    end = time.monotonic() + options.seconds - 5
    files = [TESTS / "test_traffic.py"] if options.dry_run else sorted(TESTS.glob("test_*.py"), key=_size, reverse=True)
    files = [path for path in files if path.name not in options.progress.figures]
    with ThreadPoolExecutor(max(1, min(MOST, (os.cpu_count() or 2) // 2))) as pool:
        waiting = {pool.submit(tests_of, path, end, options.dry_run): path.name for path in files}
        for done in as_completed(waiting):
            yield waiting[done], functools.partial(done.result)


def _size(path: Path) -> int:
    return path.stat().st_size


def tests_of(path: Path, end: float, dry_run: bool) -> dict:
    """One file's outcome; ``end``: time.monotonic() at which there is no more time."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(path)]
    command += ["-k", "masked"] if dry_run else []
    left = end - time.monotonic()
    if left <= 0:
        return {"ok": None, "error": "not begun: out of time"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, cwd=path.parent)
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode(errors="replace")
        failed = re.search(r"^[.sxX]*[FE]", output, re.MULTILINE)
        return {"ok": False if failed else None, "error": "out of time", "tail": output[-300:]}
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", done.stdout)}
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    tail = "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]
    # 5: nothing collected, a file that says it has nothing to do on a GPU
    return {"ok": done.returncode in (0, 5), **counts, "failures": failures[:20], "tail": tail}
