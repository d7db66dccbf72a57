"""The configs of inject_ refuse bad settings."""

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
