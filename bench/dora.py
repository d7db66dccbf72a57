"""Counts figures of a DoRA layer beside the LoRA layer, PEFT's and ours, that need no GPU: bytes saved for backward,
launches, and the bytes that they move.

    python bench/dora.py                   # a minute

The frozen layer is bfloat16 and the adapters are float32. Launches and bytes are those of forward and backward. Torch's
operators, cuBLAS's product among them, count with each operand once, and our kernels with what the interpreter loads
and stores. Ours is the function that the layers call, which computes the norms in every call, as layers on a GPU do in
training. train_step.py times whole steps.
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


def forward_of(engine: str, layer: nn.Module, dropout: float) -> Callable[[Tensor], Tensor]:
    """Returns PEFT's layer, or our function of the same tensors."""
    if engine == "PEFT":
        return layer
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    weight, magnitude = layer.base_layer.weight, layer.lora_magnitude_vector
    if "default" not in magnitude:
        return lambda x: lf.functional.lora_linear(x, weight, None, a, b, 2.0, dropout)
    return lambda x: lf.functional.dora_linear(x, weight, None, a, b, magnitude["default"].weight, 2.0, dropout)


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


def counts(engine: str, layer: nn.Module, dropout: float, tokens: int, strategy: str) -> tuple[int, int]:
    """Returns the launches and bytes of forward and all gradients."""
    forward, (x, dy) = forward_of(engine, layer, dropout), drawn(tokens, layer.in_features)
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    with lf.set_backend("triton"), tiles.assume(arch=90, thin="pass", strategy=strategy):
        return counted(lambda: torch.autograd.grad(forward(x), wanted, dy))


def moved(console: Console) -> None:
    """Prints launches and bytes, and those of DoRA over LoRA."""
    title = f"Launches and bytes of forward and backward (bytes: {MIDDLE}×{MIDDLE}, {SOME:,} tokens, cuBLAS)"
    table = Table(title=title)
    for column in ("dropout", "", "adapter", "launches, fused GEMM", "launches, cuBLAS", "MiB", "over LoRA"):
        table.add_column(column, justify="right")
    for dropout in (0.0, 0.1):
        least = 0
        for (engine, adapter, small), (*_, large) in zip(layers(SMALL, dropout), layers(MIDDLE, dropout), strict=True):
            fused, cublas = (counts(engine, small, dropout, FEW, name)[0] for name in ("fused", "cublas"))
            _, size = counts(engine, large, dropout, SOME, "cublas")
            least = size if adapter == "LoRA" else least
            figures = str(fused), str(cublas), f"{size / MIB:.2f}", f"{size / least:.2f}"
            table.add_row(f"{dropout:g}", engine, adapter, *figures)
    console.print(table)


def main() -> None:
    console = Console()
    for section in (saved, moved):
        section(console)


if __name__ == "__main__":
    main()
