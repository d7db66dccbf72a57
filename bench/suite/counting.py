"""Counts bytes and launches of our kernels exactly, in Triton's interpreter.

    cd bench; python -m suite.counting SECONDS < cases.json > counts.json

It runs in a process of its own, because TRITON_INTERPRET must be set before triton is imported, while the suite's
timings on a CPU are those of the torch twins. Tiles and strategy ("fused") are those of sm_90. Launches do not depend
on sizes. Traffic is counted at ``TOKENS`` tokens, ``PAIRS`` pairs and ``SIDE`` columns at most, where factors that are
read again weigh more than in a real layer, which bench/counts.py counts.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lora_fast.kernels import tiles
from lora_fast.kernels.inspection import interpreter
from suite.cases import Case, from_dict
from suite.comparison import Provider, Setting, once
from suite.registry import module

TOKENS, PAIRS, SIDE = 64, 2, 128


def small(case: Case) -> Case:
    """Returns the smaller case that is counted in place of a case."""
    pairs = tuple((min(d_in, SIDE), min(d_out, SIDE)) for d_in, d_out in case.pairs[:PAIRS])
    return replace(case, label="", n_tokens=min(case.n_tokens, TOKENS), pairs=pairs)


def count(case: Case) -> dict:
    """Counts one run of ours, forward and backward; for an optimizer a step after the first.

    Returns:
        {"traffic": bytes requested over the least possible, "launches"}; {} for a method that runs none of our kernels.
    """
    comparison = module(case.op).build(case, Setting(torch.device("cpu"), triton=True))
    ours = "ours, fused" if "ours, fused" in comparison.providers else "ours"
    with tiles.assume(arch=90):
        provider: Provider = comparison.providers[ours]()
        if case.op == "step":
            once(provider)  # builds pointer tables and state
        with interpreter.traffic() as counted:
            once(provider)
    if not counted.launches:
        return {}
    least = comparison.costs.get("full", comparison.costs["forward"]).bytes
    return {"traffic": counted.total / least, "launches": len(counted.launches)}


def in_own_process(cases: list[Case], seconds: float) -> dict[Case, dict]:
    """Returns ``count`` of each case, or {} for cases that were not reached within some seconds."""
    wanted = list(dict.fromkeys(small(case) for case in cases))
    command = [sys.executable, "-m", "suite.counting", str(seconds)]
    text = json.dumps([asdict(case) for case in wanted])
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"bench/suite/counting.py failed:\n{done.stderr[-3000:]}")
    counts = dict(zip(wanted, json.loads(done.stdout), strict=False))  # fewer counts than cases if time ran out
    return {case: counts.get(small(case), {}) for case in cases}


def main() -> None:
    end = time.monotonic() + float(sys.argv[1])
    counts = []
    for values in json.load(sys.stdin):
        if time.monotonic() > end:
            break
        counts.append(count(from_dict(values)))
    json.dump(counts, sys.stdout)


if __name__ == "__main__":
    main()
