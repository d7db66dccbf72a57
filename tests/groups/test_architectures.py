"""Layers that share an input in 31 architectures of transformers: which of them are groups, and training with them. By
default ten are trained for 20 steps and the others for three, with ``-m budget`` these for 20 too.

``GROUPS`` is written by hand from the models' code. The test holds it to plain PEFT models, whose layers report the
tensors that they get, and fused models to it.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from architectures import ARCHITECTURES, Batch, loss_of
from budget import check, error
from fused_models import fused_layers
from peft.tuners import lora
from side_by_side import inject, train
from torch import Tensor, nn

import lora_fast as lf

STEPS, FEW, RATE = 20, 3, 1e-3  # from the second step on a group is one node
INJECTED = ("bart", "bert", "granite")  # trained once more with the layers of lf.inject_
TRAINED = (*INJECTED, "deberta", "funnel", "mixtral", "recurrent_gemma", "segformer", "t5", "wav2vec2")
UNIT = torch.finfo(torch.float32).eps
QKV = ("q_proj", "k_proj", "v_proj")
SPELT = ("query", "key", "value")
GATE_UP = ("gate_proj", "up_proj")
# Each row names a parent by the end of its name, then its layers that get one tensor, in the order of their calls.
GROUPS: dict[str, list[tuple[str, ...]]] = {
    "albert": [("attention", *SPELT)],
    "bart": [("self_attn", *QKV), ("encoder_attn", "k_proj", "v_proj")],  # there q reads the decoder's states
    "bert": [("self", *SPELT)],
    "bigbird": [("self", *SPELT)],
    "bloom": [],  # one projection
    "clip": [("self_attn", *QKV)],
    "codegen": [],  # one projection
    "deberta": [
        ("self", "query_proj", "key_proj", "value_proj"),
        ("self", "pos_key_proj", "pos_query_proj"),  # of the relative positions
    ],
    "esm": [("self", *SPELT)],
    "funnel": [
        ("encoder.blocks.0.0.attention", "q_head", "k_head", "v_head"),
        ("encoder.blocks.1.0.attention", "k_head", "v_head"),  # q reads pooled states
        ("decoder.layers.0.attention", "q_head", "k_head", "v_head"),
    ],
    "gemma2": [("self_attn", *QKV), ("mlp", *GATE_UP)],
    "gpt_neox": [],  # one projection
    "gptj": [("attn", *QKV)],  # fc_in reads the same tensor, but has another parent
    "granite": [("self_attn", *QKV), ("mlp", *GATE_UP)],
    "mixtral": [("self_attn", *QKV)],  # experts are parameters
    "mpnet": [("attn", "q", "k", "v")],
    "nystromformer": [("self", *SPELT)],
    "opt": [("self_attn", *QKV)],
    "phi": [("self_attn", *QKV)],
    "qwen2_moe": [("self_attn", *QKV), ("shared_expert", *GATE_UP)],
    "recurrent_gemma": [
        ("temporal_block", *QKV),
        ("temporal_block", "linear_y", "linear_x"),
        ("mlp_block", *GATE_UP),
    ],
    "rwkv": [],  # key, value and receptance read different mixtures of two tokens
    "segformer": [
        ("stages.0.blocks.0.attention", "k_proj", "v_proj"),  # of a smaller image than q
        ("stages.1.blocks.0.attention", *QKV),
    ],
    "swin": [("attention", *QKV)],
    "t5": [("SelfAttention", "q", "k", "v"), ("EncDecAttention", "k", "v")],
    "vit": [("attention", *QKV)],
    "wav2vec2": [("attention", *QKV)],
    "whisper": [("self_attn", *QKV), ("encoder_attn", "k_proj", "v_proj")],
    "xlnet": [],  # q, k and v are parameters
    "xmod": [("self", *SPELT)],
    "yoso": [("self", *SPELT)],
}
EARLIER_NAMES = {  # in transformers 5.0
    "segformer": [("block.0.0.attention.self", "key", "value"), ("block.1.0.attention.self", *SPELT)],
    "swin": [("attention.self", *SPELT)],
    "vit": [("attention.attention", "key", "value", "query")],
}


def expected_groups(name: str, model: nn.Module) -> list[tuple[str, ...]]:
    """Returns the groups of an architecture's table as names of the model's modules, sorted."""
    modules = [module for module, _ in model.named_modules()]
    for rows in (GROUPS[name], EARLIER_NAMES.get(name, [])):
        groups = [_groups_of_row(modules, *row) for row in rows]
        if all(groups):
            return sorted(group for groups_of_row in groups for group in groups_of_row)
    raise AssertionError(f"{name}: the table names layers that the model does not have")


def _groups_of_row(modules: list[str], ending: str, *children: str) -> list[tuple[str, ...]]:
    parents = [module for module in modules if f".{module}".endswith(f".{ending}")]
    groups = [tuple(f"{parent}.{child}" for child in children) for parent in parents]
    return [group for group in groups if set(group) <= set(modules)]


def observed_groups(model: peft.PeftModel, batch: Batch) -> list[tuple[str, ...]]:
    """Returns the names of PEFT's layers that get one tensor, unchanged, from one parent in a forward, sorted."""
    calls: dict[tuple, list[str]] = {}
    inputs = []  # kept, so that no other tensor gets the identity of one that is gone

    def note(name: str, x: Tensor) -> None:
        inputs.append(x)
        calls.setdefault((name.rpartition(".")[0], id(x), x._version), []).append(name)

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, lora.Linear)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: note(name, args[0])) for name, layer in layers
    ]
    model.base_model.model(**batch)
    for hook in hooks:
        hook.remove()
    return sorted({tuple(names) for names in calls.values() if len(names) > 1})


