"""QuantizedWeight: a frozen layer's weight where the ops take a tensor otherwise."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import FLOATS
from ..kernels.records import FourBit


class QuantizedWeight:
    """The quantised weight W of a frozen linear layer, for one call. It holds nothing but the layer and its tensor, so
    it is made where it is needed, and it may stand wherever the ops take a weight.

    A family of formats is a subclass with ``matches``, ``dequantized``, ``format`` and, where they differ, ``reason``,
    ``sizes``, ``original_dtype``, ``product`` and ``grad``. Two class attributes say where it comes from:

        LIBRARY       the package whose classes ``matches`` looks for; where it is not imported, nothing matches
        PEFT_LAYERS   qualified names of PEFT's LoRA layers over such a base layer

    Attributes:
        module: the layer of the library.
        tensor: the module's tensor that identifies the weight; a change in place shows in its version.
        shape: (d_out, d_in). device: of the weight.
        dtype: None, because the product takes x in every floating dtype.
    """

    LIBRARY: ClassVar[str]
    PEFT_LAYERS: ClassVar[tuple[str, ...]]

    __slots__ = ("module", "shape", "tensor")
    dtype = None
    requires_grad = False
    layout = torch.strided

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self.tensor: Tensor = self.tensor_of(module)
        self.shape = torch.Size(self.sizes(module))

    @classmethod
    def matches(cls, module: type[nn.Module], weight: type | None) -> bool:
        """Returns whether a module of this class, with ``_parameters["weight"]`` of this class, is of this family.
        ``LIBRARY`` has been imported."""
        raise NotImplementedError

    @classmethod
    def reason(cls, module: nn.Module) -> str | None:
        """Returns why the ops cannot use a module that matches, in its present state, or None if they can."""
        return None

    @classmethod
    def tensor_of(cls, module: nn.Module) -> Tensor:
        """Returns the module's tensor that identifies the weight, a parameter unless a wrapper has taken it over."""
        weight: Any = module._parameters.get("weight")
        return module.weight if weight is None else weight  # type: ignore[return-value]

    @classmethod
    def take_(cls, module: nn.Module) -> None:
        """Prepares a module for adapter layers, which may train in turns with evaluations."""

    @classmethod
    def release_(cls, module: nn.Module) -> None:
        """Takes back what ``take_`` has done."""

    @classmethod
    def sizes(cls, module: nn.Module) -> tuple[int, int]:
        """Returns (d_out, d_in)."""
        linear: Any = module
        return linear.out_features, linear.in_features

    @property
    def is_ready(self) -> bool:
        """True if the weight is quantised and has all that it needs, as far as a call has time to look."""
        return True

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def format(self) -> str:
        """The library and its name of the format, such as "bitsandbytes nf4"."""
        raise NotImplementedError

    @property
    def original_dtype(self) -> torch.dtype | None:
        """The dtype that the weight had before it was quantised; None where the format does not record it."""
        dtype = self.tensor.dtype
        return dtype if dtype in FLOATS else None

    def product(self, x: Tensor) -> Tensor:
        """Returns x Wᵀ + bias by the library, (..., d_in) → (..., d_out), in the dtype that the library gives."""
        y: Tensor = self.module(x)
        return y

    def four_bit(self, dtype: torch.dtype) -> FourBit | None:
        """Returns the weight as the GEMM over 4-bit weights (``kernels/linear/four_bit.py``) takes it for x or dy of
        this dtype, None if it does not."""
        return None

    def grad(self, dy: Tensor) -> Tensor:
        """Returns dy W, (..., d_out) → (..., d_in) in dy's dtype. The dequantised weight is not kept."""
        dtype = self.computes_in(dy.dtype)
        return torch.matmul(dy.to(dtype), self.dequantized(dtype)).to(dy.dtype)

    def add_grad_(self, dx: Tensor, dy: Tensor) -> None:
        """Adds dy W to dx (..., d_in), which is contiguous."""
        if dx.dtype is dy.dtype is self.computes_in(dy.dtype):
            dx.view(-1, dx.shape[-1]).addmm_(dy.reshape(-1, dy.shape[-1]), self.dequantized(dx.dtype))
        else:
            dx.add_(self.grad(dy))

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which the library multiplies a tensor of this dtype."""
        return dtype

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Returns W (d_out, d_in) as a new tensor of this dtype."""
        raise NotImplementedError

    def let_go_(self) -> None:
        """Breaks what keeps the memory of a layer that has been replaced until Python's collector runs."""

    # ---- What the rest of the package asks of a weight, whichever it is.

    def to(self, dtype: torch.dtype) -> Tensor:
        """Returns what ``dequantized`` does: a weight for plain torch ops."""
        return self.dequantized(dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantizedWeight) and other.module is self.module and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.format}, {tuple(self.shape)} on {self.device})"

    @property
    def _version(self) -> tuple:
        """The versions of the weight and of the bias, which the library adds: a change in place changes them."""
        bias = getattr(self.module, "bias", None)
        return self.tensor_version, None if bias is None else (id(bias), bias._version)

    @property
    def tensor_version(self) -> object:
        """The version of the weight alone."""
        return self.tensor._version

    def data_ptr(self) -> int:
        """Returns what tells the tensor's memory from others. A tensor of several parts has no address."""
        try:
            return self.tensor.data_ptr()
        except RuntimeError:
            return id(self.tensor)
