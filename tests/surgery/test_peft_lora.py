"""inject_ takes a peft.LoraConfig: layers, scales and bits of get_peft_model with the same seed, or a named refusal."""

import copy

import numpy as np
import peft
import pytest
import torch
from tiny import assert_unchanged, batch, llama, snapshot
from torch import nn
from transformers import (
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_fast as lf

SUFFIXES = (".modules_to_save.default", ".base_layer", ".default.weight")
PREFIX = "base_model.model."
INITS = (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora")


def bare(name):
    for suffix in SUFFIXES:
        name = name.replace(suffix, "")
    return name.removeprefix(PREFIX)


def classifier():
    torch.manual_seed(0)
    config = llama().config
    config.pad_token_id, config.num_labels = 0, 3
    return LlamaForSequenceClassification(config)


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))


def both(build, **options):
    """Returns PEFT's model and ours after the same seed, with the report of ``inject_``."""
    options = {"r": 4, "lora_alpha": 8, **options}
    ours, base, config, seen = build(), build(), peft.LoraConfig(**options), peft.LoraConfig(**options)
    torch.manual_seed(3)
    report = lf.inject_(ours, config)
    state = torch.get_rng_state()
    assert config == seen, "the config has changed"
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options))
    assert torch.equal(torch.get_rng_state(), state)
    return theirs, ours, report


def assert_same_layers(theirs, ours):
    plain = {bare(name): layer for name, layer in theirs.named_modules() if isinstance(layer, peft.tuners.lora.Linear)}
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, lf.LoRALinear)}
    assert list(plain) == list(layers)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A, plain[name].lora_A["default"].weight), name
        assert torch.equal(layer.lora_B, plain[name].lora_B["default"].weight), name
        assert torch.equal(layer.weight, plain[name].base_layer.weight), name
        assert layer.lora_A.dtype == plain[name].lora_A["default"].weight.dtype
        assert layer.scaling == plain[name].scaling["default"]
    trained = [{bare(name) for name, p in model.named_parameters() if p.requires_grad} for model in (theirs, ours)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("init", INITS)
def test_initialisations_have_the_bits_of_peft(init, dtype):
    theirs, ours, _ = both(lambda: llama(dtype=dtype), init_lora_weights=init, target_modules=["q_proj", "up_proj"])
    assert_same_layers(theirs, ours)


SELECTIONS = {
    "all-linear": {"target_modules": "all-linear"},
    "default": {"target_modules": None},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "layers.0.mlp.gate_proj"]},
    "regex": {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*layers\.1.*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers-pattern": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1.*": 3},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 32},
        "use_rslora": True,
        "lora_dropout": 0.1,
    },
    "saved": {"target_modules": "all-linear", "modules_to_save": ["lm_head", "up_proj"]},
    "inference": {"target_modules": ["q_proj"], "inference_mode": True},
    "other-types": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [np.int64(1)],
        "use_rslora": 1,
        "runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    },
    "none": {"target_modules": ["q_proj"], "use_rslora": None},
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_selections_are_those_of_peft(case):
    theirs, ours, report = both(llama, **SELECTIONS[case])
    assert_same_layers(theirs, ours)
    named = {name for name, module in llama().named_modules() if isinstance(module, nn.Linear)}
    if case in ("all-linear", "excluded", "saved"):
        assert set(report.changed) | set(report.left) == named
    dropout = {layer.dropout_p for layer in ours.modules() if isinstance(layer, lf.LoRALinear)}
    assert dropout == {SELECTIONS[case].get("lora_dropout", 0.0)}


@pytest.mark.parametrize("build", [classifier, t5], ids=["classifier", "t5"])
def test_task_heads_and_default_targets_are_those_of_peft(build):
    task = "SEQ_CLS" if build is classifier else None
    theirs, ours, report = both(build, task_type=task)
    assert_same_layers(theirs, ours)
    assert ("score" in report.changed) == (build is classifier)


