"""``lora-fast finetune`` and ``profile`` with DoRA and with adapters on experts: both engines, bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from finetune_runs import held_out_loss_in_peft, invoke, metrics, refused

from lora_fast.cli.finetune.next_steps import next_command
from lora_fast.cli.inputs.settings import Settings
from lora_fast.cli.profile import engines

pytestmark = [pytest.mark.usefixtures("unrendered"), pytest.mark.filterwarnings("ignore::FutureWarning")]
PARAMETERS = "experts.gate_up_proj,experts.down_proj"


@pytest.fixture(scope="module")
def mixture(place, tmp_path_factory) -> Path:
    """A folder like ``place`` whose model is a mixture of experts."""
    folder = tmp_path_factory.mktemp("mixture") / "place"
    shutil.copytree(place, folder)
    vocabulary = transformers.AutoConfig.from_pretrained(place / "model").vocab_size
    routing = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen3MoeConfig(vocab_size=vocabulary, max_position_embeddings=128, **size, **routing)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
    return folder


def test_engines_train_dora_alike(place, tmp_path):
    result = invoke(place, "--output", tmp_path / "out", "--compare", "--dora", "--lr", 0.01, "--steps", 4)
    assert result.exit_code == 0, result.output
    figures = metrics(tmp_path / "out")
    assert figures["runs"]["fused"]["layers"] == "fused 14 layers"
    assert figures["comparison"]["max_loss_difference"] < 1e-5
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "out/fused/adapter")).use_dora


def test_engines_train_experts_alike(mixture, tmp_path):
    options = ("--compare", "--target-parameters", PARAMETERS, "--lr", 0.01, "--steps", 4)
    result = invoke(mixture, "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    figures = metrics(tmp_path / "out")
    assert figures["runs"]["fused"]["layers"].startswith("fused")
    assert figures["runs"]["fused"]["saved_bytes"] < figures["runs"]["eager"]["saved_bytes"]
    assert figures["comparison"]["max_loss_difference"] < 1e-5
    adapter = tmp_path / "out/fused"
    trained = figures["runs"]["fused"]["held_out"][-1][1]
    assert held_out_loss_in_peft(mixture, adapter) == pytest.approx(trained, abs=1e-5)


def test_the_next_commands_have_the_adapters_options():
    settings = Settings(dora=True, target_parameters=PARAMETERS, steps=4)
    words = next_command(settings, *Settings().method).split()
    assert words == ["lora-fast", "finetune", "--target-parameters", PARAMETERS, "--dora", "--steps", "4", "--compare"]
    words = next_command(Settings(dora=True, compare=True), *Settings().method).split()
    assert words[:3] == ["lora-fast", "finetune", "--dora"] and "your_text.txt" in words


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--target-parameters", "experts.gate"), "--target-parameters: expected some of experts.gate_up_proj"),
        (("--target-parameters", "a,,b"), "--target-parameters: expected parameter names separated by commas"),
        (("--target-parameters", PARAMETERS, "--dora"), "--dora: expected plain LoRA with --target-parameters"),
        (("--target-parameters", PARAMETERS, "--dropout", 0.1), "--dropout: expected 0 with --target-parameters"),
        (("--dora",), "--targets: expected parts of the model that PEFT adapts with these options, got"),
        (("--dora", "--method", "nb-lora"), "--dora: expected a method that trains PEFT's adapters"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused_by_name(mixture, options, expected):
    refused(invoke(mixture, *options), expected)


def test_profile_builds_both_engines_of_dora(place):
    built = engines.build(Settings(rank=4, dora=True), str(place / "model"), torch.float32, compiled=False)
    for label in (engines.EAGER, engines.FUSED):
        assert any("lora_magnitude_vector" in name for name, _ in built.by_label[label].model.named_parameters())
    assert len(built.fusing.changed) == 14
