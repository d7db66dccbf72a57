"""The test suite, run natively."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from gpu_section import Jobs, Options

TESTS = Path(__file__).resolve().parents[1] / "tests"
COMPILED = "test_compiled.py"  # for every arch: more than there is time for, and no need of a GPU
MOST = 8  # processes on one GPU: each takes more than half a gigabyte of it for itself


def suite(options: Options) -> Jobs:
    """The whole test suite natively, a process for each file, several at a time; compiled for this device alone."""
    if importlib.util.find_spec("pytest") is None:
        yield "pytest", lambda: {"ok": None, "error": "pytest is not installed here: the suite has not run"}
        return
    end = time.monotonic() + options.seconds
    chosen = {"test_traffic.py": ("test_traffic.py", "masked")} if options.dry_run else whole()
    with ThreadPoolExecutor(max(1, min(MOST, (os.cpu_count() or 2) // 2))) as pool:
        left = {name: of for name, of in chosen.items() if name not in options.progress.figures}
        waiting = {pool.submit(tests_of, *of, end): name for name, of in left.items()}
        for done in as_completed(waiting):
            yield waiting[done], done.result


def whole() -> dict[str, tuple[str, str]]:
    """Name → file and which of its tests (pytest's -k); what takes longest comes first."""
    major, minor = torch.cuda.get_device_capability()
    shares = [f"{share} and sm_{major}{minor}" for share in ("thin", "gemm", "rest")] + ["launches_every"]
    chosen = {f"{COMPILED}: {share}": (COMPILED, share) for share in shares}
    files = sorted(TESTS.glob("test_*.py"), key=lambda path: path.stat().st_size, reverse=True)
    return chosen | {path.name: (path.name, "") for path in files if path.name != COMPILED}


def tests_of(file: str, chosen: str, end: float) -> dict:
    """One file's outcome; ``end``: time.monotonic() at which there is no more time."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", file]
    command += ["-k", chosen] if chosen else []
    left = end - time.monotonic()
    if left <= 0:
        return {"ok": None, "error": "not begun: out of time"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, cwd=TESTS)
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode(errors="replace")
        failed = re.search(r"^[.sxX]*[FE]", output, re.MULTILINE)
        return {"ok": False if failed else None, "error": "out of time", "tail": output[-300:]}
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", done.stdout)}
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    tail = "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]
    # 5: nothing collected, a file that says it has nothing to do on a GPU
    return {"ok": done.returncode in (0, 5), **counts, "failures": failures[:20], "tail": tail}
