"""Measures the memory of a training step: the most bytes alive at once in forward and backward, beside the weights.

    python bench/memory_step.py                           # SmolLM2-135M and a block of Llama-3-8B
    python bench/memory_step.py --model block --tokens 1024 --dropout 0.1

PEFT's model and the same model fused take the same step: SmolLM2-135M on the King James text with its loss, the block
(random weights) from a random input that needs a gradient, as within a model, to a random gradient. The base is
bfloat16; adapters are float32, as PEFT creates them, or bfloat16, or float32 under autocast. On a CPU the meter is
``PeakBytes``, which counts the storages of tensors and gives the same figure in every run; on a GPU it is the
allocator. Both count gradients of the adapters, which do not depend on the number of tokens; all else is proportional
to that number.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_step import batches, blocks, trained
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import lora_fast as lf
from lora_fast.cli.inputs import models
from lora_fast.measure.memory import peak_bytes

MIB = 2**20
SEQ_LEN = 256  # of SmolLM2-135M
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setting:
    """How a PEFT model is trained over a bfloat16 base."""

    label: str
    float32_adapters: bool
    autocast: bool = False


SETTINGS = (
    Setting("float32 adapters", True),
    Setting("bfloat16 adapters", False),
    Setting("autocast", True, autocast=True),
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


def smollm2(tokens: int, device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor], Tensor | None]:
    """Returns the model, its forward, and the gradient of what forward returns (None for a loss)."""
    model = models.load_model(models.cached(models.PACKAGED, ""), torch.bfloat16).to(device)
    ids = next(batches(blocks(SEQ_LEN, device), tokens // SEQ_LEN))
    return model, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss, None


def llama_block(tokens: int, device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor], Tensor | None]:
    """Returns the block, its forward, and the gradient of what forward returns."""
    torch.manual_seed(0)
    with device:
        model = LlamaBlock().to(torch.bfloat16)
        x, dy = torch.randn(2, 1, tokens, 4096, dtype=torch.bfloat16).unbind()
    return model, lambda model: model(x.detach().requires_grad_()), dy


MODELS = {"SmolLM2-135M": (smollm2, 512), "block": (llama_block, 512)}


def peak_of_step(model: nn.Module, forward: Callable[[nn.Module], Tensor], dy: Tensor | None, autocast: bool) -> int:
    """Returns the most bytes that a step has alive at once, after one step that nobody measures."""
    device = next(model.parameters()).device

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            result = forward(model)
        result.backward(dy)

    for measured in (False, True):
        peak = peak_bytes(step, device) if measured else step()
        for parameter in trained(model):
            parameter.grad = None
    return peak


def rows(name: str, tokens: int, rank: int, dropouts: list[float], device: torch.device) -> Iterator[dict]:
    """Yields the figures of one model, a dictionary for each setting."""
    build, default_tokens = MODELS[name]
    base, forward, dy = build(tokens or default_tokens, device)
    for dropout in dropouts:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=LINEARS)
        for setting in SETTINGS:
            model = peft.get_peft_model(base, config, autocast_adapter_dtype=setting.float32_adapters).train()
            peaks = {"PEFT": peak_of_step(model, forward, dy, setting.autocast)}
            lf.fuse_(model)
            peaks["ours"] = peak_of_step(model, forward, dy, setting.autocast)
            lf.unfuse_(model)
            base = model.unload()
            yield {
                "model": name,
                "tokens": tokens or default_tokens,
                "dropout": dropout,
                "setting": setting.label,
                **peaks,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=int, help=f"of a step (default 512; SmolLM2-135M: a multiple of {SEQ_LEN})")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    models.quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(
        title=f"Peak of a step beside the weights, r={options.rank}, {device.type}, torch {torch.__version__}"
    )
    for column in ("model", "tokens", "dropout", "bfloat16 base with", "PEFT, MiB", "ours, MiB", "PEFT / ours"):
        table.add_column(column, justify="right")
    results = []
    for name in options.model:
        for row in rows(name, options.tokens, options.rank, options.dropout, device):
            results.append(row)
            theirs, ours = row["PEFT"], row["ours"]
            cells = row["model"], str(row["tokens"]), f"{row['dropout']:g}", row["setting"]
            table.add_row(*cells, f"{theirs / MIB:.1f}", f"{ours / MIB:.1f}", f"{theirs / ours:.3f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
