"""Times training steps of a small Qwen3-MoE with LoRA adapters on its experts: PEFT's ``target_parameters`` by each of
transformers' experts implementations, and the same PEFT model fused, in turns.

    python bench/experts_step.py                                # 16 and 64 experts
    python bench/experts_step.py --experts 64 --top-k 4 --pairs 20
    python bench/experts_step.py --implementations eager grouped_mm batched_mm --experts 16

A step is forward, backward and AdamW on 2 × 256 random tokens, in float32 on a CPU and in bfloat16 on a GPU. The model
has the proportions of Qwen3-30B-A3B at a quarter of its widths, two layers and random weights. ``gate_up_proj`` and
``down_proj`` of all experts have adapters, and nothing else does. The models share the frozen weights and take turns.
The first round is not counted. The goal is for PEFT's fastest implementation. ``batched_mm`` copies the weights of an
expert for every token that is routed to it, which takes gigabytes.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from train_step import Side, batches, between, copies, in_turns, peft_model, row, show, step_seconds, trained, where
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lora_fast.cli.inputs import models

GOAL = 1.5  # PEFT's time over ours, at least, on 2 CPU cores
OURS, VOCABULARY, BLOCKS = "ours", 1024, 64
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")  # of transformers
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def base_model(experts: int, top_k: int, layers: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64}
    routing = {"num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": True}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1536, "moe_intermediate_size": 192}
    config = Qwen3MoeConfig(**sizes, **heads, **routing, num_hidden_layers=layers)
    return Qwen3MoeForCausalLM(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def sides(base: nn.Module, rank: int, implementations: list[str]) -> dict[str, Side]:
    """Returns PEFT's model with each of transformers' experts implementations, and the same model fused."""
    model = peft_model(base, rank, 0.0, target_modules=[], target_parameters=PARAMETERS)
    engines: dict[str, bool | None] = {f"PEFT {name}": None for name in implementations} | {OURS: True}
    made = copies(model, engines)
    for name in implementations:
        made[f"PEFT {name}"].get_base_model().set_experts_implementation(name)
    return {name: Side(side, torch.optim.AdamW(trained(side), lr=1e-4)) for name, side in made.items()}


def random_tokens(seq_len: int, device: torch.device) -> Tensor:
    return torch.randint(VOCABULARY, (BLOCKS, seq_len), generator=torch.Generator().manual_seed(0)).to(device)


def comparisons(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[dict, list[str]]]:
    """Yields the figures of each number of experts and implementation, and its row of the table."""
    ids = random_tokens(options.seq_len, device)
    for experts in options.experts:
        made = sides(base_model(experts, options.top_k, options.layers, device), options.rank, options.implementations)
        feed = batches(ids, options.batch)
        seconds = in_turns(made, feed, options.pairs, f"{experts} experts", step_seconds)
        theirs = [name for name in seconds if name != OURS]
        fastest = min(theirs, key=lambda name: statistics.median(seconds[name]))
        for name in theirs:
            result, label = between(seconds, name, OURS), f"{experts} experts, {name} / {OURS}"
            cells = row(result, label, "≥", GOAL if name == fastest else None)
            yield {"experts": experts, "fastest": name == fastest, **result}, cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64], help="experts of a layer")
    parser.add_argument("--top-k", type=int, default=8, help="experts of a token (default %(default)s)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=["eager", "grouped_mm"])
    parser.add_argument("--pairs", type=int, default=12, help="counted rounds of steps (default %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    models.quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    conditions = f"top {options.top_k}, r={options.rank}, {options.batch}×{options.seq_len} tokens, {where(device)}"
    title = f"Qwen3-MoE, {options.layers} layers of 512 columns, {conditions}"
    show(title, conditions, comparisons(options, device), options.json)


if __name__ == "__main__":
    main()
