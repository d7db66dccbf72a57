"""bench/generate.py with a tiny random model: the tokens of all sides, the figures, and the table."""

import json
import sys

import generate
import pytest
import torch
import train_step
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fast as lf

DEVICE = torch.device("cpu")


def tiny_model(device: torch.device) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(device)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4, 5), generator=generator)
    monkeypatch.setattr(generate, "base_model", tiny_model)
    monkeypatch.setattr(generate, "blocks", lambda seq_len, device: ids)
    return ids


def test_program_prints_each_side_and_writes_its_figures(monkeypatch, tmp_path, capsys):
    file = tmp_path / "figures.json"
    arguments = ["--batch", "1", "3", "--new-tokens", "3", "--rounds", "2", "--rank", "4", "--json"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments, str(file)])
    generate.main()
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())["results"]
    assert [result["batch"] for result in results] == [1, 3]
    for result in results:
        assert list(result["seconds"]) == [generate.BASE, *generate.ENGINES]
        for name, rounds in result["seconds"].items():
            assert name in printed
            assert len(rounds) == 2 and all(seconds["first"] > 0 and seconds["token"] > 0 for seconds in rounds)


def test_sides_are_fused_as_named_and_share_the_frozen_weights(tiny):
    sides = generate.models_of(4, DEVICE)
    generate.check_tokens(sides, tiny, 3)
    assert lf.groups(sides["ours"]).groups
    heads = {side.get_output_embeddings().weight.data_ptr() for side in sides.values()}
    assert len(heads) == 1


def test_another_token_than_pefts_is_an_error(tiny):
    sides = generate.models_of(4, DEVICE)
    for parameter in train_step.trained(sides["ours"]):
        torch.nn.init.normal_(parameter)
    with pytest.raises(RuntimeError, match=r"ours: sequence \d has another token at \d+ than PEFT's"):
        generate.check_tokens(sides, tiny, 8)
