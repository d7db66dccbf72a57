"""Times generation by SmolLM2-135M after a prompt of the King James text, one token at a time with the KV cache.

    python bench/generate.py                          # batches of 1 and of 8, two minutes on a CPU
    python bench/generate.py --batch 1 --new-tokens 64 --rounds 16

transformers' ``generate`` decodes greedily, in float32 on a CPU and in bfloat16 on a GPU, with the base model without
adapters, with PEFT's model, and with that model fused. The models share the frozen weights and take turns, another one
first in each round, so that drift of the machine affects all alike. A ratio is the median of those of the rounds. The
adapters are random and change the text.

Before anything is timed, the fused model must decode the tokens of PEFT's. Where a sequence first differs, PEFT's own
logits of the two tokens must be equal up to ``TIE`` roundings.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_step import base_model, blocks, copies, in_turns, peft_model, quotients, shown_spread, trained, where
from transformers.generation.streamers import BaseStreamer

from lora_fast.cli.inputs import models
from lora_fast.measure.clock import Clock, Spread

ENGINES = {"PEFT": None, "ours": True}  # as train_step.copies takes them
BASE = "no adapters"
TIE = 16  # roundings of the largest logit


class Seconds(NamedTuple):
    """Seconds of one generation: until the first new token, for which the whole prompt is read, and for each later
    one."""

    first: float
    token: float


class Marks(BaseStreamer):
    """Marks the time at which ``generate`` has the prompt, and each new token."""

    def __init__(self, device: torch.device):
        self.clock = Clock(device)

    def put(self, value: Tensor) -> None:
        self.clock.mark()

    def end(self) -> None:
        pass


def decode(model: nn.Module, prompts: Tensor, new_tokens: int, **options) -> Any:
    """Returns what ``generate`` does for prompts (batch, n_tokens) of the same length, without an early end."""
    return model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, use_cache=True,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options,
    )  # fmt: skip


def decode_seconds(model: nn.Module, prompts: Tensor, new_tokens: int) -> Seconds:
    marks = Marks(prompts.device)
    decode(model, prompts, new_tokens, streamer=marks)
    _, first, *later = marks.clock.seconds()
    return Seconds(first, statistics.mean(later))


def check_tokens(sides: dict[str, nn.Module], prompts: Tensor, new_tokens: int) -> None:
    """Raises RuntimeError unless all of ``ENGINES`` decode the same tokens, up to ties."""
    results = {
        name: decode(sides[name], prompts, new_tokens, output_logits=True, return_dict_in_generate=True)
        for name in ENGINES
    }
    expected = results["PEFT"]
    for name, got in results.items():
        differs = got.sequences != expected.sequences
        for i in differs.any(1).nonzero().flatten().tolist():
            at = int(differs[i].int().argmax())
            logits = expected.logits[at - prompts.shape[1]][i]
            theirs, ours = logits[expected.sequences[i, at]], logits[got.sequences[i, at]]
            tie = TIE * torch.finfo(next(sides[name].parameters()).dtype).eps * logits.abs().max()
            if not theirs - ours <= tie:
                raise RuntimeError(
                    f"{name}: sequence {i} has another token at {at} than PEFT's, whose logits of the two are "
                    f"{float(theirs):.6g} and {float(ours):.6g}"
                )


def models_of(rank: int, device: torch.device) -> dict[str, nn.Module]:
    """Returns the base model without adapters, and a model for each of ``ENGINES``."""
    torch.manual_seed(0)
    model = peft_model(base_model(device), rank, 0.0).eval()
    for parameter in trained(model):
        nn.init.normal_(parameter, std=0.02)
    sides = copies(model, ENGINES)
    return {BASE: model.unload(), **sides}


def measure(sides: dict[str, nn.Module], prompts: Tensor, new_tokens: int, rounds: int) -> dict[str, list[Seconds]]:
    """Returns the seconds of each side, round by round."""
    check_tokens(sides, prompts, new_tokens)
    run = lambda side, ids: decode_seconds(side, ids, new_tokens)
    return in_turns(sides, itertools.repeat(prompts), rounds, f"batch {len(prompts)}", run)


def rows(measured: dict[str, list[Seconds]], batch: int) -> list[list[str]]:
    """Returns the cells of each side: batch, name, ms a token, tokens a second, ratio, and ms until the first
    token."""
    tokens = {name: [seconds.token for seconds in values] for name, values in measured.items()}
    cells = []
    for name, values in tokens.items():
        token, first = statistics.median(values), statistics.median(seconds.first for seconds in measured[name])
        ratio = "" if name == "PEFT" else shown_spread(Spread.of(quotients(tokens["PEFT"], values)))
        cells.append([str(batch), name, f"{1e3 * token:.1f}", f"{batch / token:.1f}", ratio, f"{1e3 * first:.0f}"])
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences that are decoded at a time")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=6, help="counted rounds (default %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    if options.new_tokens < 2:
        parser.error(f"--new-tokens: expected 2 or more, got {options.new_tokens}")
    models.quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompt = f"{options.new_tokens} tokens after {options.prompt_tokens}"
    conditions = f"r={options.rank}, {prompt}, {where(device)}"
    table = Table(title=f"SmolLM2-135M, {conditions}")
    for column in ("batch", "", "ms/token", "tokens/s", "PEFT / this (p20–p80)", "first ms"):
        table.add_column(column, justify="right" if column else "left")
    ids, sides, results = blocks(options.prompt_tokens, device), models_of(options.rank, device), []
    for batch in options.batch:
        measured = measure(sides, ids[:batch], options.new_tokens, options.rounds)
        seconds = {name: [value._asdict() for value in values] for name, values in measured.items()}
        results.append({"batch": batch, "seconds": seconds})
        for cells in rows(measured, batch):
            table.add_row(*cells)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
