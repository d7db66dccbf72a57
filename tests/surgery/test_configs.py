"""The configs of inject_ refuse bad settings."""

import copy
import dataclasses
import pickle

import pytest

import lora_fast as lf


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"r": 0}, "r"),
        ({"r": 257}, "r"),
        ({"r": 4.0}, "r"),
        ({"r": True}, "r"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.5}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj", 3]}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": "*proj"}, "target_modules"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"init": "zero"}, "init"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(next(iter(value.items()))),
)
def test_lora_config_refuses_bad_settings(settings, argument):
    with pytest.raises(lf.ArgumentError) as raised:
        lf.LoRAConfig(**settings)
    assert raised.value.argument == argument


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("norm", {"norm": "l2"}),
        ("bound", {"bound": 0.0}),
        ("bound", {"bound": float("nan")}),
        ("bound_ratio", {"bound_ratio": -1.0}),
        ("bound_ratio", {"bound_ratio": 1.0, "bound": 1.0}),
        ("target_modules", {"target_modules": []}),
    ],
    ids=str,
)
def test_nb_lora_config_refuses_bad_settings(name, settings):
    with pytest.raises(lf.ArgumentError, match=rf"^{name}: expected .+, got "):
        lf.NBLoRAConfig(**settings)


def test_configs_take_peft_names():
    config = lf.LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.1, init_lora_weights="gaussian")
    assert config == lf.LoRAConfig(r=4, alpha=8, dropout=0.1, init="gaussian")
    assert lf.LoRAConfig(init_lora_weights=True).init == "kaiming"
    assert lf.NBLoRAConfig(lora_dropout=0.1) == lf.NBLoRAConfig(dropout=0.1)
    assert lf.SingLoRAConfig(lora_alpha=8, lora_dropout=0.1) == lf.SingLoRAConfig(alpha=8, dropout=0.1)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == dataclasses.replace(config) == config
    assert dataclasses.replace(config, r=2).alpha == 8


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: lf.LoRAConfig(alpha=8, lora_alpha=8), "lora_alpha"),
        (lambda: lf.LoRAConfig(4, 8, lora_alpha=8), "lora_alpha"),
        (lambda: lf.SingLoRAConfig(dropout=0.0, lora_dropout=0.1), "lora_dropout"),
        (lambda: lf.LoRAConfig(init="gaussian", init_lora_weights=True), "init_lora_weights"),
        (lambda: lf.LoRAConfig(init_lora_weights="pissa"), "init_lora_weights"),
        (lambda: lf.LoRAConfig(lora_alpha=0), "alpha"),
        (lambda: lf.LoRAConfig(lora_dropout=2.0), "dropout"),
    ],
    ids=["both", "both-by-position", "both-dropouts", "both-inits", "other-init", "alpha-0", "dropout-2"],
)
def test_configs_refuse_peft_names_by_name(build, argument):
    with pytest.raises(lf.ArgumentError) as raised:
        build()
    assert raised.value.argument == argument


def test_nb_lora_has_no_alpha_under_any_name():
    with pytest.raises(TypeError, match="lora_alpha"):
        lf.NBLoRAConfig(lora_alpha=8)
