"""Counts figures of a DoRA layer beside the LoRA layer, PEFT's and ours, that need no GPU: bytes saved for backward,
launches, and the bytes that they move.

    python bench/dora.py                   # a minute

The frozen layer is bfloat16 and the adapters are float32. Launches and bytes are those of forward and backward. Torch's
operators, cuBLAS's product among them, count with each operand once, and our kernels with what the interpreter loads
and stores. A layer computes its norms once for each version of its weights, so the later micro-batches of a step have
fewer launches than the first one. train_step.py times whole steps.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for its interpreter to count

from collections.abc import Callable, Iterator

import peft
import torch
from operators import counted
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lora_fast as lf
from lora_fast.kernels import tiles
from lora_fast.measure.memory import saved_bytes

CPU, BFLOAT16, MIB = torch.device("cpu"), torch.bfloat16, 2**20
D, TOKENS, RANK = 1024, 4096, 16
MIDDLE, SOME = 256, 512  # for bytes, in the proportion of 4096 columns and 8,192 tokens
SMALL, FEW = 128, 256  # for launches, which do not depend on sizes
ENGINES = ("PEFT", "ours")


def layers(d: int, dropout: float) -> Iterator[tuple[str, str, nn.Module]]:
    """Yields (engine, adapter, layer) for PEFT's LoRA and DoRA layers of d to d columns, and for the same fused."""
    for engine in ENGINES:
        for adapter in ("LoRA", "DoRA"):
            torch.manual_seed(0)
            base = nn.ModuleDict({"q": nn.Linear(d, d, bias=False, device=CPU, dtype=BFLOAT16)})
            options = {"lora_dropout": dropout, "target_modules": ["q"], "use_dora": adapter == "DoRA"}
            model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **options)).train()
            layer = model.base_model.model["q"]
            nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
            if engine == "ours":
                lf.fuse_(model)
            yield engine, adapter, layer


def drawn(tokens: int, d: int) -> tuple[Tensor, Tensor]:
    draw = lambda: torch.randn(tokens, d, dtype=torch.float32, device=CPU).to(BFLOAT16)
    return draw().requires_grad_(), draw()


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Returns what computes forward and all gradients."""
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def saved(console: Console) -> None:
    """Prints the bytes that a layer keeps for backward, its parameters excluded."""
    table = Table(title=f"MiB saved for backward: {D}×{D}, {TOKENS:,} tokens, r = {RANK} (x and S in float32 are 8.25)")
    for column in ("", "adapter", "dropout 0", "dropout 0.1"):
        table.add_column(column, justify="right")
    x, _ = drawn(TOKENS, D)
    for without, with_dropout in zip(layers(D, 0.0), layers(D, 0.1), strict=True):
        sizes = [saved_bytes(lambda each=each: each[2](x), each[2].parameters()) for each in (without, with_dropout)]
        table.add_row(*without[:2], *(f"{size / MIB:.3f}" for size in sizes))
    console.print(table)


def micro_batches(layer: nn.Module, tokens: int, d: int, strategy: str) -> list[tuple[int, int]]:
    """Returns the launches and bytes of a step's first micro-batch and of a later one."""
    with lf.set_backend("triton"), tiles.assume(arch=90, thin="pass", strategy=strategy):
        run = step(layer, *drawn(tokens, d))
        run()
        for parameter in layer.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(0)  # as an optimizer's step does: the norms are those of another version
        return [counted(run), counted(run)]


def moved(console: Console) -> None:
    """Prints launches and bytes, and those of DoRA over LoRA."""
    title = f"Forward and backward, first and later micro-batches (bytes: {MIDDLE}×{MIDDLE}, {SOME:,} tokens, cuBLAS)"
    table = Table(title=title)
    for column in ("dropout", "", "adapter", "launches, fused GEMM", "launches, cuBLAS", "MiB", "over LoRA"):
        table.add_column(column, justify="right")
    for dropout in (0.0, 0.1):
        plain: list[int] = []
        for (engine, adapter, small), (*_, large) in zip(layers(SMALL, dropout), layers(MIDDLE, dropout), strict=True):
            fused, cublas = (
                "{[0]}, {[0]}".format(*micro_batches(small, FEW, SMALL, name)) for name in ("fused", "cublas")
            )
            sizes = [size for _, size in micro_batches(large, SOME, MIDDLE, "cublas")]
            plain = sizes if adapter == "LoRA" else plain
            ratios = ", ".join(f"{size / least:.2f}" for size, least in zip(sizes, plain, strict=True))
            mebibytes = ", ".join(f"{size / MIB:.1f}" for size in sizes)
            table.add_row(f"{dropout:g}", engine, adapter, fused, cublas, mebibytes, ratios)
    console.print(table)


def main() -> None:
    console = Console()
    for section in (saved, moved):
        section(console)


if __name__ == "__main__":
    main()
