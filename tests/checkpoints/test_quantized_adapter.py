"""Adapters over quantised weights: their files have the weights' formats, which load_adapter compares."""

import json
import warnings

import peft
import pytest
import safetensors.torch
import torch
from quantized_models import quantized_injected_llama, quantized_llama, quantized_peft_llama
from safetensors import safe_open
from tiny import assert_unchanged, batch, injected_llama, llama, snapshot

import lora_fast as lf

LAYER = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"
NF4 = "bitsandbytes nf4, double quantisation"
MODELS = {"ours": quantized_injected_llama, "peft": quantized_peft_llama}


def metadata(folder):
    with safe_open(folder / WEIGHTS, "pt") as opened:
        return opened.metadata()


def factors(model):
    names = {name.removeprefix("base_model.model.").replace(".default.weight", ""): name for name, _ in
             model.named_parameters() if "lora_" in name}  # fmt: skip
    return {name: model.get_parameter(full).detach().clone() for name, full in names.items()}


def logits(model):
    with torch.no_grad():
        return model.eval()(batch()).logits


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("source", MODELS)
def test_round_trip_over_the_same_format(source, kind, tmp_path):
    model = MODELS[source](kind)
    lf.save_adapter(model, tmp_path)
    formats = json.loads(metadata(tmp_path)["quantized_base"])
    assert len(formats) == 7 and set(formats.values()) == {NF4 if kind == "nf4" else "bitsandbytes int8"}
    targets = {"ours": MODELS["ours"](kind), "peft": MODELS["peft"](kind), "plain": quantized_llama(kind)}
    for target in targets.values():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = lf.load_adapter(target, tmp_path)
        assert not report.note and len(report.changed) == 7
        for name, value in factors(model).items():
            assert torch.equal(value, factors(target)[name])
    assert torch.equal(logits(targets["plain"]), logits(targets["ours"]))


@pytest.mark.parametrize("source", MODELS)
def test_peft_reads_the_folder(source, tmp_path):
    model = MODELS[source]()
    lf.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(quantized_llama(), tmp_path)
    for name, value in factors(model).items():
        assert torch.equal(value, factors(theirs)[name])


@pytest.mark.parametrize("target", ["ours", "peft", "plain"])
def test_another_format_is_refused_before_anything_changes(target, tmp_path):
    lf.save_adapter(quantized_injected_llama("nf4"), tmp_path)
    model = quantized_llama("fp4") if target == "plain" else MODELS[target]("fp4")
    before = snapshot(model)
    with pytest.raises(lf.CheckpointError) as raised:
        lf.load_adapter(model, tmp_path)
    error = raised.value
    assert error.argument == f"frozen weight of {LAYER} and of 6 more layers"
    assert error.expected.startswith(NF4) and "any_quantization=True" in error.expected
    assert error.got == NF4.replace("nf4", "fp4")
    assert_unchanged(model, before)
    report = lf.load_adapter(model, tmp_path, any_quantization=True)
    assert report.note == f"Trained over {NF4}, loaded over {error.got}: {LAYER} and 6 more"


def test_one_layer_of_another_format_is_named(tmp_path):
    lf.save_adapter(quantized_injected_llama(), tmp_path)
    model = quantized_llama()
    other = quantized_llama("int8").get_submodule("model.layers.0.mlp.up_proj")
    model.set_submodule("model.layers.0.mlp.up_proj", other)
    with pytest.raises(
        lf.CheckpointError, match=r"frozen weight of model.layers.0.mlp.up_proj: .* got bitsandbytes int8"
    ):
        lf.load_adapter(model, tmp_path)


def test_plain_weights_get_a_warning_and_a_note(tmp_path):
    model = quantized_injected_llama()
    lf.save_adapter(model, tmp_path)
    plain = llama(layers=1)
    with pytest.warns(UserWarning, match=f"Trained over {NF4}, loaded over plain weights: {LAYER} and 6 more"):
        lf.load_adapter(plain, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = lf.load_adapter(plain, tmp_path, any_quantization=True)
    assert report.note.startswith("Trained over")
    before = logits(model)
    dense = quantized_llama()
    lf.dequantize_(dense)
    lf.load_adapter(dense, tmp_path, any_quantization=True)
    torch.testing.assert_close(logits(dense), before, rtol=0, atol=1e-5 * before.abs().max().item())


def test_files_over_plain_weights_and_peft_s_own_tell_no_format(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    lf.save_adapter(injected_llama(), tmp_path / "plain")
    assert metadata(tmp_path / "plain") == {"format": "pt"}
    theirs = quantized_peft_llama("fp4")
    theirs.save_pretrained(tmp_path / "peft")
    for folder in ("plain", "peft"):
        assert not lf.load_adapter(quantized_llama(layers=2 if folder == "plain" else 1), tmp_path / folder).note


@pytest.mark.parametrize("value", ["[]", "{", '{"model.layers.0.self_attn.q_proj": 4}', '{"elsewhere": "nf4"}'])
def test_a_damaged_record_is_named(value, tmp_path):
    lf.save_adapter(injected_llama(), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS, {"format": "pt", "quantized_base": value})
    with pytest.raises(lf.CheckpointError, match="quantized_base in adapter_model"):
        lf.load_adapter(llama(), tmp_path)


def test_the_file_for_trainer_has_no_part_of_the_frozen_weights(tmp_path):
    for kind in ("nf4", "int8"):
        model = quantized_injected_llama(kind)
        model.save_pretrained(tmp_path / kind, state_dict=model.state_dict())
        names = safetensors.torch.load_file(tmp_path / kind / "model.safetensors").keys()
        assert names and all("lora_" in name for name in names), names


def test_a_state_dict_of_8_bit_layers_loads_with_its_scales():
    """bitsandbytes loads 8-bit states alone; what it does not know is still told."""
    model, other = quantized_injected_llama("int8"), quantized_llama("int8", seed=3)
    lf.inject_(other, lf.LoRAConfig(r=4, alpha=8), progress=False)
    wanted = logits(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), wanted)
    layer = other.get_submodule(LAYER)
    assert layer.weight is layer.base.weight
    missing, unexpected = other.load_state_dict({f"{LAYER}.lora_A": layer.lora_A, f"{LAYER}.odd": wanted}, strict=False)
    assert unexpected == [f"{LAYER}.odd"] and {f"{LAYER}.weight", f"{LAYER}.lora_B"} <= {*missing}
    assert f"{LAYER}.lora_A" not in missing


def test_free_parameters_and_trained_modules(tmp_path):
    model = quantized_llama()
    lf.inject_(model, lf.NBLoRAConfig(r=4, bound=0.5), progress=False)
    model.lm_head.requires_grad_(True).weight.data.mul_(1.5)
    lf.save_adapter(model, tmp_path)
    again = quantized_llama()
    report = lf.load_adapter(again, tmp_path)
    assert "lm_head" in report.changed and torch.equal(logits(again), logits(model))
