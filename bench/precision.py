"""Measures how much of each method survives in 16 bits: the tables of docs/precision.md.

    python bench/precision.py                 # about five minutes on a CPU core
    python bench/precision.py --seeds 1 --steps 50

The problem is a linear layer, d_out 96, d_in 128, r 8, b = 0 at the start, with the gradients of a regression on fresh
inputs at every step. The share of a method is ⟨Δ₁₆, Δ⟩ / ⟨Δ, Δ⟩, where Δ is what the method changes in the result of a
float64 run without it, and Δ₁₆ the same for runs in 16 bits: 1 if it does all its work, 0 if it does none. For AdamW it
is what the run changes in its start. The result is the factors; the imbalance ‖a aᵀ − r/d_out bᵀb‖ for iLoRA, whose
changes of the factors are small beside what a run makes of them; the product for an update that moves it and leaves the
factors free. Runs are on the torch backend.
"""

import argparse
import statistics
import time
import warnings
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.ops.reference.scalora_solution import add_low_rank_

D_OUT, D_IN, RANK, SCALING = 96, 128, 8, 2.0
DOUBLE, BFLOAT16, FLOAT16, FLOAT32 = torch.float64, torch.bfloat16, torch.float16, torch.float32
NEAREST, STOCHASTIC, WIDE = {"rounding": "nearest"}, {"rounding": "stochastic"}, {"state_dtype": FLOAT32}
METHODS: dict[str, tuple[list, dict]] = {  # a row of the table → methods, arguments of LoRAAdamW
    "AdamW": ([], {}),
    "AdamW, stochastic": ([], STOCHASTIC),
    "ILoRA(lam=0.1)": ([M.ILoRA(lam=0.1)], {}),
    "ILoRA(lam=10)": ([M.ILoRA(lam=10.0)], {}),
    "PiLoRA()": ([M.PiLoRA()], {}),
    "ScaleReg(1e-2)": ([M.ScaleReg(lam=1e-2)], {}),
    "ScaleReg(1e-2, decoupled=True)": ([M.ScaleReg(lam=1e-2, decoupled=True)], {}),
    "ScaledAdamW()": ([M.ScaledAdamW()], {}),
    "RefLoRA()": ([M.RefLoRA()], {}),
    "BaLoRA()": ([M.BaLoRA()], {}),
    "LoRARITE()": ([M.LoRARITE()], {}),
    "LoRAMuon()": ([M.LoRAMuon()], {}),
}
IMBALANCE = "ILoRA(lam=0.1)", "ILoRA(lam=10)"  # rows of other results than the factors
PRODUCT = "LoRARITE()", "LoRAMuon()"
SETTINGS: dict[str, tuple[torch.dtype, dict]] = {  # a column → dtype of the factors, arguments of LoRAAdamW
    "bf16": (BFLOAT16, {}),
    "bf16, nearest": (BFLOAT16, NEAREST),
    "bf16, float32 state": (BFLOAT16, WIDE),
    "fp16": (FLOAT16, {}),
    "fp16, float32 state": (FLOAT16, WIDE),
}


class Result(NamedTuple):
    """The state of a run, in float64: the factors in one vector, the imbalance, the product."""

    factors: Tensor
    imbalance: Tensor
    product: Tensor


def train(seed: int, steps: int, lr: float, dtype: torch.dtype, methods: list, arguments: dict) -> list[Result]:
    """Returns the start and the end of a run."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)
    weight = draw(D_OUT, D_IN) / D_IN**0.5
    target = weight + 0.01 * draw(D_OUT, 6) @ draw(6, D_IN)
    start = (torch.rand(RANK, D_IN, generator=generator, dtype=DOUBLE) * 2 - 1) / D_IN**0.5
    a = nn.Parameter(start.to(BFLOAT16).to(dtype))  # the same start in every dtype
    b = nn.Parameter(torch.zeros(D_OUT, RANK, dtype=dtype))
    optimizer = lf.optim.LoRAAdamW([(a, b, SCALING)], lr=lr, methods=methods, **arguments)
    results = []
    for step in range(steps + 1):
        wide_a, wide_b = a.detach().double(), b.detach().double()
        if step in (0, steps):
            imbalance = (wide_a @ wide_a.T - RANK / D_OUT * wide_b.T @ wide_b).norm()
            results.append(Result(torch.cat([wide_a.flatten(), wide_b.flatten()]), imbalance, wide_b @ wide_a))
        x = draw(32, D_IN)
        full = (x @ (weight + SCALING * wide_b @ wide_a - target).T).T @ x / len(x)
        a.grad, b.grad = (SCALING * wide_b.T @ full).to(dtype), (SCALING * full @ wide_a.T).to(dtype)
        optimizer.step()
    return results


def shares(seeds: int, steps: int, lr: float) -> dict[str, dict[str, float]]:
    """Returns the share of each method that survives, by row and column."""
    samples: dict[str, dict[str, list[float]]] = {name: {column: [] for column in SETTINGS} for name in METHODS}
    for seed in track(range(seeds), f"lr {lr:g}"):
        exact: dict[str, Tensor] = {}
        for column, (dtype, setting) in ({"exact": (DOUBLE, {})} | SETTINGS).items():
            # AdamW with the noise of the runs with a method. Without any method the noise is numbered in another way.
            start, plain = train(seed, steps, lr, dtype, [M.ILoRA(lam=0.0)], setting)
            for name, (methods, arguments) in METHODS.items():
                _, end = train(seed, steps, lr, dtype, methods, setting | arguments)
                field = 1 * (name in IMBALANCE) + 2 * (name in PRODUCT)
                change = (end[field] - (plain if methods else start)[field]).flatten()
                if column == "exact":
                    exact[name] = change
                else:
                    samples[name][column].append((change @ exact[name] / exact[name].square().sum()).item())
    return {name: {column: statistics.mean(x) for column, x in columns.items()} for name, columns in samples.items()}


def drift(dtype: torch.dtype, weight_dtype: torch.dtype, rounding: str, scalings: int = 100) -> float:
    """Returns how far the effective weight moves in ScaLoRA's scalings at learning rate 0, relative to ‖s b a‖."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)
    a, b = nn.Parameter((draw(4, 32) / 6).to(dtype)), nn.Parameter((draw(24, 4) / 20).to(dtype))
    weight = (draw(24, 32) / 6).to(weight_dtype)
    product = lambda: SCALING * b.detach().double() @ a.detach().double()
    before, size = weight.double() + product(), product().norm()
    optimizer = lf.optim.LoRAAdamW(
        [(a, b, SCALING, weight)], lr=0.0, methods=[M.ScaLoRA(interval=1, rounding=rounding)]
    )
    for _ in range(scalings):
        full = draw(24, 32)
        a.grad, b.grad = (2 * b.double().T @ full).to(dtype), (2 * full @ a.double().T).to(dtype)
        optimizer.step()
    return ((weight.double() + product() - before).norm() / size).item()


