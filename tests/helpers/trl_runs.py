"""Small runs of TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import tiny_model
from paired_runs import Change, adapted, language_model, train
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SETTINGS: dict[str, Any] = {  # of every run
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
}
LINES = tiny_model.text(8).splitlines()
TEXTS = datasets.Dataset.from_list([{"text": line} for line in LINES])
PAIRS = datasets.Dataset.from_list(
    [{"prompt": line[:9], "chosen": line[9:20], "rejected": line[20:30]} for line in LINES]
)
CHATS = [[{"role": "user", "content": line[:9]}, {"role": "assistant", "content": line[9:20]}] for line in LINES]
MESSAGES = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS])
PROMPTS = datasets.Dataset.from_list([{"prompt": line[:9]} for line in LINES])
JUDGED = datasets.Dataset.from_list(
    [{"prompt": line[:9], "completion": line[9:20], "label": i % 2 == 0} for i, line in enumerate(LINES)]
)


def tokenizer() -> PreTrainedTokenizerFast:
    tokens = tiny_model.byte_tokenizer()
    tokens.chat_template = tiny_model.CHAT_TEMPLATE
    return tokens


def base(**changes) -> LlamaForCausalLM:
    """Returns a float64 model of one layer for the tokenizer. Large weights make its predictions uneven."""
    return language_model(len(tokenizer()), **changes)


def run(kind: Any, args: Any, change: Change, data: datasets.Dataset, **arguments) -> dict:
    """Trains ``base`` with adapters and a trainer of TRL, and returns what was logged and trained."""
    model = change(adapted(base()))
    return train(kind(model, args=args, train_dataset=data, processing_class=tokenizer(), **arguments))


def letters(completions: list, **others) -> list[float]:
    """Returns the rewards of completions: how many of their bytes are lower-case letters."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(sum(letter.islower() for letter in text)) for text in texts]


def options(folder: Path, **changes) -> dict[str, Any]:
    """Returns the arguments of a trainer's config."""
    return {"output_dir": str(folder), **SETTINGS, **changes}
