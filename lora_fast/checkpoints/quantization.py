"""The formats of quantised frozen weights, recorded with the adapter that was trained over them and compared when it is
loaded.

An adapter corrects the rounding of the weights that it was trained over, so that over weights that are quantised
otherwise the model is another one, which no shape shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from ..checks import CheckpointError
from ..kernels.grouping import group_by
from ..layers.find import ADAPTER_LAYERS
from ..layers.merge_log import holder
from ..quantized import format_of

PLAIN = "plain weights"


def formats(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns name → format of those layers, adapter layers or linear ones, whose frozen weight is quantised."""
    found = {name: _format(layer) for name, layer in layers.items()}
    return {name: form for name, form in found.items() if form is not None}


def compare(recorded: Mapping[str, str] | None, layers: Mapping[str, nn.Module], any_quantization: bool) -> str:
    """Compares the formats that an adapter was trained over with those of a model.

    Args:
        recorded: name → format (``Adapter.quantized``). layers: name → the adapter's layer in the model, or the linear
            layer that it will replace, for each name.

    Returns:
        A sentence for the report on those that differ, or nothing. Without ``any_quantization`` it is also a warning.

    Raises:
        CheckpointError: a weight of the model is quantised to another format, and not ``any_quantization``.
    """
    if recorded is None:
        return ""
    present = formats(layers)
    differing = {name: (recorded.get(name), present.get(name)) for name in layers}
    differing = {name: (want, got) for name, (want, got) in differing.items() if want != got}
    refused = [name for name, (_, got) in differing.items() if got is not None]
    if refused and not any_quantization:
        want, got = differing[refused[0]]
        more = f" and of {len(refused) - 1} more layers" if len(refused) > 1 else ""
        expected = f"{want or PLAIN}, over which the adapter was trained (or any_quantization=True)"
        raise CheckpointError(f"frozen weight of {refused[0]}{more}", expected, str(got))
    groups = group_by(differing, differing.__getitem__)
    note = ". ".join(
        f"Trained over {want or PLAIN}, loaded over {got or PLAIN}: {names[0]}"
        + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for (want, got), names in groups.items()
    )
    if note and not any_quantization:
        advice = "with the values of lf.dequantize_ the model is the one that was trained"
        warnings.warn(f"lora_fast: {note} ({advice}; any_quantization=True: no warning)", stacklevel=3)
    return note


def _format(layer: nn.Module) -> str | None:
    if isinstance(layer, ADAPTER_LAYERS):
        return None if layer.base is None else format_of(layer.base)
    return format_of(holder(layer))
