"""Linear layers with quantised weights on a CPU, one row for each format of each library, and PEFT's layers over
them."""

import warnings
from collections.abc import Callable
from functools import cache, partial
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
    apart: float = 1e-6  # how far the library's gradient of a float32 x may be from one that is computed in float32


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


@cache
def without_dequantize() -> type[torch.Tensor]:
    """Returns a class of torchao's weights that has a product alone, as its int4 ones for GPUs."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    class ProductAlone(IntxUnpackedToInt8Tensor):
        dequantize = torch.Tensor.dequantize

    @ProductAlone.implements_torch_function(nn.functional.linear)
    def linear(func, types, args, kwargs):
        x, weight, bias = *args, *[None] * (3 - len(args))
        return func(x, IntxUnpackedToInt8Tensor.dequantize(weight), bias)

    return ProductAlone


def torchao_product_alone(linear: nn.Linear) -> nn.Module:
    weight = torchao(linear, "IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32).weight
    names, rest = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    weight = without_dequantize().__tensor_unflatten__(parts, rest, None, None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def hqq(linear: nn.Linear, bits: int, axis: int = 1) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


def gptq(linear: nn.Linear, bits: int) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer, scales, zeros, rows = _of_gptqmodel(TorchLinear, linear, bits, symmetric=True)
    layer.pack_original(linear, scales, zeros, rows)
    layer.optimized = True  # post_init compiles nothing
    layer.post_init()
    return layer


def awq(linear: nn.Linear, bits: int = 4) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer, scales, zeros, _ = _of_gptqmodel(AwqTorchLinear, linear, bits, symmetric=False)
    layer.pack(linear, scales.to(layer.compute_dtype), zeros)
    layer.post_init()
    return layer


def _of_gptqmodel(kind: type, linear: nn.Linear, bits: int, symmetric: bool, group: int = 32) -> tuple:
    """Returns an empty layer, scales and zero points (d_out, groups), and the group of each row."""
    settings = {"bias": linear.bias is not None, "register_buffers": True, "pack_dtype": torch.int32}
    dtype = torch.float16 if linear.weight.dtype is torch.float32 else linear.weight.dtype  # x may be float32
    layer = kind(bits, group, symmetric, False, D_IN, D_OUT, dtype=dtype, **settings)
    groups = linear.weight.detach().float().view(D_OUT, -1, group)
    scales = groups.abs().amax(2) * 2 / (2**bits - 1)
    return layer, scales, torch.full_like(scales, 2 ** (bits - 1)), torch.arange(D_IN, dtype=torch.int32) // group


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
    "torchao-product-alone": Format(_AO, torchao_product_alone),
    "torchao-nvfp4": Format(_AO, torchao_nvfp4),
    "torchao-nf4": Format(_AO, torchao_nf4),
    "hqq-4": Format("hqq", partial(hqq, bits=4)),
    "hqq-3": Format("hqq", partial(hqq, bits=3, axis=0)),
    "gptq-4": Format("gptqmodel", partial(gptq, bits=4)),
    "gptq-3": Format("gptqmodel", partial(gptq, bits=3)),
    "awq": Format("gptqmodel", awq, apart=1e-3),
}


def quantized(name: str, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> nn.Module:
    """Returns a quantised layer (D_OUT, D_IN) of a format; skips the test where its library is not installed."""
    package, quantize, *_ = FORMATS[name]
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
    model.register_parameter("other", nn.Parameter(torch.zeros(1)))  # by which PEFT knows a device
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
