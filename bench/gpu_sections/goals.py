"""The goals for a GPU, and for each a function that reads it from the figures of bench/gpu.py (section → figure →
values)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection
from typing import NamedTuple

from gpu_sections.timings import ONE_TOKEN, RANKS, TOKENS
from suite.ops.bench_linear import BACKWARD, CUBLAS, FORWARD
from suite.ops.bench_step import MOVING

TRAINING = "Llama-3-8B, 4 blocks, r=16, 4096 tokens, bfloat16"
WHOLE = "Llama-3-8B, 32 blocks, r=16, 2×4096 tokens, bfloat16 autocast"
ANCHOR = 12_473  # tokens a second of a public LoRA fine-tuning of Llama-3-8B on one H100, sequence 4,096, micro-batch 2
SIGNS = {"≥": operator.ge, "≤": operator.le}


class Verdict(NamedTuple):
    """A row of the table of goals, in words. ``verdict``: "met", "missed" or "not measured"."""

    figure: str
    goal: str
    measured: str
    verdict: str


class WithHost(float):
    """A ratio that includes the host's time."""


class Goal(NamedTuple):
    """A limit on a figure. ``read`` returns the figure from the results and raises KeyError if it was not measured."""

    section: str
    figure: str
    sign: str
    limit: float
    read: Callable[[dict], float]
    unit: str = ""


def _row(results: dict, section: str, name: str, provider: str, mode: str) -> dict:
    for row in results[section][name].get("rows", ()):
        if (row["provider"], row["mode"]) == (provider, mode) and row["p50"] is not None:
            return row
    raise KeyError(provider)


def _over(
    section: str, name: str, top: str, bottom: str, mode: str = "forward", of_host: bool = False, bottom_name: str = ""
) -> Callable[[dict], float]:
    """Returns a reader of one provider's median time over another's, on the device or (``of_host``) on the host.

    ``bottom_name`` is the other provider's figure, if it is a different one. Where ours waited for the host, the reader
    raises KeyError; where another provider did, it returns ``WithHost``.
    """

    def read(results: dict) -> float:
        rows = [_row(results, section, *key, mode) for key in ((name, top), (bottom_name or name, bottom))]
        ours_exposed = any(row["exposed"] for row in rows if row["provider"].startswith("ours"))
        if ours_exposed or (of_host and any(row["host"] is None or row["exposed"] for row in rows)):
            raise KeyError("the host waited for the device")
        over = (rows[0]["host"][1] / rows[1]["host"][1]) if of_host else rows[0]["p50"] / rows[1]["p50"]
        return WithHost(over) if any(row["exposed"] for row in rows) else over

    return read


def _layer(d_out: int, dropout: float) -> str:
    return f"4096→{d_out}, r=16, 8192 tokens, {'dropout 0.1, ' if dropout else ''}bfloat16"


def _gemm(d_out: int, variant: str) -> str:
    return f"4096→{d_out}, r=16, {variant}, 8192 tokens, bfloat16"


def _step(method: str) -> str:
    return f"step: Llama-3-8B, 224 pairs, r=16, {method}, bfloat16"


def _least_over_peft(results: dict) -> float:
    """Returns the least of PEFT's time over ours in the grid, which must be complete."""
    if len(results["grid"]) < len(RANKS) * len(TOKENS):
        raise KeyError("some of the grid")
    return min(_over("grid", name, "PEFT", "ours", "full")(results) for name in results["grid"])


def _over_lora(method: str, results: dict) -> float:
    """Returns the median of a method's time over LoRA's in a training step of four blocks."""
    return results["training"][TRAINING][method]["over LoRA"][1]


