"""bitsandbytes' 4-bit weights: NF4 and FP4, with and without double quantisation, in every storage dtype.

The layer casts x to its compute dtype and its result back to x's dtype, as bitsandbytes does. The product's gradient is
that of the weight with which forward multiplies: dequantised to the compute dtype. bitsandbytes dequantises to the
dtype that the weight had, and rounds again.

On CPUs with AVX512-bf16 bitsandbytes repacks a weight in an evaluation's forward and rounds its scales to bfloat16. A
layer whose weight is repacked cannot be trained: its product has no gradient, or raises an error. ``take_`` turns that
off for the layers of an adapter. What has been repacked before is taken back, as bitsandbytes does before it saves a
weight.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.records import FourBit, NestedScales
from .weight import QuantizedWeight

COMPUTE_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)
# Operations on bitsandbytes' class of tensors pass through its Python, which costs microseconds each.
_no_subclass = torch._C.DisableTorchFunctionSubclass
NOT_QUANTIZED = "4-bit weight that is not quantised yet: move the model to its device first"


class FourBitWeight(QuantizedWeight):
    LIBRARY = "bitsandbytes"
    PEFT_LAYERS = ("peft.tuners.lora.bnb.Linear4bit",)

    __slots__ = ()

    @classmethod
    def matches(cls, module: type[nn.Module], weight: type | None) -> bool:
        import bitsandbytes as bnb

        return issubclass(module, bnb.nn.Linear4bit) and module.forward is bnb.nn.Linear4bit.forward

    @classmethod
    def reason(cls, module: nn.Module) -> str | None:
        layer: Any = module
        weight, state = cls.tensor_of(module), _quant_state(layer)
        if weight.is_meta:
            return "4-bit weight on the meta device"
        if state is None:
            return NOT_QUANTIZED
        if state.absmax.device != weight.device:
            return f"4-bit weight on {weight.device} with its scales on {state.absmax.device}"
        if tuple(state.shape) != (layer.out_features, layer.in_features):
            return f"4-bit weight of shape {tuple(state.shape)}, not {(layer.out_features, layer.in_features)}"
        if layer.compute_dtype not in COMPUTE_DTYPES:
            return f"compute dtype {layer.compute_dtype}, not float16, bfloat16 or float32"
        return None

    @classmethod
    def take_(cls, module: nn.Module) -> None:
        module.__dict__["support_avx512bf16_for_cpu"] = False

    @classmethod
    def release_(cls, module: nn.Module) -> None:
        import bitsandbytes as bnb

        module.__dict__["support_avx512bf16_for_cpu"] = bnb.functional.has_avx512bf16()

    @property
    def is_ready(self) -> bool:
        return _quant_state(self.module) is not None

    @property
    def device(self) -> torch.device:
        # That of the scales, which are a plain tensor: attributes of the weight's class cost host time.
        device: torch.device = _quant_state(self.module).absmax.device
        return device

    @property
    def format(self) -> str:
        state = self._state()
        return f"bitsandbytes {state.quant_type}" + (", double quantisation" if state.nested else "")

    @property
    def original_dtype(self) -> torch.dtype:
        state = _quant_state(self.module)
        is_repacked = getattr(state, "packing_format_for_cpu", False)
        dtype: torch.dtype = state.original_dtype if is_repacked else state.dtype
        return dtype

    @property
    def tensor_version(self) -> object:
        return self.tensor._version, _quant_state(self.module).absmax._version, self.module.compute_dtype

    def _state(self) -> Any:
        """Returns bitsandbytes' description of the weight, as it is quantised: not repacked, and not lost where torch
        has made a new parameter of it."""
        import bitsandbytes as bnb

        layer = self.module
        weight = self.tensor
        if weight.__dict__.get("quant_state") is None:
            bnb.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
        state = _quant_state(layer)
        if getattr(state, "packing_format_for_cpu", False):
            layer.weight.data, state = bnb.functional._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
            if not state.nested:  # bitsandbytes leaves its repacked scales, a column for each row of the weight
                state.absmax = state.absmax.t().reshape(-1).float()
            layer.weight.quant_state = state
        return state

    def product(self, x: Tensor) -> Tensor:
        import bitsandbytes as bnb

        layer, state = self.module, self._state()
        if not layer.compute_type_is_set:
            layer.set_compute_type(x)
            layer.compute_type_is_set = True
        dtype, bias = self.computes_in(x.dtype), layer._parameters["bias"]
        bias = None if bias is None else bias.to(dtype)
        with _no_subclass():
            y: Tensor = bnb.matmul_4bit(x.to(dtype), self.tensor.t(), bias=bias, quant_state=state)
            return y.to(x.dtype)

    def four_bit(self, dtype: torch.dtype) -> FourBit | None:
        state = self._state()
        if self.module.compute_dtype not in (None, dtype):
            return None
        nested = None
        if state.nested:
            inner = state.state2
            nested = NestedScales(inner.code, inner.absmax, state.offset, inner.blocksize)
        return FourBit(self.module.weight.data, state.code, state.absmax, state.blocksize, tuple(self.shape), nested)

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        chosen: torch.dtype = self.module.compute_dtype or dtype
        return chosen

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        import bitsandbytes as bnb

        state = self._state()
        directly = torch.float32 if dtype is torch.float64 else dtype  # as bitsandbytes' forward
        if state.dtype is not directly:
            state = copy.copy(state)
            state.dtype = directly
        with _no_subclass():
            dense: Tensor = bnb.functional.dequantize_4bit(self.tensor, state)
            return dense.to(dtype)

    def let_go_(self) -> None:
        weight: Any = self.tensor
        weight.module = None  # read where a weight is quantised, as this one has been


def _quant_state(layer: Any) -> Any:
    """Returns bitsandbytes' description of the weight, which the layer has, too, in case a new parameter lost it."""
    state = FourBitWeight.tensor_of(layer).__dict__.get("quant_state")
    return layer.quant_state if state is None else state
