"""The models that bench/train_step.py and bench/experts_step.py compare, and the counts of bench/operators.py."""

import experts_step
import operators
import pytest
import torch
import train_step
from transformers import LlamaConfig, LlamaForCausalLM

from lora_fast.layers.fused_experts import FusedParamWrapper

CPU = torch.device("cpu")
IDS = torch.arange(32, dtype=torch.int64).view(2, 16)


def losses(sides) -> dict[str, float]:
    """Returns the loss of each side after a step from random factors, the same for all sides of an adapter."""
    results = {}
    for name, side in sides.items():
        torch.manual_seed(0)
        for parameter in train_step.trained(side.model):
            torch.nn.init.uniform_(parameter, 0.01, 0.02)
        train_step.step_seconds(side, IDS)
        with torch.no_grad():
            results[name] = side.model(input_ids=IDS, labels=IDS).loss.item()
    return results


def test_sides_of_dora_train_alike():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    sides = train_step.dora_sides(4, 0.0, LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)))
    assert set(sides) == {name for pair in train_step.DORA_RATIOS for name in pair}
    found = losses(sides)
    for adapter in ("LoRA", "DoRA"):
        assert found[f"fused {adapter}"] == pytest.approx(found[f"PEFT {adapter}"], abs=1e-5)
    assert abs(found["PEFT DoRA"] - found["PEFT LoRA"]) > 1e-4  # the magnitudes are trained, too
    assert len({side.model.get_output_embeddings().weight.data_ptr() for side in sides.values()}) == 1


def test_sides_of_experts_train_alike():
    sides = experts_step.sides(experts_step.base_model(4, 2, 1, CPU), 4, ["eager", "grouped_mm"])
    assert list(sides) == ["PEFT eager", "PEFT grouped_mm", experts_step.OURS]
    found = losses(sides)
    assert max(found.values()) - min(found.values()) < 1e-4
    wrappers = [each for each in sides[experts_step.OURS].model.modules() if isinstance(each, FusedParamWrapper)]
    assert len(wrappers) == 2 and all(wrapper.fallback_reason is None for wrapper in wrappers)


def test_operators_count_operands_once_and_no_views():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with operators.Operators() as counted:
        product = (a @ b).t()  # reads 6 and 12, writes 8
        product.copy_(torch.ones(1, 1).expand(4, 2))  # writes 8, reads the one number
    assert counted.count == 3 and counted.bytes == 4 * (6 + 12 + 8 + 1 + 8 + 1)  # torch.ones writes one
