"""Counts figures of layers over bitsandbytes' NF4 weights (double quantisation) that need no GPU: bytes saved for
backward, the peak of forward and backward, launches, and errors against float64 with the dequantised weight.

    python bench/quantized.py                   # a minute

PEFT's layer and the same layer fused, over a bfloat16 compute dtype, with float32 adapters. Launches are those beyond
the frozen layer's own, forward and backward: the operators of torch that compute or copy, which a dispatch mode counts,
and our kernels' launches in Triton's interpreter. Views and allocations are no launches. host.py measures host time,
train_step.py and memory_step.py whole steps, with ``--quantize``.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for its interpreter to count

from collections.abc import Callable

import peft
import torch
from bases import quantize_
from operators import counted
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import lora_fast as lf
from lora_fast.kernels import tiles
from lora_fast.measure.memory import peak_bytes, saved_bytes
from suite.comparison import relative_error

CPU, BFLOAT16, MIB = torch.device("cpu"), torch.bfloat16, 2**20
DROPOUTS = (0.0, 0.1)
D, TOKENS, FEW, RANK = 1024, 4096, 64, 16


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


class Block(nn.Module):
    """A small Llama block, in which q, k and v read one tensor, and gate and up another one."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(**sizes, attn_implementation="sdpa")
        self.block, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=CPU)[None]
        return self.block(x, position_embeddings=self.rotary(x, positions), position_ids=positions)


def models(make: Callable[[], nn.Module], dropout: float) -> tuple[nn.Module, nn.Module]:
    """Returns the frozen module with quantised weights, and PEFT's model of it."""
    torch.manual_seed(0)
    frozen = quantize_(make().to(BFLOAT16), "nf4", BFLOAT16).train()
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=r".*(q|_proj)")
    model = peft.get_peft_model(frozen, config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return frozen, model


def drawn(tokens: int, d: int) -> tuple[Tensor, Tensor]:
    draw = lambda: torch.randn(1, tokens, d, dtype=torch.float32, device=CPU).to(BFLOAT16)
    return draw().requires_grad_(), draw()


def step(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    model(x).backward(dy)
    for tensor in (x, *model.parameters()):
        tensor.grad = None


def footprint(model: nn.Module) -> tuple[str, str]:
    """Returns the MiB that are saved for backward, and those alive at the peak of the second step."""
    (many, _), few = drawn(TOKENS, D), drawn(FEW, D)
    saved = saved_bytes(lambda: model(many), model.parameters())
    step(model, *few)
    return f"{saved / MIB:.3f}", f"{peak_bytes(lambda: step(model, *few), CPU) / MIB:.3f}"


def memory(console: Console) -> None:
    """Prints the bytes of one layer that are saved, and alive at the peak of a step of few tokens."""
    weight = D * D * 2 / MIB
    title = f"MiB of a {D}×{D} layer: saved ({TOKENS:,} tokens), peak ({FEW} tokens; W in bfloat16 is {weight:g})"
    table = Table(title=title)
    for column in ("dropout", "saved: PEFT", "ours", "peak: PEFT", "ours"):
        table.add_column(column, justify="right")
    for dropout in DROPOUTS:
        _, model = models(Linear, dropout)
        cells = footprint(model)
        lf.fuse_(model)
        table.add_row(f"{dropout:g}", *(cell for both in zip(cells, footprint(model), strict=True) for cell in both))
    console.print(table)


def launched(model: nn.Module, x: Tensor, dy: Tensor) -> int:
    """Returns the launches of forward and backward, without sums into ``grad``."""
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    torch.autograd.grad(model(x), wanted, dy)  # finds the groups
    tiling = tiles.assume(arch=90, thin="pass")
    with lf.set_backend("triton"), tiling:
        return counted(lambda: torch.autograd.grad(model(x), wanted, dy))[0]


def launches(console: Console) -> None:
    """Prints the launches of a layer and of a block beyond those of the same module without adapters."""
    table = Table(title="Launches beyond those of the frozen module, forward + backward")
    for column in ("", "dropout", "frozen", "PEFT", "ours"):
        table.add_column(column, justify="right")
    for name, make, d in (("layer", Linear, D), ("block of seven layers", Block, 128)):
        for dropout in DROPOUTS:
            x, dy = drawn(512, d)
            torch.manual_seed(0)
            base = launched(quantize_(make().to(BFLOAT16), "nf4", BFLOAT16).train(), x, dy)
            _, model = models(make, dropout)
            peft_launches = launched(model, x, dy)
            lf.fuse_(model)
            cells = (peft_launches - base, launched(model, x, dy) - base)
            table.add_row(name, f"{dropout:g}", str(base), *map(str, cells))
    console.print(table)


def errors(console: Console) -> None:
    """Prints the errors of one layer against float64 with the dequantised weight."""
    _, model = models(Linear, 0.0)
    names = ("y", "dx", "da", "db")
    table = Table(title=f"Relative L2 error against float64 with the dequantised weight, {FEW} tokens")
    for column in ("", *names):
        table.add_column(column, justify="right")
    x, dy = drawn(FEW, D)
    layer = model.base_model.model.q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    w = lf.quantized.quantized_weight(layer.base_layer).dequantized(torch.float32).double()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    results = lambda y, inputs: [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]
    y = wide[0] @ w.T + layer.scaling["default"] * (wide[0] @ wide[1].T @ wide[2].T)
    exact = results(y, wide)
    runs = {"PEFT": results(model(x), [x, a, b])}
    lf.fuse_(model)
    runs["ours, torch backend"] = results(model(x), [x, a, b])
    with lf.set_backend("triton"):
        runs["ours, Triton backend"] = results(model(x), [x, a, b])
    for name, got in runs.items():
        table.add_row(name, *(f"{relative_error(*pair):.1e}" for pair in zip(got, exact, strict=True)))
    console.print(table)


def main() -> None:
    console = Console()
    for section in (memory, launches, errors):
        section(console)


if __name__ == "__main__":
    main()
