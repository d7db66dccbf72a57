"""Host time of one layer's Triton path beside PEFT's eager layer, on a machine without a GPU (about two minutes).

    python bench/host.py

Ours runs as on a GPU, through launch plans and Triton's C launcher, into the stub driver of the tests, which answers as
an H100's would and computes nothing: 4096×4096, 4,096 tokens, r = 16, bfloat16. PEFT's layer and the frozen linear run
torch's CPU operators on two tokens of a 16×16 layer, where they compute next to nothing. What neither counts is the
time of CUDA's own driver. One thread, its CPU time; rounds in turns; of the means of rounds the lower quartile.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import stub_driver
import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import lora_fast as lf

ARCH, TOKENS, D, R, SMALL = 90, 4096, 4096, 16, 16
# 32 MiB tensors come from memory that the process keeps, as from a GPU's caching allocator. Read when a process starts.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
LAUNCHES = 7  # forward and backward, by the default ways
WARM_UP, ROUNDS, CALLS = 100, 100, 20
ADAPTERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.q = nn.Linear(d, d, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.q(x)


def peft_layer(d: int, r: int, dropout: float, adapter: torch.dtype, fused: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["q"])
    model = get_peft_model(Model(d), config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    if fused:
        lf.fuse_(model)
    return model.train().base_model.model.q


def own_layer(dropout: float, adapter: torch.dtype) -> nn.Module:
    layer = lf.LoRALinear(D, D, r=R, alpha=2 * R, dropout=dropout, bias=False, dtype=torch.bfloat16)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(adapter), layer.lora_B.data.to(adapter)
    return layer


def calls_of(module: nn.Module, tokens: int, d: int) -> tuple[Callable, Callable]:
    """Forward and backward; forward without gradients."""
    x = torch.zeros(1, tokens, d, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.zeros(1, tokens, d, dtype=torch.bfloat16)
    trained = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def forward():
        with torch.no_grad():
            module(x)

    return lambda: torch.autograd.grad(module(x), trained, dy), forward


def in_turns(calls: dict[tuple, Callable], progress: Progress) -> dict[tuple, float]:
    """Microseconds of each."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    microseconds = {name: [] for name in calls}
    gc.disable()
    for _ in progress.track(range(ROUNDS), description="rounds"):
        for name, call in calls.items():
            start = time.thread_time_ns()
            for _ in range(CALLS):
                call()
            microseconds[name].append((time.thread_time_ns() - start) / CALLS / 1e3)
        gc.collect(0)
    gc.enable()
    return {name: statistics.quantiles(values, n=4)[0] for name, values in microseconds.items()}


def check_launches(stub: stub_driver.Stub, name: tuple, call: Callable, expected: int) -> None:
    """That ours is on its kernels."""
    call()
    before = stub.counter("launches")
    call()
    launched = stub.counter("launches") - before
    if launched != expected:
        raise RuntimeError(f"{name}: {launched} launches, expected {expected}")


def measured(stub: stub_driver.Stub, progress: Progress) -> dict[tuple, float]:
    """(engine, adapters, dropout, mode) → microseconds; the frozen linear's adapters and dropout are None."""
    frozen = Model(SMALL).q.requires_grad_(False)
    modules = {("frozen", None, None): (frozen, 2, SMALL)}
    for name, dtype in ADAPTERS.items():
        for dropout in (0.0, 0.1):
            modules["PEFT", name, dropout] = peft_layer(SMALL, 8, dropout, dtype, fused=False), 2, SMALL
            modules["LoRALinear", name, dropout] = own_layer(dropout, dtype), TOKENS, D
            modules["fused PEFT layer", name, dropout] = peft_layer(D, R, dropout, dtype, fused=True), TOKENS, D
    calls = {}
    for key, (module, tokens, d) in modules.items():
        both, forward = calls[*key, "both"], calls[*key, "forward"] = calls_of(module, tokens, d)
        if d == D:
            check_launches(stub, key, both, LAUNCHES)
            check_launches(stub, key, forward, 2)
    return in_turns(calls, progress)


def main() -> None:
    if not ALLOCATOR.keys() <= os.environ.keys():
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= ALLOCATOR | {"OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, "-W", "ignore", *sys.argv], environment)
    stub = stub_driver.install(ARCH)
    console = Console(width=110)
    with Progress(console=console, transient=True) as progress:
        seconds = measured(stub, progress)
    frozen = seconds["frozen", None, None, "both"]
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    console.print(f"{versions}, the launches of an {stub.card.name}")
    table = Table(title=f"µs on the host, forward + backward (frozen linear: {frozen:.0f})")
    shares = "over PEFT", "added, over PEFT's", "forward alone, over PEFT"
    for column in ("adapters", "dropout", "", "PEFT", "ours", *shares):
        table.add_column(column, justify="left" if not column else "right")
    for name in ADAPTERS:
        for dropout in (0.0, 0.1):
            peft = seconds["PEFT", name, dropout, "both"]
            for engine in ("LoRALinear", "fused PEFT layer"):
                ours = seconds[engine, name, dropout, "both"]
                added = (ours - frozen) / (peft - frozen)
                forward = seconds[engine, name, dropout, "forward"] / seconds["PEFT", name, dropout, "forward"]
                shares = f"{ours / peft:.2f}", f"{added:.2f}", f"{forward:.2f}"
                table.add_row(name, f"{dropout:g}", engine, f"{peft:.0f}", f"{ours:.0f}", *shares)
    console.print(table)
    console.print("Goals: over PEFT ≤ 0.75 (float32 adapters), 0.9; added ≤ 0.6, 0.65; forward without gradients ≤ 1.")


if __name__ == "__main__":
    main()