def losses(model: nn.Module, batch: Batch, steps: int) -> Tensor:
    """Returns the losses of a training by AdamW."""
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def loss(_: nn.Module, step: int) -> Tensor:
        torch.manual_seed(step)  # for dropout that is no module
        return loss_of(inner(**batch))

    return torch.tensor(train(model, steps, optimizer, loss), dtype=torch.float64)


def nudge(model: peft.PeftModel) -> None:
    """Makes PEFT's layers round otherwise: their outputs, and the gradients of these, are multiplied by 1 or by one
    unit in the last place more or less."""
    generator = torch.Generator().manual_seed(0)
    multiply = lambda layer, args, y: y * (1 + UNIT * torch.randint(-1, 2, y.shape, generator=generator))
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            layer.register_forward_hook(multiply)


CASES = [(name, STEPS if name in TRAINED else FEW) for name in ARCHITECTURES]
CASES += [pytest.param(name, STEPS, marks=pytest.mark.budget) for name in ARCHITECTURES if name not in TRAINED]


@pytest.mark.parametrize("name, steps", CASES)
def test_groups_and_losses_are_those_of_the_architecture(name, steps):
    """The losses may differ from PEFT's by as much as those of PEFT's layers with other roundings, and 8 units in the
    last place (budget.py)."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(1)
    batch = architecture.batch()
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain = peft.get_peft_model(architecture.build(), config).train()
    nudged, fused = copy.deepcopy(plain), copy.deepcopy(plain)  # before a forward, of which some models keep tensors
    ours = [fused, inject(copy.deepcopy(plain))] if name in INJECTED else [fused]
    nudge(nudged)
    lf.fuse_(fused)
    theirs = losses(plain, batch, steps)
    assert theirs[-1] < theirs[0]
    rounding = error(losses(nudged, batch, steps), theirs)
    assert observed_groups(plain, batch) == expected_groups(name, plain)
    for model in ours:
        check(name, losses(model, batch, steps), theirs, rounding, torch.float32)
        assert sorted(lf.groups(model).groups) == expected_groups(name, model)
    assert all(layer.fallback_reason is None for layer in fused_layers(fused))
