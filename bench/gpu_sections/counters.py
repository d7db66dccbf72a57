"""Reads Nsight Compute's counters of our kernels, where it is installed."""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_sections.section import PROGRAM, Jobs, Options

MARGIN = 5  # seconds for the end of the process that waits for ncu
# column of the figure → Nsight Compute's metric
METRICS = {
    "µs": "gpu__time_duration.sum",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "SM %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}


def counters(options: Options) -> Jobs:
    """Reads Nsight Compute's counters of every kernel of a layer, a step and the inverses."""
    return [] if options.mode == "stub" else [("ncu", lambda: count(options))]


def count(options: Options) -> dict:
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if options.mode != "device" or not tool:
        return {"ok": None, "error": "ncu is not installed" if not tool else "not in a dry run"}
    command = [tool, "--csv", "--kernel-name", "regex:lora_.*", "--clock-control", "none", "--launch-count", "60"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"  # ncu writes line by line, so a log that is cut off is still of use
        command += ["--log-file", str(log), "--metrics", ",".join(METRICS.values())]
        command += [sys.executable, str(PROGRAM), "--work", "counted"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=subprocess.DEVNULL, timeout=options.seconds - MARGIN)
        output = log.read_text(errors="replace") if log.exists() else ""
    kernels = parse(output)
    return {"ok": True, "kernels": kernels} if kernels else {"ok": None, "error": output[-500:] or "ncu wrote nothing"}


def parse(output: str) -> list[dict]:
    """Returns a dict for each kernel with its name and ``METRICS``, from the longest of its launches."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names = {metric: name for name, metric in METRICS.items()}
    launches: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row["Metric Name"] in names:
            try:
                value = float(row["Metric Value"].replace(",", "")) * MICROSECONDS.get(row["Metric Unit"], 1)
            except (ValueError, AttributeError):  # "n/a", or an incomplete line
                continue
            launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("(")[0]})
            launch[names[row["Metric Name"]]] = value
    largest: dict[str, dict] = {}
    for launch in launches.values():
        before = largest.get(launch["kernel"], launch)
        largest[launch["kernel"]] = max(before, launch, key=lambda metrics: metrics.get("µs", 0))
    return list(largest.values())


def counted(options: Options) -> Jobs:
    """Runs once what ncu profiles: a layer with dropout, a step of PiLoRA, the inverses."""
    from gpu_sections.timings import MODEL, N_TOKENS, RANK, SHAPES
    from suite.cases import MODELS, Case
    from suite.comparison import Setting, once
    from suite.registry import module

    setting, pairs = Setting(options.device, triton=True), MODELS[MODEL].pairs
    cases = [
        Case("layer", MODEL, (SHAPES[0],), RANK, N_TOKENS, "bfloat16", 0.1),
        Case("step", MODEL, pairs, RANK, variant="PiLoRA"),
        Case("solve", MODEL, pairs, RANK, variant="inverse"),
    ]

    def run() -> dict:
        for case in cases:
            for name, build in module(case.op).build(case, setting).providers.items():
                if name.startswith("ours"):
                    once(build())
        return {}

    return [("layer, step, inverses", run)]
