"""Quantised layers that are left as they are, each with a reason that names its format."""

import copy
import warnings

import peft
import pytest
import torch
from quantized_layers import D_IN, D_OUT, peft_model, quantized
from torch import nn

import lora_fast as lf
from lora_fast.quantized import quantized_weight

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def torchao_linear(config, **settings):
    quantization = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(D_IN, D_OUT)
    quantization.quantize_(linear, getattr(quantization, config)(**settings))
    return linear


def on_meta():
    return torchao_linear("Int8WeightOnlyConfig").to("meta")


def with_scaled_activations():
    linear = torchao_linear("Int8WeightOnlyConfig")
    linear.weight.act_pre_scale = torch.ones(D_IN)
    return linear


def compressed(decompressed=False):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    apply_quantization_config(model, QuantizationConfig(config_groups={"NVFP4A16": ["Linear"]}))
    for name, parameter in model.named_parameters():
        if "scale" in name:
            nn.init.ones_(parameter)
    compress_module(model[0])
    if decompressed:
        decompress_module(model[0])
    return model[0]


class QuantizedLinear(nn.Module):
    """Stands in for another library's layer (AQLM, EETQ, …)."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(D_OUT, D_IN, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x[..., :D_OUT]


QuantizedLinear.__module__ = "aqlm.inference"
REASONS = {  # a layer → what the reason says
    "dynamic-int8": (lambda: torchao_linear("Int8DynamicActivationInt8WeightConfig"), "Int8Tensor that quantises act"),
    "dynamic-intx": (lambda: torchao_linear("Int8DynamicActivationIntxWeightConfig"), "Int8Tensor that quantises act"),
    "meta": (on_meta, "torchao Int8Tensor on the meta device"),
    "scaled-activations": (with_scaled_activations, r"torchao Int8Tensor that scales activations \(act_pre_scale\)"),
    "compressed-tensors": (compressed, r"compressed-tensors weight \(nvfp4-pack-quantized\).*dequantize=True"),
    "decompressed": (lambda: compressed(True), r"compressed-tensors weight \(nvfp4-pack-quantized\)"),
    "unknown": (QuantizedLinear, "a quantised format that is not known: aqlm.inference.QuantizedLinear"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_layer_that_cannot_be_injected_names_its_format(name):
    make, reason = REASONS[name]
    model = nn.Sequential(make(), nn.Linear(D_OUT, 8))
    before = list(model)
    report = lf.inject_(model, lf.LoRAConfig(r=4))
    assert report.changed.keys() == {"1"} and model[0] is before[0]
    with pytest.raises(lf.ArgumentError, match=reason):
        lf.inject_(nn.Sequential(model[0]), lf.LoRAConfig(r=4))


@pytest.mark.parametrize("name", [name for name in REASONS if name not in ("unknown", "meta", "compressed-tensors")])
def test_a_layer_of_peft_that_cannot_be_fused_names_its_format(name):
    make, reason = REASONS[name]
    model = nn.Sequential(make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["0"]), model)
    kind = type(model[0])
    with pytest.raises(lf.ArgumentError, match=reason):
        lf.fuse_(model)
    assert type(model[0]) is kind


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8", "torchao-nf4", "hqq-4", "gptq-4"])
def test_merge_into_a_quantised_weight_is_refused_with_the_ways_out(name):
    model = nn.Sequential(quantized(name))
    lf.inject_(model, lf.LoRAConfig(r=4))
    before, form = model[0].base, quantized_weight(model[0].base).format
    with pytest.raises(lf.ArgumentError, match=rf"{form}.*lf.dequantize_ first, or keep the adapter apart"):
        lf.merge_(model)
    assert model[0].base is before and not model[0].merged


def test_pefts_plain_layer_over_nf4_is_not_merged():
    theirs = peft_model("torchao-nf4", quantized("torchao-nf4"))
    ours = copy.deepcopy(theirs)
    lf.fuse_(ours)
    with pytest.raises(lf.ArgumentError, match="weight of type NF4Tensor"):
        lf.merge_(ours)
    for model in (theirs, ours):
        with pytest.raises(NotImplementedError, match="NF4Tensor"):
            model[0].merge()
        assert not model[0].merged_adapters
