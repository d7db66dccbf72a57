"""Reasons for layers whose weight is quantised in a format that no family here takes."""

from __future__ import annotations

import sys

from torch import Tensor, nn

DEQUANTIZED = "load the model with CompressedTensorsConfig(dequantize=True)"


def reason_against_unknown(module: nn.Module) -> str | None:
    """Returns why the ops cannot use a linear layer of no known family that looks quantised, with the name of its
    format, or None if it does not look so."""
    scheme = getattr(module, "quantization_scheme", None)
    if "compressed_tensors" in sys.modules and scheme is not None:
        # It computes nothing while it is compressed, and decompresses every weight of the model at the first call.
        name = getattr(scheme.format, "value", None) or "no format"
        return f"compressed-tensors weight ({name}), which its library multiplies decompressed alone: {DEQUANTIZED}"
    kind = type(module)
    if kind is nn.Linear or "Linear" not in kind.__name__:
        return None
    held = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    is_packed = any(tensor.dim() > 1 and not _is_dense(tensor) for tensor in held)
    if not is_packed and all(type(tensor).__module__.partition(".")[0] == "torch" for tensor in held):
        return None
    return f"a quantised format that is not known: {kind.__module__}.{kind.__qualname__}"


def _is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor has elements of 16 bits or more of a floating dtype."""
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
