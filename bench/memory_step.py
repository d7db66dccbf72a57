"""Measures the memory of a training step: the most bytes alive at once in forward and backward, beside weights and
input.

    python bench/memory_step.py                           # SmolLM2-135M and a block of Llama-3-8B
    python bench/memory_step.py --model block --tokens 8192 --dropout 0.1
    python bench/memory_step.py --quantize nf4            # linear layers by bitsandbytes

PEFT's model and the same model fused take the same step: SmolLM2-135M on the King James text with its loss; the block,
with random weights, from a random input that needs a gradient, as within a model, to a random gradient. The base is
bfloat16. Adapters are float32, as PEFT creates them, without or under autocast, or bfloat16. One step is taken before,
in which groups are found.

On a CPU the meter is ``PeakBytes``, whose figures are the same in every run. It does not see the dropout masks of the
torch ops, which are NumPy's memory; the kernels have none. On a GPU the meter is the allocator. All that is counted is
proportional to the number of tokens, but for the gradients of the adapters.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from bases import FORMATS, quantize_
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_step import batches, blocks, trained
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import lora_fast as lf
from lora_fast.cli.inputs import models
from lora_fast.measure.memory import peak_bytes

Forward = Callable[[nn.Module], Tensor]
MIB = 2**20
SEQ_LEN = 256  # of SmolLM2-135M
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setting:
    """The adapters of a PEFT model over a bfloat16 base."""

    label: str
    float32_adapters: bool
    autocast: bool = False


SETTINGS = (
    Setting("float32", True),
    Setting("float32, autocast", True, autocast=True),
    Setting("bfloat16", False),
)


class LlamaBlock(nn.Module):
    """A block of Llama-3-8B with random weights, its residual stream and attention included."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        config = LlamaConfig(**sizes, attn_implementation="sdpa")
        self.block, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.block(x, position_embeddings=self.rotary(x, positions), position_ids=positions)


def smollm2(tokens: int, device: torch.device) -> tuple[nn.Module, Forward, Tensor | None]:
    """Returns the model, its forward, and the gradient of what forward returns (None for a loss)."""
    model = models.load_model(models.cached(models.PACKAGED, ""), torch.bfloat16).to(device)
    ids = next(batches(blocks(SEQ_LEN, device), tokens // SEQ_LEN))
    return model, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss, None


def llama_block(tokens: int, device: torch.device) -> tuple[nn.Module, Forward, Tensor | None]:
    """Returns the block, its forward, and the gradient of what forward returns."""
    torch.manual_seed(0)
    with device:
        model = LlamaBlock().to(torch.bfloat16)
        x, dy = torch.randn(2, 1, tokens, 4096, dtype=torch.bfloat16).unbind()
    return model, lambda model: model(x.detach().requires_grad_()), dy


MODELS = {"SmolLM2": smollm2, "block": llama_block}


def peak_of_step(model: nn.Module, forward: Forward, dy: Tensor | None, autocast: bool) -> int:
    """Returns the most bytes that the model's second step has alive at once."""
    device = next(model.parameters()).device

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            result = forward(model)
        result.backward(dy)
        for parameter in trained(model):
            parameter.grad = None

    step()
    return peak_bytes(step, device)


def measure(options: argparse.Namespace, name: str, device: torch.device) -> Iterator[dict]:
    """Yields the figures of one model, a dictionary for each dropout and setting."""
    base, forward, dy = MODELS[name](options.tokens, device)
    if options.quantize:
        quantize_(base, options.quantize, torch.bfloat16)
    for dropout in options.dropout:
        config = peft.LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, lora_dropout=dropout, target_modules=LINEARS
        )
        for setting in SETTINGS:
            model = peft.get_peft_model(base, config, autocast_adapter_dtype=setting.float32_adapters).train()
            theirs = peak_of_step(model, forward, dy, setting.autocast)
            lf.fuse_(model)
            ours = peak_of_step(model, forward, dy, setting.autocast)
            lf.unfuse_(model)
            base = model.unload()
            yield {"model": name, "dropout": dropout, "adapters": setting.label, "PEFT": theirs, "ours": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=512, help=f"of a step, for SmolLM2 a multiple of {SEQ_LEN}")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--quantize", choices=FORMATS, help="format of the frozen weights")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    models.quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    conditions = f"{options.tokens} tokens, r={options.rank}, {device.type}, torch {torch.__version__}"
    conditions = f"{options.quantize or 'bfloat16'} base, {conditions}"
    table = Table(title=f"Peak of a step, {conditions}")
    for column in ("model", "dropout", "adapters", "PEFT, MiB", "ours, MiB", "PEFT / ours"):
        table.add_column(column, justify="right")
    results = [row for name in options.model for row in measure(options, name, device)]
    for row in results:
        sizes = f"{row['PEFT'] / MIB:.1f}", f"{row['ours'] / MIB:.1f}", f"{row['PEFT'] / row['ours']:.3f}"
        table.add_row(row["model"], f"{row['dropout']:g}", row["adapters"], *sizes)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
