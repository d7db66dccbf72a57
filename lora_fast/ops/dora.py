"""A DoRA layer (Liu et al., arXiv 2402.09353) as a differentiable op: y = (magnitude / norms)∘u + bias, where
u = x (W + s b a)ᵀ and the norms are those of the rows of W + s b a. No gradient flows through the norms (section 4.3).

``DoRALinearFunction`` computes the whole layer. x and S are saved, and of the product u or x Wᵀ, since the gradient of
the magnitude is Σ_t dy∘u. ``ColumnScaleFunction`` computes y from u, for layers whose u comes from elsewhere: from a
library that multiplies by a quantised weight. Second derivatives are those of plain torch ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from . import composite, linear
from .observers import modes, named, not_compiled, sees_ops
from .reference import dora as reference


class ColumnScaleFunction(torch.autograd.Function):
    @staticmethod
    @not_compiled
    def forward(ctx, ops, u, magnitude, norms, bias):
        with named("lora_fast::column_scale"):
            y = ops.column_scale(u, magnitude, norms, bias)
        ctx.save_for_backward(u if ctx.needs_input_grad[2] else None, magnitude, norms)
        ctx.ops, ctx.bias_dtype = ops, None if bias is None else bias.dtype
        return y

    @staticmethod
    @not_compiled
    def backward(ctx, dy):
        u, magnitude, norms = ctx.saved_tensors
        _, need_u, need_magnitude, _, need_bias = ctx.needs_input_grad
        is_plain = not torch.is_grad_enabled() and composite.is_plain(dy) and not torch.compiler.is_compiling()
        compute = ctx.ops.column_scale_backward if is_plain else reference.differentiable_backward
        with named("lora_fast::column_scale_backward"):
            du, dm = compute(dy, dy if u is None else u, magnitude, norms, need_u, need_magnitude)
        return None, du, dm, None, linear.bias_gradient(dy, ctx.bias_dtype) if need_bias else None


class DoRALinearFunction(torch.autograd.Function):
    @staticmethod
    @not_compiled
    def forward(ctx, ops, x, weight, bias, lora_A, lora_B, magnitude, norms, scaling, rounded):
        _, need_x, _, _, need_a, _, need_m, *_ = ctx.needs_input_grad
        weight = linear.kept_weight(weight, x, need_x)
        with named("lora_fast::dora_linear"):
            y, s, kept = forward(ops, x, weight, bias, lora_A, lora_B, magnitude, norms, scaling, rounded)
        read, ctx.unread = linear.read_and_unread(weight, lora_A, lora_B, need_x, need_a or need_m)
        x = x if need_a or need_m else None
        ctx.save_for_backward(x, s, kept if need_m else None, *read, magnitude, norms)
        ctx.ops, ctx.scaling, ctx.rounded = ops, scaling, rounded
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @not_compiled
    def backward(ctx, dy):
        _, need_x, _, need_bias, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        needs, grads = (need_x, need_a, need_b, need_m), (None,) * 4
        if any(needs):
            x, s, kept, weight, lora_A, lora_B, magnitude, norms = ctx.saved_tensors
            weight, lora_A, lora_B = linear.restored((weight, lora_A, lora_B), ctx.unread)
            x = linear.unread_x(dy, lora_A, need_x and need_b) if x is None else x
            kept = dy.reshape(-1, dy.shape[-1]) if kept is None else kept  # it is not read
            is_seen = modes() > 0 and sees_ops()
            plain = not (torch.is_grad_enabled() or is_seen or torch.compiler.is_compiling()) and composite.is_plain(dy)
            arguments = weight, lora_A, lora_B, magnitude, norms, ctx.scaling, ctx.rounded, needs
            with named("lora_fast::dora_linear_backward"), torch.autocast(dy.device.type, enabled=False):
                compute = backward if plain else differentiable_backward
                grads = compute(ctx.ops, dy, x, s, kept, *arguments)
        dx, da, db, dm = grads
        dbias = linear.bias_gradient(dy, ctx.bias_dtype) if need_bias else None
        return None, dx, None, dbias, da, db, dm, None, None, None


def forward(ops, x, weight, bias, lora_A, lora_B, magnitude, norms, scaling, rounded) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, S and what backward needs of the product. The weight is cast to x's dtype."""
    weight = weight if weight.dtype is x.dtype else weight.to(x.dtype)
    result: tuple = ops.forward(x, weight, bias, lora_A, lora_B, magnitude, norms, scaling, rounded)
    return result


def backward(ops, dy, x, s, kept, weight, lora_A, lora_B, magnitude, norms, scaling, rounded, needs) -> tuple:
    """Returns dx, da, db and the gradient of the magnitude, each None where ``needs`` (four bools) is False."""
    if needs[0] and weight.dtype is not dy.dtype:  # only dx reads the weight
        weight = weight.to(dy.dtype)
    result: tuple = ops.backward(dy, x, s, kept, weight, lora_A, lora_B, magnitude, norms, scaling, rounded, needs)
    return result


def differentiable_backward(ops, dy, x, s, kept, weight, a, b, magnitude, norms, scaling, rounded, needs) -> tuple:
    """Returns what ``backward`` does, as functions that are differentiable again, or by ops that modes see."""
    need_x, need_a, need_b, need_m = needs
    u = composite.linear(x, weight.to(x.dtype), None, a, b, scaling, 0.0) if need_m else dy
    du, dm = reference.differentiable_backward(dy, u, magnitude, norms, need_x or need_a or need_b, need_m)
    if du is None:
        return None, None, None, dm
    is_second = torch.is_grad_enabled() or not composite.is_plain(dy)
    compute = linear.differentiable_backward if is_second else linear.backward_node
    linear_ops = backend.load_ops("linear", ops is not reference)
    arguments = du, x, s, weight, a, b, scaling, 0.0, None, rounded
    return *compute(linear_ops, *arguments, (need_x, need_a, need_b)), dm
