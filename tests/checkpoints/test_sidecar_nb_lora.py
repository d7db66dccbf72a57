"""The sidecar of norm-bounded layers: PEFT reads plain LoRA, and the free parameters are restored bit for bit."""

import json

import pytest
import safetensors.torch
import torch
from adapter_folders import assert_peft_logits, logits, rewritten
from nb_lora_models import NORMS, layers_of, scatter
from peft import PeftModel
from tiny import assert_unchanged, llama, peft_llama, snapshot

import lora_fast as lf
from lora_fast.checkpoints.sidecar import SIDECAR
from lora_fast.layers.nb_lora import NBLoRALinear


def bounded_llama(scattered=True, **config):
    model = llama()
    lf.inject_(model, lf.NBLoRAConfig(**{"r": 4, "bound": 1.5, **config}))
    return scatter(model) if scattered else model


def free_of(model) -> list[torch.Tensor]:
    return [getattr(layer, name).detach() for layer in layers_of(model) for name in layer.TRAINABLE]


def assert_bitwise(model, other) -> None:
    assert all(torch.equal(x, y) for x, y in zip(free_of(model), free_of(other), strict=True))
    assert torch.equal(logits(model), logits(other))


@pytest.fixture
def saved(tmp_path):
    model = bounded_llama()
    lf.save_adapter(model, tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("norm", NORMS)
def test_peft_reads_the_plain_adapter(norm, tmp_path):
    model = bounded_llama(norm=norm)
    lf.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and not config["use_rslora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert_peft_logits(model, PeftModel.from_pretrained(llama(), tmp_path))


@pytest.mark.parametrize("norm", NORMS)
def test_norm_bounded_layers_take_peft_s_adapter(norm, tmp_path):
    """PEFT's adapter gives the same logits in norm-bounded layers, and PEFT reads the adapter that those save."""
    peft = peft_llama(use_rslora=True)
    peft.save_pretrained(tmp_path)
    model = bounded_llama(scattered=False, norm=norm, bound=40.0)
    lf.load_adapter(model, tmp_path)
    assert_peft_logits(model, peft)
    lf.save_adapter(model, tmp_path)
    assert_peft_logits(model, PeftModel.from_pretrained(llama(), tmp_path))


def test_load_restores_every_bit_of_norm_bounded_layers(saved):
    model, path = saved
    other = bounded_llama(scattered=False)
    assert len(lf.load_adapter(other, path).changed) == 14
    assert_bitwise(other, model)


def test_load_restores_every_bit_in_a_plain_model(saved):
    """The new layers have the saved norm, bound and shares, and one transform for all of them."""
    model, path = saved
    other = llama()
    lf.load_adapter(other, path)
    assert {type(layer) for layer in layers_of(other)} == {NBLoRALinear} and len(layers_of(other)) == 14
    assert all((layer.norm, layer.bound, layer.learn_scale) == ("nuclear", 1.5, True) for layer in layers_of(other))
    assert len(other._forward_pre_hooks) == 1
    assert_bitwise(other, model)


def test_model_with_two_kinds_of_layers_is_restored(tmp_path):
    def mixed():
        model = bounded_llama(target_modules=["q_proj"])
        lf.inject_(model, lf.LoRAConfig(r=2, alpha=6, target_modules=["down_proj"]))
        return model

    model, other = mixed(), mixed()
    torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.lora_B)
    lf.save_adapter(model, tmp_path)
    for fresh in (other, llama()):
        lf.load_adapter(fresh, tmp_path)
        assert_bitwise(fresh, model)


def test_plain_layers_take_the_plain_adapter(saved):
    model, path = saved
    other = llama()
    lf.inject_(other, lf.LoRAConfig(r=4, alpha=4))
    lf.load_adapter(other, path)
    torch.testing.assert_close(logits(other), logits(model))


@pytest.mark.parametrize("norm", NORMS)
def test_exported_adapter_keeps_the_bound(norm, tmp_path):
    model = bounded_llama(norm=norm)
    lf.save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, NBLoRALinear):
            a, b = (tensors[f"base_model.model.{name}.{factor}.weight"].double() for factor in ("lora_A", "lora_B"))
            singular = torch.linalg.svdvals(b @ a)[:4]
            shares = torch.softmax(layer.free_scale.double() / 2, 0).sort(descending=True).values ** layer.power
            room = 12 * 4 * torch.finfo(torch.float32).eps
            assert (singular <= 1.5 * (shares + room)).all()
            assert singular[0] > 0.1 * 1.5 * shares[0]