def merge_error(ulps: float, rounding: str, merges: int = 100) -> float:
    """Returns the error of repeated merges of one term into a bfloat16 weight, relative to their sum. An entry of a
    term is about ``ulps`` units in the last place of its weight."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    weight = (1 + torch.rand(64, 96, generator=generator)).to(BFLOAT16)
    a, b = draw(4, 96), draw(64, 4) * ulps * torch.finfo(BFLOAT16).eps / 2
    start, residual = weight.double(), torch.zeros_like(weight)
    for i in range(merges):
        add_low_rank_(weight, a, b, torch.ones(4), rounding, i, residual)
    exact = merges * b.double() @ a.double()
    return ((weight.double() - start - exact).norm() / exact.norm()).item()


def step_ms(rounding: str, steps: int = 5) -> float:
    """Returns the time on one core of a step with iLoRA of 210 bfloat16 pairs of SmolLM2's shapes: the median."""
    shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)] * 30
    pairs = [[torch.randn(16, d_in), torch.randn(d_out, 16)] for d_in, d_out in shapes]
    pairs = [[nn.Parameter(p.to(BFLOAT16) / 8) for p in pair] for pair in pairs]
    for pair in pairs:
        for p in pair:
            p.grad = torch.randn_like(p)
    optimizer, times = lf.optim.LoRAAdamW(pairs, methods=[M.ILoRA()], rounding=rounding), []
    for _ in range(steps + 1):
        start = time.process_time()
        optimizer.step()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times[1:])  # the first step builds the stacks


def show(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="problems over which a share is averaged")
    parser.add_argument("--steps", type=int, default=200, help="steps of a run")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 1e-3], help="learning rates, a table for each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "LoRAAdamW: the moments of float16")  # a column of the table shows what they do
    console = Console(width=120)
    for lr in options.lr:
        results = shares(options.seeds, options.steps, lr)
        rows = [[name, *(f"{value:.2f}" for value in columns.values())] for name, columns in results.items()]
        title = f"share of each method that survives, {options.steps} steps at lr {lr:g}"
        show(console, title, ["method", *SETTINGS], rows)
    weights = {
        "float32 weight": (FLOAT32, "nearest"),
        "bf16 weight, stochastic": (BFLOAT16, "stochastic"),
        "bf16 weight, compensated": (BFLOAT16, "compensated"),
    }
    title = "drift of the effective weight in 100 scalings of ScaLoRA at lr 0, over the product's norm"
    names = {"float32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}
    rows = [[name, *(f"{drift(dtype, *w):.1e}" for w in weights.values())] for name, dtype in names.items()]
    show(console, title, ["factors", *weights], rows)
    sizes, roundings = (0.003, 0.03, 0.3), ("nearest", "stochastic", "compensated")
    rows = [[rounding, *(f"{merge_error(ulps, rounding):.2f}" for ulps in sizes)] for rounding in roundings]
    title = "error of 100 merges into a bfloat16 weight, over their sum"
    show(console, title, ["rounding", *(f"{ulps:g} ulp a merge" for ulps in sizes)], rows)
    rows = [[rounding, f"{step_ms(rounding):.0f} ms"] for rounding in ("nearest", "stochastic")]
    show(console, "a step with ILoRA of 210 bfloat16 pairs, rank 16, on one core", ["rounding", "time"], rows)


if __name__ == "__main__":
    main()
