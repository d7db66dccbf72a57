"""The goals for a GPU, and how each is read from the results of bench/gpu.py."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

TRAINING = "Llama-3-8B, 4 blocks, r=16, 4096 tokens, bfloat16"
SIGNS = {"≥": operator.ge, "≤": operator.le}


class Verdict(NamedTuple):
    """``measured`` and ``verdict`` are words: "met", "missed" or "not measured"."""

    figure: str
    goal: str
    measured: str
    verdict: str


class Goal(NamedTuple):
    """``read``: the figure from the results; KeyError where it was not measured."""

    figure: str
    sign: str
    limit: float
    read: Callable[[dict], float]
    unit: str = ""


def _median(results: dict, section: str, name: str, provider: str, mode: str) -> float:
    for row in results[section]["figures"][name]["rows"]:
        if (row["provider"], row["mode"]) == (provider, mode) and row["p50"] is not None:
            return row["p50"]
    raise KeyError(provider)


def _over(section: str, name: str, top: str, bottom: str, mode: str) -> Callable[[dict], float]:
    """Median time of one provider over another's."""
    return lambda results: _median(results, section, name, top, mode) / _median(results, section, name, bottom, mode)


def _layer(d_out: int, dropout: float) -> str:
    return f"4096→{d_out}, r=16, 8192 tokens, {'dropout 0.1, ' if dropout else ''}bfloat16"


def _step(method: str) -> str:
    return f"step: Llama-3-8B, 224 pairs, r=16, {method}, bfloat16"


def _goals() -> list[Goal]:
    goals = []
    for d_out, eager, dropped in ((4096, 1.3, 1.5), (14336, 1.25, 1.5)):
        for dropout, limit in ((0.0, eager), (0.1, dropped)):
            name = _layer(d_out, dropout)
            goals.append(Goal(f"PEFT / ours, {name}", "≥", limit, _over("layers", name, "PEFT", "ours", "full")))
        name = _layer(d_out, 0.0)
        goals.append(Goal(f"addmm_ / ours, {name}", "≥", 1.15, _over("layers", name, "addmm_", "ours", "full")))
        over_frozen = _over("layers", name, "ours", "frozen linear", "full")
        goals.append(Goal(f"ours / frozen linear, {name}", "≤", 1.12, over_frozen))
    ilora = _over("steps", _step("ILoRA"), "ours", "torch's fused AdamW alone", "forward")
    pilora = _over("steps", _step("PiLoRA"), "PEFT's Riemannian", "ours", "forward")
    inverses = "solve: Llama-3-8B, 224 pairs, r=16, inverse, float32"
    alone = lambda found: _median(found, "small", inverses, "ours", "forward")
    loop = _over("small", inverses, "torch, loop", "ours", "forward")
    goals += [
        Goal("LoRAAdamW(ILoRA) / torch's fused AdamW, 224 pairs, r=16", "≤", 1.3, ilora),
        Goal("PEFT's Riemannian / LoRAAdamW(PiLoRA), 224 pairs, r=16", "≥", 20, pilora),
        Goal("224 Cayley inverses, r=16, one launch", "≤", 20, alone, " µs"),
        Goal("the same with torch.linalg.inv in a loop / ours", "≥", 100, loop),
    ]
    for name, limit in (("NB-LoRA", 1.02), ("ScaLoRA", 1.03)):
        read = lambda found, name=name: found["training"]["figures"][TRAINING][name]["over LoRA"][1]
        every = " (every 10 steps)" if name == "ScaLoRA" else ""
        goals.append(Goal(f"{name}{every} training step / LoRA's", "≤", limit, read))
    return goals


def verdicts(results: dict) -> list[Verdict]:
    """Goal by goal, then each section of checks: met where every figure is as it should be."""
    found = []
    for goal in _goals():
        text = f"{goal.sign} {goal.limit:g}{goal.unit}"
        try:
            value = goal.read(results)
        except KeyError:
            found.append(Verdict(goal.figure, text, "–", "not measured"))
            continue
        verdict = "met" if SIGNS[goal.sign](value, goal.limit) else "missed"
        found.append(Verdict(goal.figure, text, f"{value:.3g}{goal.unit}", verdict))
    for section, what in CHECKS.items():
        figures = results.get(section, {}).get("figures", {})
        passed = sum(figure.get("ok") is True for figure in figures.values())
        failed = [name for name, figure in figures.items() if figure.get("ok") is False]
        measured = f"{passed} of {len(figures)}" + (f"; not: {', '.join(failed)}" if failed else "")
        complete = bool(figures) and passed == len(figures) and not results[section].get("error")
        verdict = "met" if complete else "missed" if failed else "not measured"
        found.append(Verdict(what, "all", measured if figures else "–", verdict))
    return found


CHECKS = {
    "errors": "bfloat16 errors within the budget",
    "repeats": "1,000 repeats, the same bits",
    "graphs": "captured in a CUDA graph, replay equals eager",
    "large": "kernel families right beyond 2³¹ elements",
    "memcheck": "no memory error under compute-sanitizer",
    "suite": "test files green, run natively",
}
