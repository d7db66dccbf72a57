"""Bytes and launches of our kernels, counted exactly by Triton's interpreter.

    python bench/suite/counting.py SECONDS < cases.json > counts.json

A process of its own: TRITON_INTERPRET must be set before triton is imported, and the suite's timings on a CPU are of
the torch twins. Tiles and strategy ("fused") are those of sm_90. Launches do not depend on sizes; traffic is counted at
``TOKENS`` tokens, ``PAIRS`` pairs and ``SIDE`` columns at most, where factors that are read again weigh more than in a
real layer (bench/counts.py counts one).
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
    """What is counted in its place."""
    pairs = tuple((min(d_in, SIDE), min(d_out, SIDE)) for d_in, d_out in case.pairs[:PAIRS])
    return replace(case, label="", n_tokens=min(case.n_tokens, TOKENS), pairs=pairs)


def count(case: Case) -> dict:
    """One run of ours, forward and backward, the steady state of an optimizer: {"traffic": bytes asked for over the
    least possible, "launches"}; {} for a method that runs no kernel of ours."""
    comparison = module(case.op).build(case, Setting(torch.device("cpu"), triton=True))
    ours = "ours, fused" if "ours, fused" in comparison.providers else "ours"
    with tiles.assume(arch=90):
        provider: Provider = comparison.providers[ours]()
        if case.op == "step":
            once(provider)  # builds tables and state
        with interpreter.traffic() as counted:
            once(provider)
    if not counted.launches:
        return {}
    least = comparison.work.get("full", comparison.work["forward"]).bytes
    return {"traffic": counted.total / least, "launches": len(counted.launches)}


def in_own_process(cases: list[Case], seconds: float) -> dict[Case, dict]:
    """What ``count`` gives for each case; after that many seconds no other is begun."""
    wanted = list(dict.fromkeys(small(case) for case in cases))
    command = [sys.executable, "-m", "suite.counting", str(seconds)]
    given = json.dumps([asdict(case) for case in wanted])
    done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"bench/suite/counting.py failed:\n{done.stderr[-3000:]}")
    found = dict(zip(wanted, json.loads(done.stdout), strict=False))
    return {case: found.get(small(case), {}) for case in cases}


def main() -> None:
    end = time.monotonic() + float(sys.argv[1])
    found = []
    for given in json.load(sys.stdin):
        if time.monotonic() > end:
            break
        found.append(count(from_dict(given)))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
