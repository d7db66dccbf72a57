"""Times training steps of SmolLM2-135M on the King James text, two models in turns.

    python bench/train_step.py                      # PEFT over the same PEFT model fused, dropout 0 and 0.05
    python bench/train_step.py --pairs 20 --rank 8
    python bench/train_step.py --compare nb-lora    # NB-LoRA over plain LoRA, about two minutes on a CPU
    python bench/train_step.py --compare groups     # fused layers alone over layers in groups
    python bench/train_step.py --compare compiled   # as the first, both under torch.compile, which takes minutes
    python bench/train_step.py --compare dora       # DoRA over LoRA: PEFT's layers, and fused ones
    python bench/train_step.py --quantize nf4       # PEFT's QLoRA over the same model fused

A step is forward, backward and AdamW on 2 × 256 tokens, in float32 on a CPU and in bfloat16 on a GPU. The models of a
comparison share the frozen weights and alternate (AB, BA, AB, …), so that drift of the machine affects both alike; the
figure is the median of the ratios. The four models of ``--compare dora`` alternate, too. The first round is not
counted: it finds the groups. NB-LoRA's paper reports 1.07 to
1.25 over LoRA. With ``--quantize`` bitsandbytes has quantised the linear layers, in 4 bits with double quantisation and
the model's dtype as compute dtype.
"""

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from bases import FORMATS, quantize_
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lora_fast as lf
from lora_fast.cli.inputs import data, models
from lora_fast.measure.clock import Spread, turns, wall_seconds

S, T = TypeVar("S"), TypeVar("T")

FUSED_GOALS = {0.0: 1.08, 0.05: 1.05}  # dropout → PEFT's time over ours, at least, on 2 CPU cores
COMPILED_GOALS = {0.0: 1.10, 0.05: 1.25}  # the same, both under torch.compile
QUANTIZED_GOAL = 1.05  # PEFT's QLoRA over ours, at least
NB_LORA_GOALS = {"cpu": 1.05, "cuda": 1.02}  # NB-LoRA's time over LoRA's, at most
DORA_GOALS = {0.0: 1.10}  # dropout → DoRA's time over LoRA's, both fused, at most
DORA_RATIOS = (("PEFT DoRA", "PEFT LoRA"), ("fused DoRA", "fused LoRA"), ("PEFT DoRA", "fused DoRA"))

_PLAIN = lambda model: model
_PEFT = {"PEFT": None, "fused": True}
COMPARISONS: dict[str, tuple[dict[str, bool | None], Callable, dict[float, float]]] = {  # engines, wrapper, goals
    "fused": (_PEFT, _PLAIN, FUSED_GOALS),
    "groups": ({"alone": False, "groups": True}, _PLAIN, {}),
    "compiled": (_PEFT, torch.compile, COMPILED_GOALS),
}


@dataclass(frozen=True)
class Side:
    """A model of a comparison."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def base_model(device: torch.device, quantize: str | None = None) -> nn.Module:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = models.load_model(models.cached(models.PACKAGED, ""), dtype).to(device).train()
    return quantize_(model, quantize, dtype) if quantize else model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def peft_model(base: nn.Module, rank: int, dropout: float, **options) -> nn.Module:
    """Returns PEFT's model of ``base``; ``options``: further ones of ``peft.LoraConfig``."""
    import peft

    options = {"lora_dropout": dropout, "target_modules": "all-linear"} | options
    return peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, **options)).train()


def copies(model: nn.Module, engines: dict[str, bool | None]) -> dict[str, nn.Module]:
    """Returns a copy of PEFT's model for each engine, over the same frozen weights. An engine is None for PEFT's own
    forward, else whether fused layers make groups."""
    frozen, models_of = {id(p): p for p in model.parameters() if not p.requires_grad}, {}
    for name, group in engines.items():
        models_of[name] = copy.deepcopy(model, dict(frozen))
        if group is not None:
            lf.fuse_(models_of[name], group=group)
    return models_of


def peft_sides(model: nn.Module, engines: dict[str, bool | None], wrap: Callable) -> dict[str, Side]:
    """Returns a side for each engine of ``copies``. The pair that is not counted finds the groups, and compiles."""
    sides = copies(model, engines)
    return {name: Side(wrap(side), torch.optim.AdamW(trained(side), lr=1e-4)) for name, side in sides.items()}


def dora_sides(rank: int, dropout: float, base: nn.Module) -> dict[str, Side]:
    """Returns LoRA and DoRA over the frozen weights of ``base``, each by PEFT's own layers and fused."""
    frozen = {id(p): p for p in base.requires_grad_(False).parameters()}
    sides: dict[str, Side] = {}
    for name, use_dora in (("LoRA", False), ("DoRA", True)):
        model = peft_model(copy.deepcopy(base, dict(frozen)), rank, dropout, use_dora=use_dora)
        sides |= {f"{engine} {name}": side for engine, side in peft_sides(model, _PEFT, _PLAIN).items()}
    return sides


def nb_lora_sides(rank: int, device: torch.device) -> dict[str, Side]:
    """Returns NB-LoRA and plain LoRA over the same frozen weights."""
    plain = base_model(device)
    bounded = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
    lf.inject_(plain, lf.LoRAConfig(r=rank, alpha=rank))
    lf.inject_(bounded, lf.NBLoRAConfig(r=rank))
    adamw = lambda model: torch.optim.AdamW(trained(model), lr=1e-4, fused=True)
    return {"NB-LoRA": Side(bounded, adamw(bounded)), "LoRA": Side(plain, adamw(plain))}


