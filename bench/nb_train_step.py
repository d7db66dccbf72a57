"""A training step of SmolLM2-135M with NB-LoRA over one with plain LoRA: same frozen weights, same text.

    python bench/nb_train_step.py                 # about two minutes on a CPU
    python bench/nb_train_step.py --pairs 12 --rank 8

The two take turns (AB, BA, …); the figure is the median of the ratios. The paper reports 1.07 to 1.25.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from rich.progress import track
from train_step import batches, spread, step_seconds

import lora_fast as lf
from lora_fast.cli.inputs import models


def build(rank: int, device: torch.device) -> dict[str, torch.nn.Module]:
    """NB-LoRA and plain LoRA over the same frozen weights."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = models.load_model(models.cached(models.PACKAGED, ""), dtype).to(device).train()
    bounded = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
    lf.inject_(plain, lf.LoRAConfig(r=rank, alpha=rank))
    lf.inject_(bounded, lf.NBLoRAConfig(r=rank))
    return {"NB-LoRA": bounded, "LoRA": plain}


def measure(rank: int, pairs: int, seq_len: int, batch: int, device: torch.device) -> dict:
    """Seconds a step of both, and NB-LoRA over LoRA pair by pair."""
    sides = build(rank, device)
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in sides.items()}
    optimizers = {name: torch.optim.AdamW(some, lr=1e-4, fused=True) for name, some in trained.items()}
    feed, seconds = batches(seq_len, batch, device), {name: [] for name in sides}
    for pair in track(range(pairs + 1), description="pairs of steps"):
        ids = next(feed)
        for name in sides if pair % 2 else reversed(sides):
            taken = step_seconds(sides[name], optimizers[name], ids)
            if pair:  # the first pair warms up
                seconds[name].append(taken)
    ratios = [bounded / plain for bounded, plain in zip(*seconds.values(), strict=True)]
    return {"seconds": seconds, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8, help="counted pairs of steps (default %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    models.quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(options.rank, options.pairs, options.seq_len, options.batch, device)
    ratio, low, high = spread(result["ratios"])
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"NB-LoRA / LoRA, r={options.rank}, {options.batch}×{options.seq_len} tokens, {place}: {ratio:.3f}", end=" ")
    print(f"(p20–p80 {low:.3f}–{high:.3f}), goal ≤ 1.05 on a CPU, ≤ 1.02 on a GPU")
    if options.json:
        options.json.write_text(json.dumps({"rank": options.rank, "device": place, **result}, indent=1))


if __name__ == "__main__":
    main()
