"""inject_: which layers are replaced, which are left alone and why, and that errors change nothing."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    COPIES,
    ShardedTensor,
    assert_same_tensors,
    assert_unchanged,
    batch,
    fill,
    injected_llama,
    llama,
    peft_llama,
    snapshot,
)
from torch import nn

import lora_fast as lf

LLAMA_LINEARS = 14  # in two layers


class QuantLinear(nn.Linear):
    """Stands for bitsandbytes' layers: a subclass with its own forward."""


class Zoo(nn.Module):
    """A model with one layer of every kind that inject_ cannot replace, and a plain one."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.quant = QuantLinear(8, 8)
        self.convolution = nn.Conv1d(8, 8, 1)
        self.embedding = nn.Embedding(8, 8)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, output: output)
        self.patched = nn.Linear(8, 8)
        self.patched.forward = lambda x: x
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.sharded = nn.Linear(8, 8)
        self.sharded.weight = nn.Parameter(torch.zeros(8, 8).as_subclass(ShardedTensor))
        self.integer = nn.Linear(8, 8)
        self.integer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8)
        self.injected = lf.LoRALinear(8, 8, r=2, alpha=2)


ZOO_REASONS = {
    "quant": "subclass of torch.nn.Linear",
    "convolution": "Conv1d, not torch.nn.Linear",
    "hooked": "hooks",
    "patched": "replaced forward",
    "parametrized": "parametrized",
    "sharded": "ShardedTensor",
    "integer": "torch.int8",
    "encoder.linear1": "TransformerEncoderLayer",
    "encoder.self_attn.out_proj": "NonDynamicallyQuantizableLinear",
    "injected": "already a LoRALinear",
}


def test_inject_reports_every_layer():
    model = llama()
    report = lf.inject_(model, lf.LoRAConfig(r=4))
    assert len(report.changed) == LLAMA_LINEARS
    assert all(isinstance(model.get_submodule(name), lf.LoRALinear) for name in report.changed)
    assert str(report) == "injected 14 layers; left 1: lm_head (output embeddings)"


def test_inject_trains_the_adapters_only():
    model = llama()
    lf.inject_(model, lf.LoRAConfig(r=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    assert len(trained) == 2 * LLAMA_LINEARS


def test_inject_starts_as_the_model_was():
    model = llama()
    weights, logits = dict(model.named_parameters()), model(batch()).logits
    lf.inject_(model, lf.LoRAConfig(r=4))
    assert torch.equal(model(batch()).logits, logits)
    assert all(parameter is weights[name] for name, parameter in model.named_parameters() if name in weights)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        ["model.layers.0.self_attn.q_proj"],
        ["layers.1.mlp.up_proj", "lm_head"],
        r".*\.(k|o)_proj",
    ],
    ids=["all-linear", "suffixes", "full-name", "part-names", "regex"],
)
def test_inject_targets_the_modules_that_peft_targets(targets):
    report = lf.inject_(llama(), lf.LoRAConfig(r=4, target_modules=targets))
    peft = get_peft_model(llama(), LoraConfig(r=4, target_modules=targets))
    assert set(report.changed) == set(peft.targeted_module_names)


@pytest.mark.parametrize("targets", ["all-linear", "(?!injected).*"], ids=["all-linear", "regex"])
def test_inject_leaves_layers_that_it_cannot_replace(targets):
    model = Zoo()
    report = lf.inject_(model, lf.LoRAConfig(r=2, target_modules=targets))
    assert list(report.changed) == ["plain"]
    for name, reason in ZOO_REASONS.items():
        if name != ("convolution" if targets == "all-linear" else "injected"):
            assert reason in report.left[name], name


def test_report_names_targets_without_a_module():
    report = lf.inject_(llama(), lf.LoRAConfig(r=4, target_modules=["q_proj", "wi"]))
    assert report.left == {"wi": "no module of this name"}


def test_inject_replaces_a_shared_module_everywhere():
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model["again"] = model["first"]
    report = lf.inject_(model, lf.LoRAConfig(r=2))
    assert list(report.changed) == ["first", "other"]
    assert model["again"] is model["first"] and isinstance(model["again"], lf.LoRALinear)


def test_inject_again_keeps_the_first_adapters():
    model = injected_llama(target_modules=["q_proj"])
    first = model.model.layers[0].self_attn.q_proj
    report = lf.inject_(model, lf.LoRAConfig(r=2))
    assert len(report.changed) == LLAMA_LINEARS - 2
    assert model.model.layers[0].self_attn.q_proj is first and first.lora_A.requires_grad


def test_inject_works_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    lf.inject_(model, lf.LoRAConfig(r=2))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    assert model(torch.ones(1, 8)).isfinite().all() and model[0].lora_A.abs().sum() > 0


def test_inject_with_allow_empty_accepts_no_layer():
    model = llama()
    before = snapshot(model)
    report = lf.inject_(model, lf.LoRAConfig(target_modules=["nothing"]), allow_empty=True)
    assert not report.changed
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("build", "config", "says"),
    [
        (llama, lf.LoRAConfig(target_modules=["q_prj"]), ["target_modules", "q_proj", "q_prj"]),
        (llama, lf.LoRAConfig(target_modules="q_proj"), ["target_modules", "regular expression"]),
        (llama, lf.LoRAConfig(target_modules=["embed_tokens"]), ["Embedding, not torch.nn.Linear"]),
        (lambda: nn.Sequential(QuantLinear(8, 8)), lf.LoRAConfig(), ["QuantLinear, a subclass"]),
        (lambda: nn.Sequential(nn.ReLU()), lf.LoRAConfig(), ["no torch.nn.Linear"]),
        (lambda: nn.Linear(8, 8), lf.LoRAConfig(), ["model", "LoRALinear.from_linear"]),
        (peft_llama, lf.LoRAConfig(), ["model", "lf.fuse_"]),
        (injected_llama, lf.LoRAConfig(), ["already a LoRALinear"]),
        (llama, {"r": 4}, ["config", "lf.LoRAConfig", "dict"]),
    ],
    ids=["typo", "no-full-match", "embedding", "quantised", "no-linear", "a-linear", "peft", "twice", "not-a-config"],
)
def test_inject_refuses_and_changes_nothing(build, config, says):
    model = build()
    before = snapshot(model)
    with pytest.raises(lf.ArgumentError) as raised:
        lf.inject_(model, config)
    assert all(part in str(raised.value) for part in says), raised.value
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "act", [lambda m: lf.inject_(m, lf.LoRAConfig()), lf.fuse_, lf.unfuse_, lf.merge_, lf.unmerge_]
)
def test_surgery_refuses_objects_that_are_no_modules(act):
    with pytest.raises(lf.ArgumentError, match=r"model: expected a torch.nn.Module, got list"):
        act([nn.Linear(8, 8)])


def test_failure_while_building_changes_nothing(monkeypatch):
    model = llama()
    before, build, built = snapshot(model), lf.LoRALinear.from_linear, []

    def fail_at_the_third(*args, **kwargs):
        if len(built) == 2:
            raise MemoryError
        built.append(build(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(lf.LoRALinear, "from_linear", fail_at_the_third)
    with pytest.raises(MemoryError):
        lf.inject_(model, lf.LoRAConfig(r=4))
    assert_unchanged(model, before)


@pytest.mark.parametrize("move", [*COPIES, "state_dict"])
def test_injected_model_survives_copies(move):
    model = injected_llama(dropout=0.1).eval()
    if move in COPIES:
        twin = COPIES[move](model)
    else:
        twin = injected_llama(seed=5, dropout=0.1).eval()
        twin.load_state_dict(model.state_dict())
    assert_same_tensors(twin.state_dict(), model.state_dict())
    assert torch.equal(twin(batch()).logits, model(batch()).logits)


def test_dropout_is_active_in_training_only():
    model = injected_llama(dropout=0.5)
    assert not torch.equal(model(batch()).logits, model(batch()).logits)
    model.eval()
    assert torch.equal(model(batch()).logits, model(batch()).logits)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = fill(injected_llama(dropout=0.2).train())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(input_ids=batch(), labels=batch()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_same_tensors(*gradients)


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bars(monkeypatch) -> list[dict]:
    """A list that gets the options of each tqdm bar and how many items it counted."""
    calls = []

    def counting(items, **options):
        calls.append(options | {"done": 0})
        for item in items:
            yield item
            calls[-1]["done"] += 1

    monkeypatch.setattr("tqdm.tqdm", counting)
    return calls


def test_progress_bar_counts_the_layers(bars):
    lf.inject_(llama(), lf.NBLoRAConfig(r=2, bound_ratio=0.1))
    (bar,) = bars
    assert bar["done"] == LLAMA_LINEARS and bar["delay"] == 2 and not bar["leave"] and bar["unit"] == "layer"


def test_progress_off_and_loading_show_no_bar(bars, tmp_path):
    model = llama()
    lf.inject_(model, lf.NBLoRAConfig(r=2), progress=False)
    lf.save_adapter(model, tmp_path)
    lf.load_adapter(llama(), tmp_path)
    assert not bars


def test_inject_works_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(lf.inject_(llama(), lf.LoRAConfig(r=2)).changed) == LLAMA_LINEARS
