"""Host time of the optimizer's step on the Triton path beside torch's fused AdamW, on a machine without a GPU (about a
minute).

    python bench/host_step.py

224 adapter pairs in the shapes of Llama-3-8B, r = 16. Ours runs as on a GPU: through launch plans and Triton's C
launcher into the stub driver of the tests, which answers as an H100's would and computes nothing. Of torch's fused
AdamW the kernel call is left out, so what is compared is the host's part of both. As in training, gradients move from
step to step (``zero_grad`` sets them to None) and a schedule sets the rate; what moves is said. What neither counts is
the time of CUDA's own driver, for ours the copy of the gradients' addresses among it. One thread, its CPU time; steps
in turns; of their times the lower quartile.
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
from lora_fast import methods as M

ARCH, R, LAYERS = 90, 16, 32
HIDDEN, KEYS, INNER = 4096, 1024, 14336
LAYER = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)]  # d_in, d_out
LAYER += [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]
METHODS = {  # methods, launches, goal
    "AdamW": ((), 1, 0.5),
    "ILoRA": ((M.ILoRA(),), 3, 0.8),
    "PiLoRA": ((M.PiLoRA(),), 5, 1.0),
}
MOVES = {"nothing": (False, False), "gradients": (True, False), "rate": (False, True), "both": (True, True)}
LR, WARM_UP, ROUNDS = 1e-4, 5, 100


class Pool:
    """Gradients at other places in every step."""

    PLACES = 64

    def __init__(self, pairs: list[tuple]):
        self.parameters = [p for a, b, *_ in pairs for p in (a, b)]
        self.memory = torch.empty(sum(p.numel() for p in self.parameters) + 16 * self.PLACES)

    def hand_out(self, turn: int) -> None:
        place = 16 * (turn % self.PLACES)
        for p in self.parameters:
            p.grad = self.memory[place : place + p.numel()].view(p.shape)
            place += p.numel()


def pairs() -> list[tuple]:
    """Their memory is never touched."""
    make = lambda *shape: nn.Parameter(torch.empty(shape))
    return [(make(R, d_in), make(d_out, R), 2.0) for d_in, d_out in LAYER * LAYERS]


def ours(
    stub: stub_driver.Stub, methods: tuple, launches: int, gradients: bool, rate: bool
) -> tuple[Callable, Callable]:
    """Returns a function that prepares the step of a number, and the step."""
    trained = pairs()
    pool, optimizer = Pool(trained), lf.optim.LoRAAdamW(trained, lr=LR, methods=list(methods))

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


def torchs() -> tuple[Callable, Callable]:
    pool = Pool(pairs())
    optimizer = torch.optim.AdamW(pool.parameters, lr=LR, fused=True)
    pool.hand_out(0)
    optimizer.step()
    torch._fused_adamw_ = lambda *args, **kwargs: None
    return lambda turn: None, optimizer.step


def in_turns(steps: dict[tuple, tuple[Callable, Callable]], progress: Progress) -> dict[tuple, float]:
    """Microseconds of each."""
    microseconds = {name: [] for name in steps}
    gc.disable()
    for turn in progress.track(range(WARM_UP + ROUNDS), description="steps"):
        for name, (prepare, step) in steps.items():
            prepare(turn)
            start = time.thread_time_ns()
            step()
            took = time.thread_time_ns() - start
            if turn >= WARM_UP:
                microseconds[name].append(took / 1e3)
        gc.collect(0)
    gc.enable()
    return {name: statistics.quantiles(values, n=4)[0] for name, values in microseconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    stub = stub_driver.install(ARCH)
    console = Console(width=110)
    with Progress(console=console, transient=True) as progress:
        steps = {("torch", ""): torchs()}
        cases = [(name, moves) for name in METHODS for moves in MOVES]
        for name, moves in progress.track(cases, description="first steps"):
            steps[name, moves] = ours(stub, *METHODS[name][:2], *MOVES[moves])
        times = in_turns(steps, progress)
    base = times["torch", ""]
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    console.print(f"{versions}, the launches of an {stub.card.name}; torch's fused AdamW: {base:.0f} µs")
    table = Table(title="host time over that of torch's fused AdamW")
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
