"""HQQ's weights: 1 to 8 bits with a scale and a zero point for each group. The layer has no parameter ``weight``; its
x must have the layer's compute dtype, as in HQQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .weight import QuantizedWeight

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class HQQWeight(QuantizedWeight):
    LIBRARY = "hqq"
    PEFT_LAYERS = ("peft.tuners.lora.hqq.HqqLoraLinear",)

    __slots__ = ()

    @classmethod
    def matches(cls, module: type[nn.Module], weight: type | None) -> bool:
        from hqq.core.quantize import HQQLinear

        return module is HQQLinear  # into which HQQ writes the forward of its backend

    @classmethod
    def reason(cls, module: nn.Module) -> str | None:
        layer: Any = module
        if not layer.ready:
            return "HQQ weight that is not quantised yet"
        if layer.W_q.is_meta:
            return "HQQ weight on the meta device"
        scales = {str(part.device) for part in layer.meta.values() if isinstance(part, Tensor)}
        if not layer.offload_meta and scales != {str(layer.W_q.device)}:
            return f"HQQ weight on {layer.W_q.device} with its scales on {' and '.join(sorted(scales))}"
        if layer.compute_dtype not in COMPUTE_DTYPES:
            return f"compute dtype {layer.compute_dtype}, not float16, bfloat16 or float32"
        return None

    @classmethod
    def tensor_of(cls, module: nn.Module) -> Tensor:
        layer: Any = module
        weight: Tensor = layer.W_q
        return weight

    @classmethod
    def sizes(cls, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        d_out, d_in = layer.meta["shape"] if layer.ready else (0, 0)
        return d_out, d_in

    @property
    def is_ready(self) -> bool:
        ready: bool = self.module.ready
        return ready

    @property
    def format(self) -> str:
        return f"HQQ {self.module.meta['nbits']} bits"

    @property
    def original_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.module.compute_dtype
        return dtype

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        dense: Tensor = self.module.dequantize()
        return dense.to(dtype)
