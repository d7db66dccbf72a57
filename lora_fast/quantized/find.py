"""Finds the family of a frozen layer's format. No library is imported for it: a layer of a library that has not been
imported does not exist."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from torch import nn

from .bitsandbytes_4bit import FourBitWeight
from .bitsandbytes_8bit import EightBitWeight
from .gptqmodel import AWQWeight, GPTQWeight
from .hqq import HQQWeight
from .torchao import TorchaoWeight
from .weight import QuantizedWeight

FORMATS: tuple[type[QuantizedWeight], ...] = (
    FourBitWeight, EightBitWeight, TorchaoWeight, HQQWeight, GPTQWeight, AWQWeight,
)  # fmt: skip


def family_of(module: nn.Module) -> type[QuantizedWeight] | None:
    """Returns the family of the module's weight, or None if it has no quantised one that is known."""
    classes: Any = type(module), type(module._parameters.get("weight"))
    return _family(*classes)


@cache
def _family(module: Any, weight: Any) -> type[QuantizedWeight] | None:
    return next((kind for kind in FORMATS if kind.LIBRARY in sys.modules and kind.matches(module, weight)), None)


def reason_against(module: nn.Module) -> str | None:
    """Returns why the ops cannot use the module's weight, which is of a known family, in its present state, or None if
    they can."""
    kind = family_of(module)
    assert kind is not None, f"a quantised layer, got {type(module).__name__}"
    return kind.reason(module)


def format_of(module: nn.Module) -> str | None:
    """Returns the format of the module's weight, or None if it has no quantised one of a known family that is ready."""
    weight = quantized_weight(module)
    return weight.format if isinstance(weight, QuantizedWeight) else None


def over_format(module: nn.Module) -> str:
    """Returns " over …" with the format of the module's weight, for reports; nothing for a weight that is not
    quantised."""
    return f" over {form}" if (form := format_of(module)) else ""


def reason_against_merge(module: nn.Module) -> str:
    """Returns why no adapter can be merged into the module's quantised weight, with the two ways out."""
    assert family_of(module) is not None, f"a quantised layer, got {type(module).__name__}"
    name = f" ({form})" if (form := format_of(module)) else ""
    return (
        f"quantised weight{name}, which a merge would quantise anew: lf.dequantize_ first, or keep the adapter apart "
        "(lf.save_adapter)"
    )


def quantized_weight(module: nn.Module) -> QuantizedWeight | str | None:
    """Returns the module's quantised weight for one call, why it is not ready, or None if the module has no quantised
    one of a known family."""
    kind = family_of(module)
    if kind is None:
        return None
    weight = kind(module)
    return weight if weight.is_ready else str(kind.reason(module))
