"""GPTQ's and AWQ's weights in gptqmodel's layers of torch ops: 2 to 8 bits with scales and zero points for groups of
rows. Its layers of other kernels (Marlin, ExLlama, …) have weights in orders of their own and stay PEFT's. The layers
have buffers in place of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .weight import QuantizedWeight


class GPTQWeight(QuantizedWeight):
    LIBRARY = "gptqmodel"
    PEFT_LAYERS = ("peft.tuners.lora.gptq.GPTQLoraLinear",)
    METHOD = "GPTQ"

    __slots__ = ()

    @classmethod
    def matches(cls, module: type[nn.Module], weight: type | None) -> bool:
        return f"{module.__module__}.{module.__qualname__}" == "gptqmodel.nn_modules.qlinear.torch.TorchLinear"

    @classmethod
    def reason(cls, module: nn.Module) -> str | None:
        layer: Any = module
        weight, scales = layer._buffers.get("qweight"), layer._buffers.get("scales")
        if weight is None or scales is None:
            return f"{cls.METHOD} weight that is not quantised yet"
        if weight.is_meta:
            return f"{cls.METHOD} weight on the meta device"
        if scales.device != weight.device:
            return f"{cls.METHOD} weight on {weight.device} with its scales on {scales.device}"
        if getattr(layer, "online_full_had", False) or getattr(layer, "online_partial_had", False):
            return f"{cls.METHOD} layer that rotates activations"
        if layer.adapter:
            return f"{cls.METHOD} layer with an adapter of gptqmodel's own"
        return None

    @classmethod
    def tensor_of(cls, module: nn.Module) -> Tensor:
        weight: Any = module._buffers.get("qweight")
        return weight

    @property
    def is_ready(self) -> bool:
        return self.tensor is not None and self.module._buffers.get("scales") is not None

    @property
    def format(self) -> str:
        return f"{self.METHOD} {self.module.bits} bits"

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        dense: Tensor = self.module.dequantize_weight()
        return dense.t().to(dtype)


class AWQWeight(GPTQWeight):
    PEFT_LAYERS = ("peft.tuners.lora.awq.AwqLoraLinear",)
    METHOD = "AWQ"

    __slots__ = ()

    @classmethod
    def matches(cls, module: type[nn.Module], weight: type | None) -> bool:
        return f"{module.__module__}.{module.__qualname__}" == "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear"

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        layer = self.module
        packed = {name: layer._buffers[name] for name in ("qweight", "qzeros", "scales")}
        dense: Tensor = dequantize_gemm(**packed, bits=layer.bits, group_size=layer.group_size)
        return dense.t().to(dtype)
