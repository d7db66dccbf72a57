"""One optimizer step on SmolLM2-135M's 210 adapter pairs: LoRAAdamW and its methods against what there is.

    python bench/optim.py                 # about a minute on a CPU
    python bench/optim.py --rank 8 --repeats 40

Only the shapes of the model are used. Gradients are random and the same for both sides; the two sides of a comparison
take turns (AB, BA, …), and the figure is the median of the ratios. Run the tests first: a figure means nothing else.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.cli.memory import PeakBytes

LAYERS = 30
# (d_out, d_in) of q, o; k, v; gate, up; down
SHAPES = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]


def pairs(rank: int, weights: bool = False, device: str = "cpu") -> list[tuple]:
    """(lora_A, lora_B, scaling[, weight]) with gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    found = []
    for d_out, d_in in SHAPES * LAYERS:
        a, b = nn.Parameter(draw(rank, d_in) / d_in**0.5), nn.Parameter(draw(d_out, rank) / 100)
        a.grad, b.grad = draw(rank, d_in) / 1000, draw(d_out, rank) / 1000
        found.append((a, b, 2.0) + ((draw(d_out, d_in) / d_in**0.5,) if weights else ()))
    return found


def flat(some: list[tuple]) -> list[nn.Parameter]:
    return [p for pair in some for p in pair[:2]]


class LoopedILoRA:
    """iLoRA as one writes it from the paper: torch's AdamW, then a Python loop over the layers."""

    def __init__(self, some: list[tuple], lam: float, lr: float, fused: bool):
        self.pairs, self.lam, self.lr = some, lam, lr
        self.adamw = torch.optim.AdamW(flat(some), lr=lr, weight_decay=0.0, fused=fused or None)

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        h = self.lr * self.lam
        for a, b, *_ in self.pairs:
            rho = a.shape[0] / b.shape[0]
            d = a @ a.T - rho * b.T @ b
            change = h * d @ a
            b.add_(b @ d, alpha=h * rho)
            a.sub_(change)


def riemannian(some: list[tuple]):
    """PEFT's create_riemannian_optimizer over a model that holds the pairs; named as PEFT's layers are."""
    from peft.optimizers import create_riemannian_optimizer

    model = nn.Module()
    for i, (a, b, *_) in enumerate(some):
        layer = nn.Module()
        layer.lora_A, layer.lora_B = nn.ModuleDict({"default": nn.Module()}), nn.ModuleDict({"default": nn.Module()})
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        model.add_module(f"layer{i}", layer)
    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=2e-4, weight_decay=0.0)


def seconds(optimizer, steps: int, device: str) -> float:
    """Wall time of a step, averaged over ``steps``."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    synchronize()
    return (time.perf_counter() - start) / steps


def compare(ours, theirs, repeats: int, steps: int, device: str) -> dict:
    """Seconds a step of both, taking turns; the first turn warms up."""
    taken = {"ours": [], "theirs": []}
    sides = {"ours": ours, "theirs": theirs}
    for turn in range(repeats + 1):
        for side in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            value = seconds(sides[side], steps, device)
            if turn:
                taken[side].append(value)
    return taken


def extra_memory(rank: int, device: str) -> dict[str, float]:
    """Peak of what a step allocates beside parameters, gradients, state and weights, over the parameters' bytes."""
    extra = {}
    for method in [None, M.ScaleReg(), M.ILoRA(), M.PiLoRA(), M.ScaLoRA(interval=1), M.BaLoRA(), M.LoRARITE()]:
        some = pairs(rank, weights=isinstance(method, M.ScaLoRA), device=device)
        optimizer = lf.optim.LoRAAdamW(some, methods=method or ())
        optimizer.step()
        with PeakBytes() as memory:
            optimizer.step()
        extra[type(method).__name__ if method else "plain"] = memory.peak / sum(p.nbytes for p in flat(some))
    return extra


def comparisons(rank: int, device: str):
    """Name, goal, ours, theirs, whether the figure is ours over theirs, steps a turn."""
    fresh = lambda **options: pairs(rank, device=device, **options)
    ours = lambda *methods, **options: lf.optim.LoRAAdamW(fresh(**options), methods=methods)
    fused = lambda: torch.optim.AdamW(flat(fresh()), lr=2e-4, weight_decay=0.0, fused=True)
    yield "LoRAAdamW / torch's fused AdamW", "≤ 1.1", ours(), fused(), True, 1
    for fused_base, goal, name in ((False, "≥ 2.5", "torch's default AdamW"), (True, "", "its fused AdamW")):
        looped = LoopedILoRA(fresh(), 0.1, 2e-4, fused_base)
        yield f"looped iLoRA on {name} / LoRAAdamW(ILoRA)", goal, ours(M.ILoRA()), looped, False, 1
    yield "PEFT's Riemannian / LoRAAdamW(PiLoRA)", "≥ 2", ours(M.PiLoRA()), riemannian(fresh()), False, 1
    scalora = ours(M.ScaLoRA(interval=10), weights=True)
    yield "LoRAAdamW(ScaLoRA I=10) / LoRAAdamW", "≤ 1.10", scalora, ours(), True, 10
    yield "LoRAAdamW(BaLoRA) / LoRAAdamW", "", ours(M.BaLoRA()), ours(), True, 1
    yield "LoRAAdamW(LoRARITE) / LoRAAdamW", "", ours(M.LoRARITE()), ours(), True, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20, help="counted turns (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{len(SHAPES) * LAYERS} pairs, r={options.rank}, float32, {place}, torch {torch.__version__}")
    for column in ("figure", "ours ms", "other ms", "ratio (p20–p80)", "goal"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    results = []
    for name, goal, ours, theirs, ours_on_top, steps in comparisons(options.rank, device):
        taken = compare(ours, theirs, options.repeats if steps == 1 else options.repeats // 4 + 1, steps, device)
        both = zip(taken["ours"], taken["theirs"], strict=True)
        ratios = [mine / other if ours_on_top else other / mine for mine, other in both]
        cuts = statistics.quantiles(ratios, n=5)
        median, mine, other = (statistics.median(x) for x in (ratios, taken["ours"], taken["theirs"]))
        spread = f"{median:.2f} ({cuts[0]:.2f}–{cuts[3]:.2f})"
        table.add_row(name, f"{mine * 1e3:.1f}", f"{other * 1e3:.1f}", spread, goal)
        results.append({"figure": name, "goal": goal, "ratios": ratios, "seconds": taken})
    Console(width=120).print(table)
    extra = extra_memory(options.rank, device)
    figures = ", ".join(f"{name} {times:.2f}" for name, times in extra.items())
    Console(width=120).print(f"Peak extra memory of a step over the adapters' own bytes: {figures}")
    if options.json:
        conditions = {"rank": options.rank, "device": place, "torch": torch.__version__}
        options.json.write_text(json.dumps({**conditions, "results": results, "extra_memory": extra}, indent=1))


if __name__ == "__main__":
    main()
