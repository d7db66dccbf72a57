"""Adapter files as other versions and tools write them: what PEFT reads is read, the rest is named."""

import copy
import json

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_fast as lf

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()


@pytest.fixture
def folder(base, tmp_path):
    """A folder that PEFT has written, of an adapter with PEFT's default rank and alpha."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, config=(), without=(), tensors=lambda tensors: tensors):
    fields = json.loads((folder / CONFIG).read_text()) | dict(config)
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in fields.items() if key not in without}))
    changed = tensors(safetensors.torch.load((folder / WEIGHTS).read_bytes()))
    safetensors.torch.save_file(changed, folder / WEIGHTS)


def with_adapter_name(tensors):
    return {key.replace(".weight", ".default.weight"): tensor.clone() for key, tensor in tensors.items()}


READ = {
    "no-alpha": {"without": ["lora_alpha"]},
    "no-rank": {"without": ["r"]},
    "neither": {"without": ["r", "lora_alpha"]},
    "few-fields": {
        "without": ["lora_dropout", "bias", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"]
    },
    "adapter-name-in-keys": {"tensors": with_adapter_name},
    "newer-fields": {"config": {"use_new": False, "new_config": None, "new": 3, "runtime_config": {"offload": False}}},
    "targets-a-pattern": {"config": {"target_modules": "0|2"}},
    "targets-all": {"config": {"target_modules": "ALL-linear"}},
    "init-in-capitals": {"config": {"init_lora_weights": "GAUSSIAN"}},
    "init-none": {"config": {"init_lora_weights": None}},
    "empty-settings": {"config": {"modules_to_save": [], "layers_to_transform": [], "exclude_modules": []}},
    "nulls": {"config": {"use_rslora": None, "use_dora": None, "lora_bias": None}},
    "biases-of-none": {"config": {"bias": "lora_only"}},  # as of a model whose layers have no bias
    "alpha-a-float": {"config": {"lora_alpha": 8.0}},
    "other-layout": {"config": {"fan_in_fan_out": True}},
    "half": {"tensors": lambda tensors: {key: tensor.half() for key, tensor in tensors.items()}},
}


@pytest.mark.parametrize("kind", ["plain", "injected", "peft"])
@pytest.mark.parametrize("case", READ)
def test_what_peft_reads_is_read(case, kind, base, folder):
    x = torch.randn(3, 16)
    if case == "half":  # rounds the values
        rewrite(folder, **READ[case])
    want = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x)
    rewrite(folder, **READ[case])  # afterwards, because PEFT 0.18 does not read an adapter's name in keys
    model = copy.deepcopy(base)
    if kind == "injected":
        lf.inject_(model, lf.LoRAConfig(r=8, alpha=8))
    elif kind == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["0", "2"]))
    lf.load_adapter(model, folder)
    torch.testing.assert_close(model.eval()(x), want)


def test_alpha_may_be_true(base, folder):
    x = torch.randn(3, 16)
    rewrite(folder, config={"lora_alpha": True})
    want = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x)
    model = copy.deepcopy(base)
    lf.load_adapter(model, folder)
    torch.testing.assert_close(model.eval()(x), want)


def test_plain_model_takes_a_file_without_targets(base, folder):
    """PEFT has a list of targets for each of transformers' models. The file's own layers are as good."""
    rewrite(folder, without=["target_modules"])
    assert set(lf.load_adapter(copy.deepcopy(base), folder).changed) == {"0", "2"}


REFUSED = {
    "no-prefix": (
        {"tensors": lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}},
        "an extra key",
    ),
    "both-names": ({"tensors": lambda t: t | with_adapter_name(t)}, "once with the adapter's name, once without"),
    "rank-a-word": ({"config": {"r": "8"}}, f"r in {CONFIG}: .* got '8'"),
    "alpha-a-word": ({"config": {"lora_alpha": "8"}}, f"lora_alpha in {CONFIG}: .* got '8'"),
    "modules-a-name": ({"config": {"modules_to_save": "2"}}, f"modules_to_save in {CONFIG}: expected a list"),
    "long-value": ({"config": {"use_new": "x" * 9999}}, "use_new: expected unset"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_does_not_read_is_named(case, base, folder):
    change, says = REFUSED[case]
    rewrite(folder, **change)
    with pytest.raises(lf.CheckpointError, match=says) as raised:
        lf.load_adapter(copy.deepcopy(base), folder)
    assert len(str(raised.value)) < 2000


def test_pickle_is_named_and_not_read(base, folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(
        lf.CheckpointError, match=rf"expected {WEIGHTS} in the folder, got only adapter_model.bin.*convert"
    ):
        lf.load_adapter(copy.deepcopy(base), folder)


def test_edited_scale_of_any_sign_is_saved(base, tmp_path):
    model, x = copy.deepcopy(base), torch.randn(3, 16)
    lf.inject_(model, lf.LoRAConfig(r=4))
    for layer, scaling in ((model[0], -0.5), (model[2], 0.0)):
        nn.init.normal_(layer.lora_B)
        layer.scaling = scaling
    lf.save_adapter(model, tmp_path)
    lf.load_adapter(plain := copy.deepcopy(base), tmp_path)
    assert [plain[0].scaling, plain[2].scaling] == [-0.5, 0.0]
    lf.load_adapter(model, tmp_path)
    for twin in (plain, model, PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)):
        torch.testing.assert_close(twin.eval()(x), model(x))


def test_scale_that_no_file_can_hold_is_refused_at_saving(base, tmp_path):
    model = copy.deepcopy(base)
    lf.inject_(model, lf.LoRAConfig(r=4))
    model[0].scaling = float("nan")
    with pytest.raises(lf.CheckpointError, match="lora_alpha"):
        lf.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