def blocks(seq_len: int, device: torch.device) -> Tensor:
    """Returns the text as (n, seq_len) token ids."""
    tokenizer = models.load_tokenizer(models.cached(models.PACKAGED, ""))
    path = data.locate(data.PACKAGED)
    return data.blocks(data.documents(path, data.read(path), tokenizer), tokenizer, seq_len).train.ids.to(device)


def batches(ids: Tensor, batch: int) -> Iterator[Tensor]:
    """Yields (batch, seq_len) parts of the text without end."""
    while True:
        for first in range(0, len(ids) - batch, batch):
            yield ids[first : first + batch]


def step_seconds(side: Side, ids: Tensor) -> float:
    """Returns the wall time of one training step."""

    def step():
        side.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        side.optimizer.step()
        side.optimizer.zero_grad()

    return wall_seconds(step, ids.device)


def in_turns(
    sides: dict[str, S], feed: Iterator[Tensor], rounds: int, description: str, measured: Callable[[S, Tensor], T]
) -> dict[str, list[T]]:
    """Returns what ``measured`` returns of each side, round by round, after a round that is not counted. All sides of a
    round take the same tokens."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    schedule = turns(list(sides), rounds, warm_up=1)
    current = None
    for turn, name in track(schedule, description=description, total=len(sides) * (rounds + 1)):
        if turn != current:
            current, ids = turn, next(feed)
        result = measured(sides[name], ids)
        if turn >= 0:
            results[name].append(result)
    return results


def compare(sides: dict[str, Side], feed: Iterator[Tensor], pairs: int, description: str) -> dict:
    """Returns the seconds a step of both sides, and the first over the second pair by pair."""
    return between(in_turns(sides, feed, pairs, description, step_seconds), *sides)


def between(seconds: dict[str, list[float]], first: str, second: str) -> dict:
    """Returns the seconds a step of two sides, and the first over the second round by round."""
    both = {name: seconds[name] for name in (first, second)}
    return {"seconds": both, "ratios": quotients(*both.values())}


def quotients(first: list[float], second: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(first, second, strict=True)]


def shown_spread(ratio: Spread) -> str:
    return f"{ratio.median:.3f} ({ratio.p20:.3f}–{ratio.p80:.3f})"


def where(device: torch.device) -> str:
    """Returns the device and the version of torch, in words."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name() if device.type == 'cuda' else cpu}, torch {torch.__version__}"


def row(result: dict, label: str, sign: str, goal: float | None) -> list[str]:
    """Returns the cells of a comparison: label, seconds of both sides, ratio, goal and verdict."""
    ratio = Spread.of(result["ratios"])
    medians = [f"{statistics.median(values):.3f}" for values in result["seconds"].values()]
    figures = shown_spread(ratio)
    if goal is None:
        return [label, *medians, figures, "", ""]
    met = ratio.median >= goal if sign == "≥" else ratio.median <= goal
    return [label, *medians, figures, f"{sign} {goal}", "met" if met else "missed"]


def comparisons(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[dict, list[str]]]:
    """Yields the figures of each comparison, and its row of the table."""
    ids = blocks(options.seq_len, device)
    for name, (engines, wrap, goals) in COMPARISONS.items():
        for dropout in options.dropout if name in options.compare else ():
            label = f"{' / '.join(engines)}{', compiled' if name == 'compiled' else ''}, dropout {dropout:g}"
            torch.compiler.reset()
            model = peft_model(base_model(device, options.quantize), options.rank, dropout)
            result = compare(peft_sides(model, engines, wrap), batches(ids, options.batch), options.pairs, label)
            goal = QUANTIZED_GOAL if options.quantize and name == "fused" else goals.get(dropout)
            yield {"comparison": name, "dropout": dropout, **result}, row(result, label, "≥", goal)
    for dropout in options.dropout if "dora" in options.compare else ():
        sides = dora_sides(options.rank, dropout, base_model(device, options.quantize))
        seconds = in_turns(sides, batches(ids, options.batch), options.pairs, "DoRA and LoRA", step_seconds)
        for names in DORA_RATIOS:
            result, label = between(seconds, *names), f"{' / '.join(names)}, dropout {dropout:g}"
            goal = DORA_GOALS.get(dropout) if names == ("fused DoRA", "fused LoRA") else None
            yield {"comparison": "dora", "dropout": dropout, **result}, row(result, label, "≤", goal)
    if "nb-lora" in options.compare:
        label, sides = "NB-LoRA / LoRA", nb_lora_sides(options.rank, device)
        result = compare(sides, batches(ids, options.batch), options.pairs, label)
        yield {"comparison": "nb-lora", **result}, row(result, label, "≤", NB_LORA_GOALS[device.type])


def show(title: str, conditions: str, compared: Iterator[tuple[dict, list[str]]], path: Path | None) -> None:
    """Prints the table of some comparisons, and writes their figures to a file if there is a path."""
    table, results = Table(title=title), []
    for column in ("A / B", "A s/step", "B s/step", "A / B (p20–p80)", "goal", "verdict"):
        table.add_column(column, justify="right")
    for result, cells in compared:
        results.append(result)
        table.add_row(*cells)
    Console().print(table)
    if path:
        path.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = (*COMPARISONS, "dora", "nb-lora")
    parser.add_argument("--compare", nargs="+", choices=choices, default=["fused"], help="comparisons to run")
    parser.add_argument("--pairs", type=int, default=12, help="counted pairs of steps (default %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05], help="of all but nb-lora")
    parser.add_argument("--quantize", choices=FORMATS, help="format of the frozen weights, of all but nb-lora")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    models.quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    conditions = f"r={options.rank}, {options.batch}×{options.seq_len} tokens, {where(device)}"
    if options.quantize:
        conditions = f"{options.quantize}, {conditions}"
    show(f"SmolLM2-135M, {conditions}", conditions, comparisons(options, device), options.json)


if __name__ == "__main__":
    main()
