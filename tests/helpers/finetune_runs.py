"""Runs ``lora-fast finetune`` on a tiny model, and reads the files of a run."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

import peft
import tiny_model
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_fast.cli import app
from lora_fast.cli.inputs import data
from lora_fast.cli.output.terminal import Display

SEQ_LEN, STEPS = 32, 6


def invoke(place: Path, *options: object):
    """Runs the command on the tiny model and text. Later options override earlier ones."""
    inputs = ("--model", place / "model", "--data", place / "text.txt")
    base = (*inputs, "--seq-len", SEQ_LEN, "--steps", STEPS, "--rank", 4)
    return CliRunner().invoke(app, ["finetune", *map(str, (*base, *options))])


def resume(folder: Path, *options: object):
    """Runs the command with --resume on a folder."""
    return CliRunner().invoke(app, ["finetune", "--output", str(folder), "--resume", *map(str, options)])


def metrics(folder: Path) -> dict:
    """Returns the contents of a run's metrics.json."""
    return json.loads((folder / "metrics.json").read_text())


def held_out_loss_in_peft(place: Path, folder: Path) -> float:
    """Returns the held-out loss of a run's adapter, computed by PEFT's own layers."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokens = tokenized(place / "text.txt").held_out
    with torch.no_grad():
        loss = model(input_ids=tokens.ids, labels=tokens.labels).loss.item()
    # The Trainer of transformers 5.0 also counts the first label of a row, which has no loss.
    return loss * (SEQ_LEN - 1) / SEQ_LEN if transformers.__version__.startswith("5.0.") else loss


def tokenized(path: Path, seq_len: int = SEQ_LEN) -> data.TokenData:
    """Returns the blocks of a file, tokenized into bytes."""
    tokenizer = tiny_model.byte_tokenizer()
    return data.blocks(data.documents(path, data.read(path), tokenizer), tokenizer, seq_len)


def at_step(monkeypatch, step: int, act) -> list[int]:
    """Calls ``act`` when step ``step`` is done. Returns a list that each finished step is appended to."""
    show_step, steps = Display.step, []

    def show_step_and_act(self, number, *figures):
        show_step(self, number, *figures)
        steps.append(number)
        if number == step:
            act()

    monkeypatch.setattr(Display, "step", show_step_and_act)
    return steps


def same_result(left: Path, right: Path) -> None:
    """Asserts that two runs have the same losses and adapters, to the last bit."""
    left_run, right_run = (metrics(folder)["runs"]["fused"] for folder in (left, right))
    assert left_run["losses"] == right_run["losses"]
    assert left_run["held_out"] == right_run["held_out"]
    a, b = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (left, right))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Page(html.parser.HTMLParser):
    """Parses a page into its ids, its addresses and its text. Fails if a tag is not closed in order."""

    VOID = ("meta", "br", "link", "img", "path", "use")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.addresses, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if not name.startswith("xmlns") and "//" in (value or "")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, words):
        self.words.append(words)


def refused(result, *fragments: str) -> None:
    """Asserts that the command ended with exit code 2 and a message of these fragments, without a traceback."""
    message = " ".join(result.output.split())
    assert result.exit_code == 2, message
    assert isinstance(result.exception, SystemExit)
    for fragment in fragments:
        assert fragment in message, message


def gpt2(folder: Path) -> None:
    """Writes a tiny model whose layers are Conv1D."""
    letters = tiny_model.byte_tokenizer()
    letters.save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=len(letters), n_embd=16, n_layer=1, n_head=1, eos_token_id=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
