"""Creates a tiny random Llama with a byte-level tokenizer, and a text for it, without a network."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>\n{% endfor %}"


def save(folder: Path, chat_template: str | None = None) -> Path:
    """Writes the model and the tokenizer into ``folder``, and returns it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    model(len(tokenizer)).save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each byte, and <end>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def model(vocab_size: int, **changes) -> LlamaForCausalLM:
    """Returns a model of two layers of width 32 with random weights, which are the same at each call."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=128, **(shape | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def text(lines: int = 60) -> str:
    """Returns lines that follow a pattern, so that a model can learn something."""
    return "".join(f"{i} green bottles hanging on the wall, take {i % 7} away.\n" for i in range(lines))
