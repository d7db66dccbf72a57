"""torchao's weights, tensors of its own in a plain nn.Linear: int8, float8, int4, intx, NVFP4 and NF4.

Most of them have a method that dequantises. The weight of another (int4) is its product with the identity. Where the
config of a weight also quantises activations, torchao's product has no gradient with respect to x, so such weights are
refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .weight import QuantizedWeight

STRIP = 1024  # columns of W in one product with rows of the identity


class TorchaoWeight(QuantizedWeight):
    LIBRARY = "torchao"
    PEFT_LAYERS = ("peft.tuners.lora.torchao.TorchaoLoraLinear",)  # over NF4 it is PEFT's plain layer

    __slots__ = ("parameter",)

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.parameter: Any = self.module._parameters["weight"]

    @classmethod
    def matches(cls, module: type[nn.Module], weight: type | None) -> bool:
        from torchao.utils import TorchAOBaseTensor

        if module is not nn.Linear or weight is None:
            return False
        return _is_nf4(weight) or (issubclass(weight, TorchAOBaseTensor) and hasattr(weight, "tensor_data_names"))

    @classmethod
    def reason(cls, module: nn.Module) -> str | None:
        weight: Any = module._parameters["weight"]
        name = f"torchao {type(weight).__name__}"
        parts = [getattr(weight, part) for part in weight.__tensor_flatten__()[0]]
        if any(part.is_meta for part in parts):
            return f"{name} on the meta device"
        if len(devices := {str(part.device) for part in parts}) > 1:
            return f"{name} in parts on {' and '.join(sorted(devices))}"
        if _quantizes_activations(weight):
            return f"{name} that quantises activations: torchao's product has no gradient with respect to them"
        if getattr(weight, "act_pre_scale", None) is not None:
            return f"{name} that scales activations (act_pre_scale)"
        return None

    @classmethod
    def tensor_of(cls, module: nn.Module) -> Tensor:
        # A part of the weight, because torchao's own tensor has no address, and its attributes cost host time.
        weight: Any = module._parameters["weight"]
        part: Tensor = weight.quantized_data if _is_nf4(type(weight)) else getattr(weight, weight.tensor_data_names[0])
        return part

    @property
    def format(self) -> str:
        return f"torchao {type(self.parameter).__name__}"

    @property
    def original_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.parameter.dtype
        return dtype

    @property
    def tensor_version(self) -> object:
        # torchao's copy_ counts as a change of the whole, a write into the part as one of the part.
        return self.parameter._version, self.tensor._version

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        weight = self.parameter
        if _is_nf4(type(weight)):
            dense: Tensor = weight.get_original_weight()
        elif type(weight).__name__ == "Int8Tensor" and weight.block_size[-1] == weight.shape[-1]:
            # Its product multiplies by W without rounding it to the weight's dtype.
            dense = weight.dequantize(torch.float32 if dtype is torch.float64 else dtype)
        elif type(weight).dequantize is Tensor.dequantize:  # torch's, for its own dtypes
            dense = _product_with_identity(weight)
        else:
            dense = weight.dequantize()
        return dense.to(dtype)


@torch.no_grad()
def _product_with_identity(weight: Tensor) -> Tensor:
    """Returns W (d_out, d_in) in the weight's dtype, to which the product with a row of the identity rounds it."""
    d_out, d_in = weight.shape
    dense = torch.empty((d_out, d_in), dtype=weight.dtype, device=weight.device)
    for start in range(0, d_in, STRIP):
        columns = dense[:, start : start + STRIP]
        rows = torch.zeros((columns.shape[1], d_in), dtype=weight.dtype, device=weight.device)
        rows[:, start : start + STRIP].fill_diagonal_(1.0)
        columns.copy_(torch.nn.functional.linear(rows, weight).t())
    return dense


def _is_nf4(kind: type) -> bool:
    """Returns whether it is torchao's NF4Tensor, which has been in several of its modules."""
    return kind.__name__ == "NF4Tensor" and kind.__module__.startswith("torchao.")


def _quantizes_activations(weight: Any) -> bool:
    """Returns whether the product quantises x, too."""
    settings = ("act_quant_kwargs", "activation_quantization")
    is_float8 = getattr(weight, "activation_dtype", None) is torch.float8_e4m3fn  # of an int4 weight
    return is_float8 or any(getattr(weight, name, None) is not None for name in settings)
