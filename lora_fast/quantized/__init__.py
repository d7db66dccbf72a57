"""Frozen linear layers with quantised weights. ``QuantizedWeight`` is what the rest of the package knows of one: the
product by the library that owns the format, and the dequantised weight for backward. Each family of formats is one file
here with one class, and ``find.FORMATS`` names them: a new format is one file and one line."""

from __future__ import annotations

from .find import FORMATS, family_of, format_of, over_format, quantized_weight, reason_against, reason_against_merge
from .unknown import reason_against_unknown
from .weight import QuantizedWeight

__all__ = [
    "FORMATS", "QuantizedWeight", "family_of", "format_of", "over_format", "quantized_weight", "reason_against",
    "reason_against_merge", "reason_against_unknown",
]  # fmt: skip
