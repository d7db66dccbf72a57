"""Nsight Compute's counters of our kernels, where it is installed."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys

from gpu_section import PROGRAM, Jobs, Options

# column of the figure → Nsight Compute's metric
METRICS = {
    "µs": "gpu__time_duration.sum",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "SM %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor cores %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
}


def counters(options: Options) -> Jobs:
    """Nsight Compute's counters of every kernel of a layer, a step and the inverses."""
    return [] if options.mode == "stub" else [("ncu", lambda: count(options))]


def count(options: Options) -> dict:
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if options.mode != "device" or not tool:
        return {"ok": None, "error": "ncu is not installed" if not tool else "not in a dry run"}
    command = [tool, "--csv", "--kernel-name", "regex:lora_.*", "--clock-control", "none", "--launch-count", "60"]
    command += ["--metrics", ",".join(METRICS.values()), sys.executable, str(PROGRAM), "--work", "counted"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds - 5)
    except subprocess.TimeoutExpired:
        return {"ok": None, "error": "out of time"}
    kernels = parse(done.stdout)
    return {"ok": True, "kernels": kernels} if kernels else {"ok": None, "error": (done.stdout + done.stderr)[-500:]}


def parse(output: str) -> list[dict]:
    """A dict for each kernel, its name and ``METRICS``, of the largest launch where there are several."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names, launches = {metric: name for name, metric in METRICS.items()}, {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row["Metric Name"] in names:
            value = float(row["Metric Value"].replace(",", ""))
            if row["Metric Unit"] in ("ns", "nsecond"):
                value /= 1e3
            launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("(")[0]})
            launch[names[row["Metric Name"]]] = value
    largest = {}
    for launch in launches.values():
        before = largest.get(launch["kernel"], launch)
        largest[launch["kernel"]] = max(before, launch, key=lambda of: of.get("µs", 0))
    return list(largest.values())


def counted(options: Options) -> Jobs:
    """What ncu watches: a layer with dropout, a step of PiLoRA, the inverses; each once."""
    from gpu_timings import MODEL, N_TOKENS, RANK, SHAPES
    from measure import Setting, once
    from shapes import MODELS, Case
    from suite import module

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
