"""bitsandbytes' 8-bit weights (LLM.int8()): a scale for each row of W; where there is a threshold, columns of x with
outliers are multiplied in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .weight import QuantizedWeight


class EightBitWeight(QuantizedWeight):
    LIBRARY = "bitsandbytes"
    PEFT_LAYERS = ("peft.tuners.lora.bnb.Linear8bitLt",)

    __slots__ = ()

    @classmethod
    def matches(cls, module: type[nn.Module], weight: type | None) -> bool:
        import bitsandbytes as bnb

        return issubclass(module, bnb.nn.Linear8bitLt) and module.forward is bnb.nn.Linear8bitLt.forward

    @classmethod
    def reason(cls, module: nn.Module) -> str | None:
        layer: Any = module
        weight, scales = cls.tensor_of(module), _scales(layer)
        if weight.is_meta:
            return "8-bit weight on the meta device"
        if layer.state.has_fp16_weights:
            return "8-bit layer that keeps and trains a 16-bit weight (has_fp16_weights)"
        if weight.dtype is not torch.int8 or scales is None:
            return "8-bit weight that is not quantised yet: move the model to its device first"
        if scales.device != weight.device:
            return f"8-bit weight on {weight.device} with its scales on {scales.device}"
        return None

    @property
    def is_ready(self) -> bool:
        return _scales(self.module) is not None

    @property
    def format(self) -> str:
        return "bitsandbytes int8"

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        # As bitsandbytes' backward does. Its state has the weight once forward has run, and the parameter before that.
        scales: Any = _scales(self.module)
        dense: Tensor = self.module.weight.data.to(dtype, copy=True)
        return dense.mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


def _scales(layer: Any) -> Tensor | None:
    scales: Tensor | None = layer.state.SCB if layer.state.SCB is not None else getattr(layer.weight, "SCB", None)
    return scales
