"""Runs compute-sanitizer's memcheck, where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_sections.families import families
from gpu_sections.section import PROGRAM, Figures, Jobs, Options

MARGIN = 14  # seconds for the start and the end of the process that waits for the checker
# Child processes such as ptxas are not checked. API errors are not reported: torch's start-up queries cause some.
TOOL = ("--tool", "memcheck", "--target-processes", "application-only", "--report-api-errors", "no")


def memcheck(options: Options) -> Jobs:
    """Runs every kernel family under compute-sanitizer's memcheck, or without it if it is not installed."""
    return families(options) if options.mode == "stub" else [("compute-sanitizer", lambda: check(options))]


def check(options: Options) -> dict:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if options.mode != "device":
        tool = None
    # without torch's cache each tensor is an allocation of its own, so an access one byte beyond its end is detected
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        figures, output = Figures(Path(folder) / "figures.jsonl"), Path(folder) / "output"
        command = [sys.executable, str(PROGRAM), "--work", "families", "--mode", options.mode]
        command += ["--figures", str(figures.path)]
        with output.open("w") as file:
            try:
                status = subprocess.run(
                    [tool, *TOOL, *command] if tool else command,
                    stdout=file, stderr=subprocess.STDOUT, timeout=options.seconds - MARGIN, env=environment,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                status = None
        right = [values.get("ok") is True for values in figures.read().get("families", {}).values()]
        complete = len(right) == len(families(options)) and all(right)
        return verdict(output.read_text(errors="replace"), status, bool(tool), complete)


def verdict(output: str, status: int | None, checked: bool, complete: bool) -> dict:
    """Evaluates the output of compute-sanitizer and its program.

    Args:
        status: the exit status; None if it ran out of time.
        complete: whether every family has run and was right.
    """
    summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
    refused = "Device not supported" in output or (checked and status is not None and not summary)
    errors = int(summary[1]) if checked and summary and not refused else None
    by = "compute-sanitizer" if errors is not None else "it refused" if checked else "not installed"
    by = "out of time" if status is None else by
    wrong = bool(errors) or (status not in (0, None) and not refused)
    ok = False if wrong else True if errors == 0 and complete else None
    figures = {"checked by": by, "memory errors": errors, "every family right": complete, "exit status": status}
    reason = {} if ok is not None else {"error": by if complete else f"{by}, and not every family has run"}
    return {"ok": ok, **reason, **figures, "tail": output[-1500:]}