def test_report_names_what_the_config_leaves_out():
    options = {"target_modules": ["q_proj", "k_proj", "nothing"], "exclude_modules": ["layers.0.self_attn.k_proj"]}
    config = peft.LoraConfig(
        **options, layers_to_transform=[0], rank_pattern={"o_proj": 2}, modules_to_save=["decoder"]
    )
    report = lf.inject_(llama(), config)
    assert list(report.changed) == ["model.layers.0.self_attn.q_proj"]
    assert report.left == {
        "model.layers.0.self_attn.k_proj": "left out by exclude_modules",
        "model.layers.1.self_attn.q_proj": "left out by layers_to_transform",
        "model.layers.1.self_attn.k_proj": "left out by layers_to_transform",
        "nothing": "no module of this name",
        "o_proj": "a key of rank_pattern that matches no layer",
        "decoder": "no module of this name, for modules_to_save",
    }


def mixture():
    """Returns a model with a dense layer and a layer of experts, whose weights transformers 5 stacks."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, num_key_value_heads=2, **sizes, **experts))


MIXTURES = {
    "all-linear": "all-linear",
    "attention": ["q_proj", "o_proj"],
    "regex": r".*layers\.0\..*q_proj",
    "experts": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "regex of experts": r".*\.(q|gate|up|down)_proj",
    "router": ["q_proj", "gate"],
    "part of a parameter": ["q_proj", "gate_proj"],
}


@pytest.mark.parametrize("case", MIXTURES)
def test_experts_that_peft_adapts_are_refused_or_reported(case):
    model, config = mixture(), peft.LoraConfig(r=2, target_modules=MIXTURES[case])
    before, given = snapshot(model), copy.deepcopy(config)
    try:
        theirs = dict(peft.get_peft_model(mixture(), copy.deepcopy(config)).named_modules())
    except ValueError as error:
        if "Cannot convert" not in str(error):
            pytest.skip("PEFT 0.18 adapts no router")
        theirs = None
    layers = {bare(name) for name, m in (theirs or {}).items() if type(m) is peft.tuners.lora.Linear}
    parameters = {
        f"{bare(name)}.{m.parameter_name}" for name, m in (theirs or {}).items() if hasattr(m, "parameter_name")
    }
    if theirs is None or (parameters and case != "all-linear"):
        with pytest.raises(lf.ArgumentError, match="target_modules: expected names") as raised:
            lf.inject_(model, config)
        assert all(name in raised.value.got for name in parameters)
        assert_unchanged(model, before)
    else:
        report = lf.inject_(model, config)
        assert set(report.changed) == layers
        assert {name for name, reason in report.left.items() if reason.startswith("a parameter")} == parameters
        linear = {name for name, m in mixture().named_modules() if isinstance(m, nn.Linear)}
        assert case != "all-linear" or linear | parameters == report.changed.keys() | report.left.keys()
    assert config == given


def tied():
    return llama(tied=True)


def meta():
    with torch.device("meta"):
        return llama()


def small():
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))


REFUSALS = {
    "small-pissa": (small, {"init_lora_weights": "pissa", "target_modules": ["0", "1"], "r": 4}, "init_lora_weights"),
    "bias": (llama, {"bias": "all"}, "bias"),
    "lora-bias": (llama, {"lora_bias": True}, "lora_bias"),
    "replication": (llama, {"layer_replication": [(0, 2)]}, "layer_replication"),
    "parameters": (llama, {"target_parameters": ["q_proj.weight"]}, "target_parameters"),
    "tokens": (llama, {"trainable_token_indices": [1]}, "trainable_token_indices"),
    "eva": (llama, {"init_lora_weights": "eva"}, "init_lora_weights"),
    "unknown-init": (llama, {"init_lora_weights": "best"}, "init_lora_weights"),
    "odd-orthogonal": (llama, {"init_lora_weights": "orthogonal", "r": 3}, "init_lora_weights"),
    "tied-pissa": (tied, {"init_lora_weights": "pissa", "target_modules": ["lm_head"]}, "init_lora_weights"),
    "meta-pissa": (meta, {"init_lora_weights": "pissa"}, "init_lora_weights"),
    "tied-saved": (tied, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "rank-above-width": (llama, {"init_lora_weights": "pissa", "r": 65}, "init_lora_weights"),
    "bad-exclusion": (llama, {"exclude_modules": "*a"}, "exclude_modules"),
    "bad-pattern": (llama, {"rank_pattern": {"(": 1}}, "rank_pattern"),
    "no-dict": (llama, {"alpha_pattern": None}, "alpha_pattern"),
    "bad-layers": (llama, {"layers_to_transform": "1"}, "layers_to_transform"),
    "bad-layers-pattern": (llama, {"layers_to_transform": 1, "layers_pattern": "("}, "layers_pattern"),
    "saved-string": (llama, {"modules_to_save": "lm_head"}, "modules_to_save"),
    "saved-empty": (llama, {"modules_to_save": [""]}, "modules_to_save"),
    "rank": (llama, {"r": 257}, "r"),
    "pattern": (llama, {"rank_pattern": {"q_proj": 0}}, "r"),
    "alpha": (llama, {"lora_alpha": 0}, "lora_alpha"),
    "dropout": (llama, {"lora_dropout": 1.5}, "lora_dropout"),
    "no-layer": (llama, {"target_modules": ["q_prj"]}, "target_modules"),
    "no-default": (lambda: nn.Sequential(nn.Linear(4, 4)), {"target_modules": None}, "target_modules"),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, of configs that need more
@pytest.mark.parametrize("case", REFUSALS)
def test_inject_refuses_by_name_and_changes_nothing(case):
    build, options, argument = REFUSALS[case]
    model, config = build(), peft.LoraConfig(**{"target_modules": ["q_proj"], **options})
    before = snapshot(model) if case != "meta-pissa" else None
    with pytest.raises(lf.ArgumentError) as raised:
        lf.inject_(model, config)
    assert raised.value.argument == argument
    if before is not None:
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    "config",
    [peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), peft.AdaLoraConfig(total_step=3)],
    ids=["ia3", "adalora"],
)
def test_configs_of_other_tuners_are_refused(config):
    with pytest.raises(lf.ArgumentError, match=rf"config: expected a peft.LoraConfig.*got {type(config).__name__}"):
        lf.inject_(llama(), config)


def test_fields_that_a_later_peft_adds_are_no_obstacle_while_unset():
    config = peft.LoraConfig(target_modules=["q_proj"])
    field = copy.copy(type(config).__dataclass_fields__["use_dora"])
    field.name = "use_later"
    config.__dataclass_fields__ = type(config).__dataclass_fields__ | {"use_later": field}
    config.use_later = True
    with pytest.raises(lf.ArgumentError, match="use_later: expected its default, False"):
        lf.inject_(llama(), config)
    config.use_later = False
    assert len(lf.inject_(llama(), config).changed) == 2


def test_meta_models_take_initialisations_without_weights():
    model = meta()
    lf.inject_(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian"))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A.is_meta and layer.init == "gaussian"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_weights_that_an_initialisation_changes_are_saved_with_the_adapter(init, tmp_path):
    model = llama().eval()
    lf.inject_(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B.add_(0.1)
    report = lf.save_adapter(model, tmp_path)
    assert "4 weights saved whole" in report.note
    fresh = llama().eval()
    lf.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(batch()).logits, model(batch()).logits)


def test_modules_trained_whole_are_saved_with_the_adapter(tmp_path):
    model = classifier().eval()
    lf.inject_(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False))
    with torch.no_grad():
        model.score.weight.add_(1.0)
    lf.save_adapter(model, tmp_path)
    fresh = classifier().eval()
    lf.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(batch()).logits, model(batch()).logits)
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path).eval()
    torch.testing.assert_close(theirs(batch()).logits, model(batch()).logits)


def test_all_linear_adapts_the_head_of_a_classifier_as_peft_does_without_a_task():
    theirs, ours, report = both(classifier, target_modules="all-linear")
    assert_same_layers(theirs, ours)
    assert "score" in report.changed
