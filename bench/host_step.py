"""Measures the host time of the optimizer's step on the Triton path and of torch's fused AdamW, without a GPU, in about
a minute.

    python bench/host_step.py

The 224 adapter pairs have the shapes of Llama-3-8B, r = 16. Ours runs as on a GPU, through launch plans and Triton's C
launcher, on the stub driver of the tests, which reports an H100 and computes nothing. The kernel call of torch's fused
AdamW is replaced by nothing, so that the host's parts are compared. In training, gradients move from step to step
(``zero_grad`` sets them to None) and a schedule sets the rate; each row states what moves. Neither includes the time of
CUDA's own driver, which for ours contains the copy of the gradients' addresses. The figures are CPU times of one thread
in interleaved steps: the lower quartile.
"""

import os
import sys
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
from lora_fast import methods as M
from lora_fast.measure.clock import host_microseconds

ARCH, R, LAYERS = 90, 16, 32
HIDDEN, KEYS, INNER = 4096, 1024, 14336
LAYER = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)]  # d_in, d_out
LAYER += [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]
METHODS = {  # name → methods, launches, goal
    "AdamW": ((), 1, 0.5),
    "ILoRA": ((M.ILoRA(),), 3, 0.8),
    "PiLoRA": ((M.PiLoRA(),), 5, 1.0),
}
# what moves → (gradients, rate)
MOVES = {"nothing": (False, False), "gradients": (True, False), "rate": (False, True), "both": (True, True)}
LR, WARM_UP, ROUNDS = 1e-4, 5, 100


class Pool:
    """Memory from which the gradients of some pairs get other addresses in every step."""

    PLACES = 64

    def __init__(self, model: nn.ModuleList):
        self.parameters = [p for layer in model for p in (layer.lora_A, layer.lora_B)]
        self.memory = torch.empty(sum(p.numel() for p in self.parameters) + 16 * self.PLACES)

    def hand_out(self, turn: int) -> None:
        place = 16 * (turn % self.PLACES)
        for p in self.parameters:
            p.grad = self.memory[place : place + p.numel()].view(p.shape)
            place += p.numel()


def adapted_model() -> nn.ModuleList:
    """Returns a layer for each pair. The memory of the factors is never touched, so it costs nothing, and the frozen
    weights have none."""
    model = nn.ModuleList()
    for d_in, d_out in LAYER * LAYERS:
        layer = lf.LoRALinear(d_in, d_out, r=R, alpha=2 * R, bias=False, device="meta")
        layer.lora_A, layer.lora_B = nn.Parameter(torch.empty(R, d_in)), nn.Parameter(torch.empty(d_out, R))
        model.append(layer)
    return model


def ours(
    stub: stub_driver.Stub, methods: tuple, launches: int, gradients: bool, rate: bool
) -> tuple[Callable, Callable]:
    """Returns a function that prepares the step of a round, and the step itself."""
    model = adapted_model()
    pool, optimizer = Pool(model), lf.optim.LoRAAdamW(model, lr=LR, methods=list(methods))

    def prepare(turn: int) -> None:
        if gradients or not turn:
            pool.hand_out(turn)
        if rate:
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - turn / 1000)

    prepare(0)
    optimizer.step()
    before = stub.counter("launches")
    optimizer.step()
    if stub.counter("launches") - before != launches:
        raise RuntimeError(f"{methods}: {stub.counter('launches') - before} launches, expected {launches}")
    return prepare, optimizer.step


def torch_step() -> tuple[Callable, Callable]:
    """Returns the same for torch's fused AdamW, whose kernel call it replaces by nothing."""
    pool = Pool(adapted_model())
    optimizer = torch.optim.AdamW(pool.parameters, lr=LR, fused=True)
    pool.hand_out(0)
    optimizer.step()
    torch._fused_adamw_ = lambda *args, **kwargs: None
    return lambda turn: None, optimizer.step


def main() -> None:
    torch.set_num_threads(1)
    stub = stub_driver.install(ARCH)
    console = Console(width=110)
    with Progress(console=console, transient=True) as progress:
        steps = {("torch", ""): torch_step()}
        cases = [(name, moves) for name in METHODS for moves in MOVES]
        for name, moves in progress.track(cases, description="first steps"):
            steps[name, moves] = ours(stub, *METHODS[name][:2], *MOVES[moves])
        progress.add_task("steps in turns", total=None)
        times = host_microseconds(steps, ROUNDS, WARM_UP)
    base = times["torch", ""]
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    console.print(f"{versions}, launches for an {stub.card.name}; torch's fused AdamW: {base:.0f} µs")
    table = Table(title="host time over the host time of torch's fused AdamW")
    table.add_column("what moves")
    for name, (_, launches, goal) in METHODS.items():
        table.add_column(f"{name} (≤ {goal:g}), {launches} launches", justify="right")
    for moves in MOVES:
        table.add_row(moves, *(f"{times[name, moves] / base:.2f} ({times[name, moves]:.0f} µs)" for name in METHODS))
    console.print(table)


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ or "TRITON_INTERPRET" in os.environ:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment | {"OMP_NUM_THREADS": "1"})
    main()