def _goals() -> list[Goal]:
    goals = []
    for d_out in (4096, 14336):
        for strategy, limit in (("fused", 1.05), ("gluon", 1.01)):
            for variant in (FORWARD, BACKWARD):
                name = _gemm(d_out, variant)
                read = _over("gemm", name, f"ours, {strategy}", CUBLAS)
                goals.append(Goal("gemm", f"our GEMM, {strategy} / cuBLAS alone, {name}", "≤", limit, read))
    for d_out, eager in ((4096, 1.3), (14336, 1.25)):
        for dropout, limit in ((0.0, eager), (0.1, 1.5)):
            name = _layer(d_out, dropout)
            peft = _over("layers", name, "PEFT", "ours", "full")
            goals.append(Goal("layers", f"PEFT / ours, {name}", "≥", limit, peft))
        name = _layer(d_out, 0.0)
        goals += [
            Goal("layers", f"addmm_ / ours, {name}", "≥", 1.15, _over("layers", name, "addmm_", "ours", "full")),
            Goal("layers", f"ours / frozen linear, {name}", "≤", 1.12,
                 _over("layers", name, "ours", "frozen linear", "full")),
        ]  # fmt: skip
    name = _layer(4096, 0.0)
    goals.append(Goal("layers", "host time of a layer, ours / PEFT", "≤", 0.75,
                      _over("layers", name, "ours", "PEFT", "full", of_host=True)))  # fmt: skip
    goals.append(Goal("layers", "host time of a layer for one token without gradients, ours / PEFT", "≤", 1.0,
                      _over("layers", ONE_TOKEN.name, "ours", "PEFT", of_host=True)))  # fmt: skip
    ilora = _over("steps", _step("ILoRA"), "ours", "torch's fused AdamW alone")
    pilora = _over("steps", _step("PiLoRA"), "PEFT's Riemannian", "ours")
    goals += [
        Goal("steps", "LoRAAdamW(ILoRA) / torch's fused AdamW, 224 pairs, r=16", "≤", 1.3, ilora),
        Goal("steps", "PEFT's Riemannian / LoRAAdamW(PiLoRA), 224 pairs, r=16", "≥", 20, pilora),
    ]
    for method, limit in (("AdamW", 0.5), ("ILoRA", 0.8), ("PiLoRA", 1.0)):
        what = f"host time, LoRAAdamW({method}) / torch's fused AdamW, moving gradients"
        names = {"name": _step(method + MOVING), "bottom_name": _step("AdamW" + MOVING)}
        read = _over("steps", top="ours", bottom="torch's fused AdamW", of_host=True, **names)
        goals.append(Goal("steps", what, "≤", limit, read))
    inverses = "solve: Llama-3-8B, 224 pairs, r=16, inverse, float32"
    alone = lambda results: _row(results, "inverses", inverses, "ours", "forward")["p50"]
    loop = _over("inverses", inverses, "torch, loop", "ours")
    goals += [
        Goal("inverses", "224 Cayley inverses, r=16, one launch", "≤", 20, alone, " µs"),
        Goal("inverses", "torch.linalg.inv in a loop / those 224 inverses", "≥", 100, loop),
    ]
    for name, limit in (("NB-LoRA", 1.02), ("ScaLoRA", 1.03)):
        every = " (every 10 steps)" if name == "ScaLoRA" else ""
        figure = f"{name}{every} training step / LoRA's"
        goals.append(Goal("training", figure, "≤", limit, functools.partial(_over_lora, name)))

    def speed(results: dict) -> float:
        return results["whole"][WHOLE]["ours"]["tokens a second"]

    def memory(results: dict) -> float:
        ours, peft = (results["whole"][WHOLE][name]["peak GiB"] for name in ("ours", "PEFT"))
        return ours / peft

    goals += [
        Goal("grid", "PEFT / ours, the least over all ranks and numbers of tokens", "≥", 1.0, _least_over_peft),
        Goal("whole", f"a training step of Llama-3-8B (public anchor {ANCHOR:,})", "≥", 14_000, speed, " tokens/s"),
        Goal("whole", "that step's peak memory / PEFT's", "≤", 0.8, memory),
    ]
    return goals


CHECKS = {
    "errors": "every op launches and meets the error budget",
    "graphs": "replay of a captured CUDA graph equals the eager call",
    "repeats": "100 repeats give the same bits",
    "suite": "kernel and layer tests pass natively",
    "memcheck": "no memory error under compute-sanitizer",
    "large": "kernel families are right beyond 2³¹ elements",
}


def verdicts(results: dict, sections: Collection[str]) -> list[Verdict]:
    """Returns the verdicts of some sections: first the checks, which are met if every figure is ok, then the goals."""
    rows = []
    for section in (name for name in CHECKS if name in sections):
        figures = results.get(section, {})
        passed = sum(figure.get("ok") is True for figure in figures.values())
        failed = sum(figure.get("ok") is False for figure in figures.values())
        verdict = "missed" if failed else "met" if figures and passed == len(figures) else "not measured"
        measured = f"{passed} of {len(figures)}" if figures else "–"
        rows.append(Verdict(CHECKS[section], "all", measured, verdict))
    for goal in _goals():
        if goal.section not in sections:
            continue
        text = f"{goal.sign} {goal.limit:g}{goal.unit}"
        try:
            value = goal.read(results)
        except KeyError:
            rows.append(Verdict(goal.figure, text, "–", "not measured"))
            continue
        verdict = "met" if SIGNS[goal.sign](value, goal.limit) else "missed"
        digits = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        note = " (with the host's)" if isinstance(value, WithHost) else ""
        rows.append(Verdict(goal.figure, text, f"{digits}{goal.unit}{note}", verdict))
    return rows