def test_plain_adapter_becomes_free_parameters(saved):
    model, path = saved
    (path / SIDECAR).unlink()
    other = bounded_llama(scattered=False, bound=2.0)
    lf.load_adapter(other, path)
    torch.testing.assert_close(logits(other), logits(model))


def test_plain_adapter_outside_the_bound_is_refused(saved):
    _, path = saved
    (path / SIDECAR).unlink()
    other = bounded_llama(bound=0.01)
    before = snapshot(other)
    message = r"^adapter of model\.layers\.0\.\S+: expected a nuclear norm of at most 0\.01, got singular values "
    with pytest.raises(lf.CheckpointError, match=message):
        lf.load_adapter(other, path)
    assert_unchanged(other, before)


def test_save_removes_an_old_sidecar(saved):
    _, path = saved
    other = llama()
    lf.inject_(other, lf.LoRAConfig(r=4))
    lf.save_adapter(other, path)
    assert not (path / SIDECAR).exists()
    lf.load_adapter(llama(), path)


def other_factors(path):
    file = path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    next(iter(tensors.values())).add_(1e-3)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


DAMAGES = {
    "other factors": (other_factors, "the adapter beside it"),
    "cut off": (lambda path: (path / SIDECAR).write_bytes((path / SIDECAR).read_bytes()[:-9]), "whole safetensors"),
    "no metadata": (lambda path: rewritten(path, lambda m, t: m.clear()), "settings and tensors of each layer"),
    "a tensor missing": (lambda path: rewritten(path, lambda m, t: t.popitem()), "tensors of each layer"),
    "a tensor more": (lambda path: rewritten(path, lambda m, t: t.update(x=torch.zeros(1))), "the adapter beside it"),
    "another shape": (
        lambda path: rewritten(path, lambda m, t: t.update({k: v[:-1].clone() for k, v in t.items() if "scale" in k})),
        "shape",
    ),
    "a bound of 0": (
        lambda path: rewritten(path, lambda m, t: m.update(layers=m["layers"].replace("1.5", "0.0"))),
        r"^bound of model.* in free_parameters.safetensors: .*above 0",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sidecar_is_refused(damage, saved):
    _, path = saved
    change, message = DAMAGES[damage]
    change(path)
    for model in (bounded_llama(), llama()):
        before = snapshot(model)
        with pytest.raises(lf.CheckpointError, match=message):
            lf.load_adapter(model, path)
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    "config, name",
    [({"bound": 1.0}, "bound"), ({"norm": "spectral"}, "norm"), ({"learn_scale": False}, "learn_scale")],
    ids=["bound", "norm", "learn_scale"],
)
def test_other_settings_are_refused(config, name, saved):
    model = bounded_llama(**config)
    before = snapshot(model)
    with pytest.raises(lf.CheckpointError, match=rf"^{name} of model\.layers"):
        lf.load_adapter(model, saved[1])
    assert_unchanged(model, before)


def test_other_rank_or_layers_are_refused(saved):
    for config, message in (({"r": 3}, "shape"), ({"target_modules": ["q_proj"]}, "no such layer")):
        with pytest.raises(lf.CheckpointError, match=message):
            lf.load_adapter(bounded_llama(**config), saved[1])
