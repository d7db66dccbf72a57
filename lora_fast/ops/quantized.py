"""Layers with quantised weights: the library that owns the format multiplies by W, and the rank-r update is added in
the same memory.

A member is as in linear_group.py, with a ``QuantizedWeight`` (or, beside such members, a tensor). ``bias`` is what is
added to the library's product, which has the layer's own bias. Neither x nor dy is cast: the library's product has the
dtype that it has in PEFT's layer, also under autocast, and S is computed from x as it is. The memory of the library's
product is the result's, unless a mode of torch sees the product and may keep it.

Where ``lora-fast tune`` has measured that our GEMM over 4-bit weights is faster than bitsandbytes' product, it computes
y, or a member's part of dx, at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantized import QuantizedWeight
from .observers import sees_ops
from .reference import linear as reference
from .reference.linear import keep_scale

_any_autocast = torch._C._is_any_autocast_enabled


def forward(ops, x: Tensor, members: Sequence[tuple]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns y (..., d_out) and S (n_tokens, r) of each member (weight, bias, lora_A, lora_B, scaling, dropout_p,
    seed)."""
    four_bits = [_four_bit(ops, "forward", x, weight, len(a), False) for weight, _, a, *_ in members]
    ys: list = [
        None if operand else product(x, weight, bias)
        for operand, (weight, bias, *_) in zip(four_bits, members, strict=True)
    ]
    with torch.autocast(x.device.type, enabled=False) if _any_autocast() else nullcontext():
        keeps = [ops.draw_mask(x, dropout_p, seed) if dropout_p else None for *_, dropout_p, seed in members]
        ss = ops.group_project(x, [member[2] for member in members], keeps)
        for i, (weight, bias, _, b, scaling, dropout_p, _) in enumerate(members):
            scaling = scaling * keep_scale(dropout_p) if dropout_p else scaling
            if four_bits[i]:
                ys[i] = four_bit_gemm().four_bit_linear(x, four_bits[i], _bias(x, weight, bias), ss[i], b, scaling)
            else:
                ys[i] = _plus(ops, ys[i], x, ss[i], b, scaling)
    return ys, ss


def _plus(ops, y: Tensor, x: Tensor, s: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns a library's product y plus scaling · S bᵀ. While a mode of torch sees the ops, as that of selective
    checkpointing, which keeps results and uses them again, nothing is changed in place."""
    if sees_ops():
        return reference.plus_product(y, s, b, scaling)
    y = _own(y, x)
    ops.add_to_y(y, s, b, scaling)
    return y


def backward(ops, dys, x: Tensor, ss, members: Sequence[tuple], needs: tuple) -> tuple:
    """Returns dx, and da and db of each member, as ``linear_group.backward``, for members (weight, bias, lora_A,
    lora_B, scaling, dropout_p, seed)."""
    need_x, need_a, _ = needs
    calls = []
    for i, (weight, _, a, b, scaling, dropout_p, seed) in enumerate(members):
        masked = dropout_p and dys[i] is not None and (need_x or need_a[i])
        keep = ops.draw_mask(x, dropout_p, seed) if masked else None
        calls.append((weight, None, a, b, scaling * keep_scale(dropout_p) if dropout_p else scaling, keep))
    if len(calls) == 1:  # which takes the host less time
        need_s, (_, _, a, b, scaling, keep) = need_x or need_a[0], calls[0]
        thin_needs = need_s, need_a[0], needs[2][0]
        one = ops.thin_gradients(dys[0], x, ss[0], a, b, scaling, keep, False, thin_needs)
        dss, das, dbs = [[tensor] for tensor in one]
    else:
        dss, das, dbs = ops.group_thin_gradients(dys, x, ss, calls, False, needs)
    parts = [
        (dy, weight, ds, a, keep)
        for dy, ds, (weight, _, a, _, _, keep) in zip(dys, dss, calls, strict=True)
        if need_x and dy is not None
    ]
    return grad_x(ops, x, parts) if parts else None, das, dbs


def grad_x(ops, x: Tensor, parts: Sequence[tuple]) -> Tensor:
    """Returns dx = Σ dy W + keep∘(dS a) in x's shape and dtype, the sum over parts (dy, weight, dS, lora_A, keep)."""
    dx: Any = None
    others = []  # the parts whose thin products are not added yet
    for dy, weight, ds, a, keep in parts:
        operand = _four_bit(ops, "backward", dy, weight, len(a), keep is not None) if dy.dtype is x.dtype else None
        if operand:
            part = four_bit_gemm().four_bit_grad_x(dy, operand, ds, a, keep)
            dx = part if dx is None else dx.add_(part)
            continue
        others.append((ds, a, keep))
        if dx is None:
            dx = _own(_grad(dy, weight).to(x.dtype), dy)
        elif isinstance(weight, Tensor):
            dx.add_(_grad(dy, weight))
        else:
            weight.add_grad_(dx, dy)
    if others:
        ops.add_to_dx(dx, others)
    return dx.view(x.shape)


def _four_bit(ops, direction: str, tall: Tensor, weight: QuantizedWeight | Tensor, r: int, dropout: bool) -> Any:
    """Returns the weight as our GEMM over 4-bit weights takes it, where that was measured to be the fastest."""
    if ops is reference or isinstance(weight, Tensor):
        return None
    gemm = four_bit_gemm()
    operand = weight.four_bit(tall.dtype) if gemm.is_fastest(direction, tall, weight.shape, r, dropout) else None
    return operand if operand is not None and gemm.takes(tall, operand) else None


@cache
def four_bit_gemm() -> Any:
    """Returns the module of the kernels, which needs Triton."""
    from ..kernels.linear import four_bit

    return four_bit


def _bias(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor | None:
    """Returns the sum of the layer's own bias and the one beside it, in x's dtype."""
    own = weight.module.bias
    total = own if bias is None else bias if own is None else own + bias
    return total if total is None else total.to(x.dtype)


def product(x: Tensor, weight: QuantizedWeight | Tensor, bias: Tensor | None) -> Tensor:
    """Returns x Wᵀ + bias, where the library's product includes the layer's own bias."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = weight.product(x)
    return y if bias is None else y + bias.to(y.dtype)


def _grad(dy: Tensor, weight: QuantizedWeight | Tensor) -> Tensor:
    return torch.matmul(dy, weight.to(dy.dtype)) if isinstance(weight, Tensor) else weight.grad(dy)


def _own(result: Tensor, source: Tensor) -> Tensor:
    """Returns a library's result as memory that may be changed: contiguous, not seen by a mode of torch, which may use
    it again, and not the source itself. It is no view, which could not be changed in place as nn.Linear's result
    can."""
    if sees_ops() or result is source:
        return result.clone(memory_format=torch.contiguous_format)
    result = result.contiguous()
    return torch.ops.aten._unsafe_view.default(result, result.shape) if result._is_view() else result
