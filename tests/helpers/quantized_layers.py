"""Linear layers with quantised weights on a CPU, one row for each format of each library, and PEFT's layers over
them."""

import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import peft
import pytest
import torch
from torch import nn

D_IN, D_OUT, RANK = 256, 64, 4


class Format(NamedTuple):
    """A format: the package, and what makes a quantised layer of an nn.Linear of the library's dtype."""

    package: str
    quantize: Callable[[nn.Linear], nn.Module]
    flag: str | None = None  # the attribute of a model by which PEFT knows the format


def bnb_4bit(linear: nn.Linear, quant_type: str, nested: bool = False, storage: torch.dtype = torch.uint8) -> nn.Module:
    import bitsandbytes as bnb

    settings = {"compute_dtype": linear.weight.dtype, "compress_statistics": nested, "quant_storage": storage}
    layer = bnb.nn.Linear4bit(D_IN, D_OUT, linear.bias is not None, quant_type=quant_type, **settings)
    layer.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    return layer.to("cpu")  # where it is quantised


def bnb_8bit(linear: nn.Linear, threshold: float = 0.0) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(D_IN, D_OUT, linear.bias is not None, has_fp16_weights=False, threshold=threshold)
    layer.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao(linear: nn.Linear, config: str, **settings) -> nn.Module:
    import torchao.quantization as quantization
    from torchao.quantization import granularity

    if "group" in settings:
        settings["granularity"] = granularity.PerGroup(settings.pop("group"))
    quantization.quantize_(linear, getattr(quantization, config)(**settings))
    return linear


def torchao_nvfp4(linear: nn.Linear) -> nn.Module:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(linear, NVFP4WeightOnlyConfig())
    return linear


def torchao_nf4(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import to_nf4

    linear.weight = nn.Parameter(to_nf4(linear.weight.detach()), requires_grad=False)
    return linear


def hqq(linear: nn.Linear, bits: int, axis: int = 1) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


_FOUR, _BNB, _AO = "is_loaded_in_4bit", "bitsandbytes", "torchao"
FORMATS = {
    "nf4": Format(_BNB, partial(bnb_4bit, quant_type="nf4"), _FOUR),
    "nf4-nested": Format(_BNB, partial(bnb_4bit, quant_type="nf4", nested=True), _FOUR),
    "nf4-stored-in-bfloat16": Format(_BNB, partial(bnb_4bit, quant_type="nf4", storage=torch.bfloat16), _FOUR),
    "fp4": Format(_BNB, partial(bnb_4bit, quant_type="fp4"), _FOUR),
    "fp4-nested-stored-in-float32": Format(
        _BNB, partial(bnb_4bit, quant_type="fp4", nested=True, storage=torch.float32), _FOUR
    ),
    "int8": Format(_BNB, bnb_8bit, "is_loaded_in_8bit"),
    "int8-outliers": Format(_BNB, partial(bnb_8bit, threshold=2.0), "is_loaded_in_8bit"),
    "torchao-int8": Format(_AO, partial(torchao, config="Int8WeightOnlyConfig")),
    "torchao-int8-groups": Format(_AO, partial(torchao, config="Int8WeightOnlyConfig", group=32)),
    "torchao-float8": Format(_AO, partial(torchao, config="Float8WeightOnlyConfig")),
    "torchao-intx": Format(_AO, partial(torchao, config="IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32)),
    "torchao-nvfp4": Format(_AO, torchao_nvfp4),
    "torchao-nf4": Format(_AO, torchao_nf4),
    "hqq-4": Format("hqq", partial(hqq, bits=4)),
    "hqq-3": Format("hqq", partial(hqq, bits=3, axis=0)),
}


def quantized(name: str, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> nn.Module:
    """Returns a quantised layer (D_OUT, D_IN) of a format; skips the test where its library is not installed."""
    package, quantize, _ = FORMATS[name]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(D_IN, D_OUT, bias, dtype=dtype).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / D_IN**0.5)
    return quantize(linear).requires_grad_(False)


def peft_model(name: str, *bases: nn.Module, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    """Returns a Sequential of PEFT's LoRA layers over layers of a format, with adapters of random values."""
    model = nn.Sequential(*bases)
    if flag := FORMATS[name].flag:
        setattr(model, flag, True)
    targets = [str(i) for i in range(len(bases))]
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=targets, init_lora_weights=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao: merging is off
        peft.inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(1)
    for layer in model:
        for factor in (layer.lora_A, layer.lora_B):
            factor.to(dtype)
            weight = factor["default"].weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return model
