"""The public function of linear layers of one x, each with its LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend, checks
from ..ops import linear_group
from .linear import casts, checked, lora_linear, mask_seed, reason_against_op

_apply = super(torch.autograd.Function, linear_group.LoRAGroupFunction).apply  # as linear._apply
_apply_joined = super(torch.autograd.Function, linear_group.JoinedFunction).apply
_grad = torch.is_grad_enabled


class LinearMember(NamedTuple):
    """A layer of ``lora_linear_group``: the arguments of ``lora_linear`` after x."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor
    dropout_p: float = 0.0
    seed: int | None = None


def lora_linear_group(x: Tensor, members: Sequence[LinearMember | tuple]) -> tuple[Tensor, ...]:
    """Frozen linear layers of one x, as q, k and v of an attention, with their LoRA adapters as one differentiable op:
    ``y_i = x W_iᵀ + bias_i + scaling_i · dropout_i(x) a_iᵀ b_iᵀ``.

    Compared to a ``lora_linear`` for each, x is read once for every S = x aᵀ and once for every gradient of an a, it is
    saved once, and its gradient is written once instead of once a member, and added. y and the gradients of a and b are
    the same; the gradient of x is rounded once, or once a member where cuBLAS or a CPU's library multiplies.

    Members may differ in d_out, rank, scaling, bias, dtype of the factors and dropout, each with a mask of its own.
    Four at a time are one op. Where the op cannot serve a member (``lora_linear`` says where), and under torch.compile,
    each is computed by itself.

    Args:
        x: (..., d_in), as ``lora_linear``.
        members: for each layer ``lora_linear``'s arguments after x: weight (d_out, d_in), bias (d_out,) or None, lora_A
            (r, d_in), lora_B (d_out, r), scaling and, if wanted, dropout_p and seed.

    Returns:
        y (..., d_out) of each member, in x's dtype (the autocast dtype under autocast).

    Raises:
        ArgumentError: no members, or as ``lora_linear``; BackendError likewise.
    """
    if not isinstance(members, list | tuple) or not members:
        raise checks.ArgumentError("members", "a list of at least one member", checks.shown(members))
    layers = [_member(member, i) for i, member in enumerate(members)]
    apart = torch.compiler.is_compiling() or any(reason_against_op(x, m.weight, m.lora_A, m.lora_B) for m in layers)
    if apart or len({casts(x, m.weight) for m in layers}) > 1:
        return tuple(_naming(i, lora_linear, x, *layer) for i, layer in enumerate(layers))
    autocast = casts(x, layers[0].weight)
    calls = [(*_naming(i, checked, x, autocast, *layer[:6]), layer.seed) for i, layer in enumerate(layers)]
    groups = [calls[i : i + linear_group.MOST] for i in range(0, len(calls), linear_group.MOST)]
    return tuple(y for calls in groups for y in run_group(x, calls, autocast))


def _member(member: object, i: int) -> LinearMember:
    if isinstance(member, tuple | list) and 5 <= len(member) <= 7:
        return LinearMember(*member)
    expected = "lora_linear's arguments after x: (weight, bias, lora_A, lora_B, scaling[, dropout_p[, seed]])"
    got = f"{len(member)} items" if isinstance(member, tuple | list) else type(member).__name__
    raise checks.ArgumentError(f"members[{i}]", expected, got)


def _naming(i: int, function: Callable, *arguments):
    """Calls the function; its errors name the member."""
    try:
        return function(*arguments)
    except checks.ArgumentError as error:
        if error.argument == "x":
            raise
        raise checks.ArgumentError(f"members[{i}].{error.argument}", error.expected, error.got) from None


def run_group(x, calls: Sequence[tuple], autocast: bool, at_backward: Callable = lambda used: None) -> Sequence[Tensor]:
    """Returns y of each call (the items of ``checked``'s result, and a seed or None). ``at_backward`` is called with
    the indices of those that take part when its backward runs."""
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    triton = backend.forward_uses_triton(x)
    members: list[linear_group.Member] = [
        (*call[:6], mask_seed(x, call[5], call[6], False, triton)) if call[5] > 0.0 else call for call in calls
    ]
    ops = backend.load_ops("linear", triton)
    if not _grad():
        return linear_group.forward(ops, x, members, autocast)[0]
    tensors = [tensor for weight, bias, a, b, *_ in members for tensor in (weight, bias, a, b)]
    return _apply(ops, x, autocast, members, at_backward, *tensors)


def enter(x, autocast: bool, ran: Callable) -> tuple[Tensor, linear_group.Entry]:
    """Returns x as those that ``run_joined`` have to take it, in the dtype in which their products run, and what they
    join. ``ran``: as ``linear_group.enter``."""
    return linear_group.enter(x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x, ran)


def run_joined(x, entry: linear_group.Entry, call: tuple, autocast: bool) -> Tensor:
    """Computes one layer of an x that has entered. ``call``: the result of ``checked``."""
    triton = backend.forward_uses_triton(x)
    dropout_p = call[-1]
    drawn = mask_seed(x, dropout_p, None, False, triton) if dropout_p > 0.0 else None
    return _apply_joined(backend.load_ops("linear", triton), x, *call, drawn, autocast, entry)
