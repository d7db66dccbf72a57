"""Counts figures of the experts of a Qwen3-MoE layer with LoRA adapters, PEFT's ``target_parameters`` and the same
wrappers fused, that need no GPU: bytes moved by forward and backward, saved for backward and at the peak, and launches.

    python bench/experts.py                    # two minutes
    python bench/experts.py --only launches

Base and activations have 16 bits, the adapters are float32. Torch's operators, the grouped products among them, count
with each operand once, and our kernels with what Triton's interpreter loads and stores. PEFT's model has transformers'
``grouped_mm``, the fastest of its implementations. experts_step.py times whole steps.
"""

import argparse
import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for its interpreter to count

from collections.abc import Callable

import peft
import torch
from operators import counted
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lora_fast as lf
from lora_fast.kernels import tiles
from lora_fast.measure.memory import peak_bytes, saved_bytes

CPU, DTYPE, MIB = torch.device("cpu"), torch.float16, 2**20
SECTIONS = ("memory", "launches")
HIDDEN, INNER, TOP_K, RANK = 256, 96, 4, 16  # an eighth of Qwen3-30B-A3B's widths
EXPERTS, TOKENS = 16, 256  # of the section on memory
COUNTS, FEW = (4, 16, 64, 128), 16  # numbers of experts and tokens for launches
PARAMETERS = ("gate_up_proj", "down_proj")


def experts(count: int, scale: int, fused: bool) -> nn.Module:
    """Returns PEFT's wrappers of the experts of a layer, widths divided by ``scale``."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN // scale, "moe_intermediate_size": INNER // scale, "num_experts": count}
    config = Qwen3MoeConfig(**sizes)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config).to(DTYPE)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    targets = [f"experts.{name}" for name in PARAMETERS]
    options = {"target_modules": [], "target_parameters": targets}
    model = peft.get_peft_model(nn.ModuleDict({"experts": module}), peft.LoraConfig(r=RANK, **options)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    if fused:
        lf.fuse_(model)
    layer: nn.Module = model.base_model.model["experts"]
    return layer


def step(layer: nn.Module, count: int, tokens: int, hidden: int) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """Returns what computes forward, and what computes forward and all gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32, device=CPU)
    weights, index = draw(tokens, count).softmax(-1).topk(TOP_K)
    x, dy = draw(tokens, hidden).to(DTYPE).requires_grad_(), draw(tokens, hidden).to(DTYPE)
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    forward = lambda: layer(x, index, weights.to(DTYPE))
    return forward, lambda: torch.autograd.grad(forward(), wanted, dy)


def memory(console: Console) -> None:
    """Prints the bytes that forward and backward move and have alive at the peak, and those saved for backward."""
    weight = EXPERTS * 3 * HIDDEN * INNER * DTYPE.itemsize / MIB
    title = (
        f"MiB: {EXPERTS} experts {HIDDEN}→2×{INNER}→{HIDDEN}, {TOKENS:,} tokens to {TOP_K} each, r = {RANK}; "
        f"all weights have {weight:g}"
    )
    table = Table(title=title)
    for column in ("", "moved", "peak", "saved"):
        table.add_column(column, justify="right")
    for name, fused, backend in (("PEFT", False, "torch"), ("torch ops", True, "torch"), ("kernels", True, "triton")):
        layer = experts(EXPERTS, 1, fused)
        forward, both = step(layer, EXPERTS, TOKENS, HIDDEN)
        with console.status(name), lf.set_backend(backend), tiles.assume(arch=90):
            figures = counted(both)[1], peak_bytes(both, CPU), saved_bytes(forward, layer.parameters())
        table.add_row(name, *(f"{figure / MIB:.1f}" for figure in figures))
    console.print(table)


def launches(console: Console) -> None:
    """Prints the launches of forward and backward by number of experts."""
    table = Table(title="Launches of forward and backward; of torch ops each call of an operator")
    for column in ("", *(f"{count} experts" for count in COUNTS)):
        table.add_column(column, justify="right")
    for name, fused, backend in (("PEFT", False, "torch"), ("torch ops", True, "torch"), ("kernels", True, "triton")):
        cells = []
        for count in COUNTS:
            _, both = step(experts(count, 4, fused), count, FEW, HIDDEN // 4)
            with lf.set_backend(backend), tiles.assume(arch=90):
                cells.append(str(counted(both)[0]))
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="the sections to run")
    wanted, console = parser.parse_args().only, Console()
    for section in SECTIONS:
        if section in wanted:
            globals()[section](console)


if __name__ == "__main__":
    main()
