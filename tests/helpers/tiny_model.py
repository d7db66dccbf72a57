"""A tiny random Llama with a byte-level tokenizer, made in a second, and a text for it: no download, no network."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>\n{% endfor %}"


def save(folder: Path, chat_template: str | None = None) -> Path:
    """Writes model and tokenizer into ``folder``."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    model(len(tokenizer)).save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and <end>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def model(vocab_size: int, **changes) -> LlamaForCausalLM:
    """Two layers of width 32 with random weights, the same at each call."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=128, **(shape | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def text(lines: int = 60) -> str:
    """Lines with something to learn."""
    return "".join(f"{i} green bottles hanging on the wall, take {i % 7} away.\n" for i in range(lines))
