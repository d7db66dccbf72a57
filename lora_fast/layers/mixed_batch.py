"""PEFT's batches with an adapter for each sample (``adapter_names``) on a fused layer: which of them the op for several
adapters computes, and the call of it. All others are left to PEFT's forward, with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..checks import FLOATS
from ..functional.batched import run_op
from ..functional.linear import in_autocast, reason_against_op
from ..ops.observers import sees_ops

BASE = "__base__"  # PEFT's name for no adapter


class MixedCall(NamedTuple):
    """The arguments of the op for a batch.

    Attributes:
        weight, bias: the base layer's.
        lora_A, lora_B, scaling: of the adapters in the batch that the layer has.
        samples: the number of each sample's adapter among these, -1 for none.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    scaling: list[float]
    samples: list[int]


def mixed_call(layer: Any, x: Tensor, names: Sequence[str], arguments_of: Callable[[Any, str], Any]) -> MixedCall | str:
    """Returns the op's arguments for a batch x whose samples have the adapters ``names``, or why PEFT's forward has to
    run. ``arguments_of`` is ``fused_peft.fused_arguments``."""
    if names is None:
        return "extra arguments"
    if layer.disable_adapters or layer.merged_adapters:
        return "merged" if layer.merged_adapters else "adapters disabled"
    if torch.compiler.is_compiling() or sees_ops():
        return "adapter_names in a compiled graph or under a dispatch mode"
    if not isinstance(names, (list, tuple)) or x.dim() < 2 or len(names) != len(x):
        return "adapter_names that do not fit the input"
    present = [name for name in dict.fromkeys(names) if name != BASE and name in layer.lora_A]
    if not present:
        return "adapter_names of which the layer has none"
    found = [arguments_of(layer, name) for name in present]
    reason = next((reason for reason in map(_reason_against_adapter, found) if reason is not None), None)
    if reason is not None:
        return reason
    if layer.lora_variant.keys() & set(present):
        return "adapter_names of a variant of LoRA"
    calls = [arguments for arguments, _ in found]
    weight, bias = calls[0][:2]
    lora_A, lora_B, scaling = ([call[i] for call in calls] for i in (2, 3, 4))
    number = {name: i for i, name in enumerate(present)}
    call = MixedCall(weight, bias, lora_A, lora_B, scaling, [number.get(name, -1) for name in names])
    return _reason_against_tensors(x, call) or call


def run(x: Tensor, call: MixedCall) -> Tensor:
    """Returns y of a batch."""
    weight, bias, lora_A, lora_B, scaling, samples = call
    ops, size = backend.ops("batched", x), x.shape[:-1].numel() // len(samples)
    places = ops.sorted_rows(samples, len(scaling), size, x.device)
    return run_op(ops, x, weight, bias, lora_A, lora_B, scaling, *places)


def _reason_against_adapter(found: Any) -> str | None:
    """Returns why the op does not compute an adapter of a batch, from what ``fused_arguments`` has returned for it."""
    if isinstance(found, str):
        return found
    (weight, _, _, _, scaling, dropout_p), lora_bias = found
    if lora_bias is not None:
        return "adapter_names of an adapter with a bias on lora_B"
    if weight.dtype is None:
        return "adapter_names over a quantised weight"
    if dropout_p:
        return "adapter_names with dropout"
    if type(scaling) is not float or not math.isfinite(scaling):
        return "adapter_names with a scaling that is no finite number"
    return None


def _reason_against_tensors(x: Tensor, call: MixedCall) -> str | None:
    """Returns why the op does not compute these tensors."""
    weight, bias, lora_A, lora_B, *_ = call
    factors = [*lora_A, *lora_B]
    if in_autocast(x):
        return "adapter_names under autocast"
    if x.dtype not in FLOATS or x.dtype is not weight.dtype or (bias is not None and bias.dtype is not x.dtype):
        return f"{x.dtype} input to {weight.dtype} weights"
    if len({factor.dtype for factor in factors}) > 1:
        return "adapter_names of adapters of several dtypes"
    if any(tensor.device != x.device for tensor in (weight, *factors)):
        return "adapter_names over several devices"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *factors)):
        return "adapter_names with gradients"
    reasons = (reason_against_op(x, weight, a, b) for a, b in zip(lora_A, lora_B, strict=True))
    return next((reason for reason in reasons if reason is not None), None)
