"""One training step of SmolLM2-135M on the King James text: PEFT against the same PEFT model fused.

    python bench/train_step.py                 # dropout 0 and 0.05
    python bench/train_step.py --pairs 20 --rank 8

Both engines share every parameter: the model is fused and unfused in place between steps, in alternating order (AB, BA,
AB, …), so that a machine whose speed drifts treats them alike. A step is forward, backward and AdamW, batch 2 × 256
tokens, float32 on a CPU and bfloat16 on a GPU.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lora_fast as lf
from lora_fast.cli.inputs import data, models

GOALS = {0.0: 1.08, 0.05: 1.05}  # PEFT's time over ours on 2 CPU cores


def build(rank: int, dropout: float, device: torch.device) -> torch.nn.Module:
    import peft

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = models.load_model(models.cached(models.PACKAGED, ""), dtype)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear")
    return peft.get_peft_model(model, config).to(device).train()


def batches(seq_len: int, batch: int, device: torch.device):
    """Endless (batch, seq_len) blocks of the text."""
    tokenizer = models.load_tokenizer(models.cached(models.PACKAGED, ""))
    path = data.locate(data.PACKAGED)
    ids = data.blocks(data.documents(path, data.read(path), tokenizer), tokenizer, seq_len).train.ids.to(device)
    while True:
        for first in range(0, len(ids) - batch, batch):
            yield ids[first : first + batch]


def step_seconds(model, optimizer, ids) -> float:
    """Wall time of one training step."""
    synchronize = torch.cuda.synchronize if ids.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - start


def measure(rank: int, dropout: float, pairs: int, seq_len: int, batch: int, device: torch.device) -> dict:
    """Seconds a step of each engine, and PEFT over ours pair by pair."""
    model = build(rank, dropout, device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    feed = batches(seq_len, batch, device)
    seconds = {"peft": [], "fused": []}
    for pair in track(range(pairs + 1), description=f"dropout {dropout:g}"):
        ids = next(feed)
        for engine in ("peft", "fused") if pair % 2 else ("fused", "peft"):
            switch = lf.fuse_ if engine == "fused" else lf.unfuse_
            switch(model, allow_empty=True)
            taken = step_seconds(model, optimizer, ids)
            if pair:  # the first pair warms up
                seconds[engine].append(taken)
    ratios = [peft / fused for peft, fused in zip(seconds["peft"], seconds["fused"], strict=True)]
    return {"dropout": dropout, "seconds": seconds, "ratios": ratios}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5)
    return statistics.median(values), cuts[0], cuts[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="counted pairs of steps (default %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    models.quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    tokens = f"{options.batch}×{options.seq_len} tokens"
    table = Table(title=f"SmolLM2-135M, r={options.rank}, {tokens}, {name}, torch {torch.__version__}")
    for column in ("dropout", "PEFT s/step", "ours s/step", "PEFT / ours (p20–p80)", "goal", "verdict"):
        table.add_column(column, justify="right")
    results = []
    for dropout in options.dropout:
        result = measure(options.rank, dropout, options.pairs, options.seq_len, options.batch, device)
        results.append(result)
        ratio, low, high = spread(result["ratios"])
        goal = GOALS.get(dropout)
        verdict = "" if goal is None else "met" if ratio >= goal else "missed"
        medians = [f"{statistics.median(result['seconds'][engine]):.3f}" for engine in ("peft", "fused")]
        table.add_row(f"{dropout:g}", *medians, f"{ratio:.3f} ({low:.3f}–{high:.3f})", goal and f"≥ {goal}", verdict)
    Console().print(table)
    if options.json:
        conditions = {"rank": options.rank, "tokens": tokens, "device": name, "torch": torch.__version__}
        options.json.write_text(json.dumps({**conditions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
