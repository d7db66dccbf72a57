"""dequantize_: plain weights in place of quantised ones, with all that is around them; then merging works."""

import copy
import weakref

import peft
import pytest
import quantized_layers
import torch
from peft.tuners import lora
from quantized_models import quantized_injected_llama, quantized_linear, quantized_llama, quantized_peft_llama
from tiny import batch, llama
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import lora_fast as lf
from lora_fast.quantized import family_of, quantized_weight
from lora_fast.quantized.bitsandbytes_4bit import FourBitWeight

LAYER = "model.layers.0.self_attn.q_proj"
PEFT_LAYER = f"base_model.model.{LAYER}"
FORMATS = {
    "nf4": "bitsandbytes nf4, double quantisation",
    "fp4": "bitsandbytes fp4, double quantisation",
    "int8": "bitsandbytes int8",
}


def logits(model):
    with torch.no_grad():
        return model.eval()(batch()).logits


def dense(layer, kind):
    """Returns the values of a quantised weight, in float64 from bitsandbytes' own arithmetic."""
    import bitsandbytes as bnb

    if kind != "int8":
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return layer.weight.data.double() * scales.double()[:, None] / 127


@pytest.mark.parametrize("kind", FORMATS)
def test_merging_after_it_equals_the_weight_plus_the_adapter(kind):
    model = quantized_injected_llama(kind)
    layer = model.get_submodule(LAYER)
    weight, adapter, pairs = dense(layer.base, kind), layer, (layer.lora_A, layer.lora_B)
    wanted = weight + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    before = logits(model)
    with pytest.raises(lf.ArgumentError, match="dequantize_ first"):
        lf.merge_(model)
    report = lf.dequantize_(model, torch.float32)
    assert report.changed[LAYER] == f"LoRALinear of torch.float32, from {FORMATS[kind]}" and len(report.changed) == 7
    assert model.get_submodule(LAYER) is adapter and (adapter.lora_A, adapter.lora_B) == pairs
    torch.testing.assert_close(adapter.weight.double(), weight, rtol=2e-7, atol=0)
    tolerance = 0.03 if kind == "int8" else 1e-5  # LLM.int8() rounds its inputs to 8 bits, too
    torch.testing.assert_close(logits(model), before, rtol=0, atol=tolerance * before.abs().max().item())
    lf.merge_(model)
    torch.testing.assert_close(adapter.weight.double(), wanted, rtol=0, atol=2e-7 * wanted.abs().max().item())


@pytest.mark.parametrize("how", ["injected", "fused", "peft"])
@pytest.mark.parametrize("name", quantized_layers.FORMATS)
def test_every_format_is_replaced_by_its_values(name, how):
    linear = quantized_layers.quantized(name)
    weight = quantized_weight(linear).dequantized(torch.float64)
    if how == "injected":
        model = nn.Sequential(linear)
        lf.inject_(model, lf.LoRAConfig(r=4, target_modules=["0"]), progress=False)
        nn.init.normal_(model[0].lora_B)
    else:
        model = quantized_layers.peft_model(name, linear)
        if how == "fused":
            lf.fuse_(model)
    layer, x = model[0], torch.randn(5, quantized_layers.D_IN)
    before = model(x)
    report = lf.dequantize_(model, torch.float32 if name.startswith("int8") else None)
    kind = {"injected": "LoRALinear", "fused": "FusedLoraLinear", "peft": "Linear"}[how]
    assert report.changed["0"].startswith(f"{kind} of torch.float32, from ") and type(layer).__name__ == kind
    assert type(layer.weight) is nn.Parameter and not layer.weight.requires_grad and not report.note
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-6, atol=1e-7)
    tolerance = 0.03 if name.startswith("int8") else 1e-5
    torch.testing.assert_close(model(x), before, rtol=0, atol=tolerance * before.abs().max().item())


def test_a_rounded_weight_is_rounded_once():
    model = nn.Sequential(quantized_linear(nn.Linear(64, 64, bias=False)))
    exact = dense(model[0], "nf4")
    lf.dequantize_(model, torch.bfloat16)
    assert torch.equal(model[0].weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "peft"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_peft_merges_and_unloads_after_it(kind, fused):
    model = quantized_peft_llama(kind)
    if fused:
        lf.fuse_(model)
    state = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    before = logits(model)
    layer = model.get_submodule(PEFT_LAYER)
    report = lf.dequantize_(model, torch.float32)
    assert report.changed[PEFT_LAYER].startswith("FusedLoraLinear" if fused else "Linear of")
    assert isinstance(layer, lora.Linear) and type(layer.base_layer) is nn.Linear and not report.left
    assert {name: tensor for name, tensor in model.named_parameters() if "lora_" in name} == state
    tolerance = 0.03 if kind == "int8" else 0.02  # PEFT's forward may round scales to bfloat16
    torch.testing.assert_close(logits(model), before, rtol=0, atol=tolerance * before.abs().max().item())
    if fused:
        assert layer.fallback_reason is None
        lf.unmerge_(model) if lf.merge_(model) else None
    after = logits(model)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))  # PEFT takes the model for a plain one
    plain = model.merge_and_unload()
    assert type(plain.get_submodule(LAYER)) is nn.Linear
    torch.testing.assert_close(logits(plain), after, rtol=0, atol=1e-5 * after.abs().max().item())


