"""compute-sanitizer's memcheck, where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from gpu_families import families
from gpu_section import PROGRAM, Jobs, Options

# ptxas and the like are left alone; what torch's own start asks of the driver in vain is no memory error
TOOL = ("--tool", "memcheck", "--target-processes", "application-only", "--report-api-errors", "no")


def memcheck(options: Options) -> Jobs:
    """compute-sanitizer's memcheck over every kernel family; without it, they run alone."""
    return families(options) if options.mode == "stub" else [("compute-sanitizer", lambda: check(options))]


def check(options: Options) -> dict:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    command = [sys.executable, str(PROGRAM), "--work", "families", "--mode", options.mode]
    if options.mode != "device":
        tool = None
    # each tensor an allocation of its own, so that a byte beyond its end is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [tool, *TOOL, *command] if tool else command,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=options.seconds,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        tail = (late.stdout or b"").decode(errors="replace")[-1500:]
        return {"ok": None, "error": "out of time", "tail": tail}
    return verdict(done.stdout, done.returncode, bool(tool))


def verdict(output: str, status: int, checked: bool) -> dict:
    """Of what compute-sanitizer and the program under it have printed, and its exit status."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
    refused = "Device not supported" in output or (checked and not summary)
    errors = int(summary[1]) if checked and summary and not refused else None
    by = "compute-sanitizer" if errors is not None else "it refused" if checked else "not installed"
    wrong = bool(errors) or (status != 0 and not refused)
    ok = False if wrong else True if errors == 0 else None
    return {"ok": ok, "checked by": by, "memory errors": errors, "exit status": status, "tail": output[-1500:]}