def test_transformers_takes_the_model_for_a_plain_one(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    llama(dtype=torch.bfloat16, layers=1).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.bfloat16)
    report = lf.dequantize_(model)
    assert len(report.changed) == 7 and not report.left and not report.note
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for mark in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit"):
        assert not getattr(model, mark, None), mark
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "plain")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))
    assert model.float().dtype is torch.float32  # transformers refuses it for quantised models


def test_the_dtype_is_that_of_before_or_the_config_s():
    layers = [quantized_linear(nn.Linear(64, 64).to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    model = nn.Sequential(*layers, quantized_linear(nn.Linear(64, 64), "int8"))
    lf.dequantize_(model)
    assert [layer.weight.dtype for layer in model] == [torch.bfloat16, torch.float32, torch.float16]
    model = quantized_llama("int8", torch.bfloat16)
    model.config.dtype = torch.bfloat16
    lf.dequantize_(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_training_goes_on_in_groups_to_the_same_gradients():
    model, tokens = quantized_injected_llama(), batch()

    def gradients():
        model.zero_grad()
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    for _ in range(2):
        before = gradients()
    groups = str(lf.groups(model))
    lf.dequantize_(model)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, before[name], rtol=1e-4, atol=1e-6)
    assert str(lf.groups(model)) == groups


def test_hooks_and_tied_weights():
    torch.manual_seed(0)
    tied, hooked = quantized_linear(nn.Linear(64, 64)), quantized_linear(nn.Linear(64, 64))
    twin = copy.copy(tied)
    twin._parameters = dict(tied._parameters)
    model = nn.Sequential(tied, twin, tied, hooked).requires_grad_(False)
    calls = []
    handle = hooked.register_forward_hook(lambda *_: calls.append(1))
    report = lf.dequantize_(model)
    assert model[0] is model[2] and model[0] is not model[1] and model[0].weight is model[1].weight
    assert model[0].bias is model[1].bias is not None and not model[0].weight.requires_grad
    assert model[3] is hooked and report.left == {"3": "hooks, or a replaced forward, which a new layer would lose"}
    assert "still has quantised weights" in report.note
    handle.remove()
    lf.dequantize_(model)
    assert {type(layer) for layer in model} == {nn.Linear} and not calls


def test_hooks_of_adapter_layers_stay():
    model = quantized_injected_llama()
    layer, calls = model.get_submodule(LAYER), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    lf.dequantize_(model)
    logits(model)
    assert calls == [1]


def test_a_bias_gets_the_dtype_of_its_weight_and_stays_the_same_parameter():
    layer = quantized_linear(nn.Linear(64, 64))
    model, bias = nn.Sequential(layer), layer.bias
    lf.dequantize_(model, torch.float16)
    assert model[0].bias is bias and bias.dtype is torch.float16
    assert model[0](torch.randn(2, 64).half()).dtype is torch.float16


def test_an_error_half_way_leaves_a_model_that_computes_as_before(monkeypatch):
    model, calls, real = quantized_injected_llama(), [], FourBitWeight.dequantized
    before = logits(model)

    def short(self, dtype):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return real(self, dtype)

    monkeypatch.setattr(FourBitWeight, "dequantized", short)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        lf.dequantize_(model)
    assert "2 of 7 quantised layers are replaced" in raised.value.__notes__[0]
    assert model.is_loaded_in_4bit
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 * before.abs().max().item())
    assert len(lf.dequantize_(model).changed) == 5 and not hasattr(model, "is_loaded_in_4bit")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 * before.abs().max().item())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_quantised_weights_are_freed_one_by_one(kind, monkeypatch):
    model = quantized_injected_llama(kind)
    family = family_of(model.get_submodule(LAYER).base)
    real = family.dequantized
    bases = [weakref.ref(module.base) for module in model.modules() if isinstance(module, lf.LoRALinear)]
    alive = []

    def counted(self, dtype):
        alive.append(sum(base() is not None for base in bases))
        return real(self, dtype)

    monkeypatch.setattr(family, "dequantized", counted)
    lf.dequantize_(model)
    assert alive == [7, 6, 5, 4, 3, 2, 1]


def test_what_cannot_be_replaced_is_named():
    with pytest.raises(lf.ArgumentError, match="at least one quantised layer of a known format, got none"):
        lf.dequantize_(llama(layers=1))
    assert not lf.dequantize_(llama(layers=1), allow_empty=True).changed
    model = quantized_llama()
    with pytest.raises(lf.ArgumentError, match="dtype: expected None or a dtype among"):
        lf.dequantize_(model, torch.int8)
    with pytest.raises(lf.ArgumentError, match="a module that contains quantised layers, got Linear4bit"):
        lf.dequantize_(model.get_submodule(LAYER))
    other = peft.get_peft_model(model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    report = lf.dequantize_(other)
    assert report.left[PEFT_LAYER] == "PEFT layer peft.tuners.ia3.bnb.Linear4bit, which takes no plain weight"
    assert len(report.changed) == 6 and other.get_base_model().is_loaded_in_4bit


def test_unload_gives_the_library_s_own_layers_back():
    model = quantized_llama()
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    before = logits(copy.deepcopy(model))
    lf.inject_(model, lf.LoRAConfig(r=4), progress=False)
    with pytest.raises(lf.ArgumentError, match="dequantize_ first"):
        lf.unload_(model)
    report = lf.unload_(model, merge=False)
    assert report.changed[LAYER] == "bitsandbytes.nn.modules.Linear4bit"
    assert all(model.get_submodule(name) is module for name, module in layers.items())
    assert torch.equal(logits(model), before)
