"""The column scale of a DoRA layer (Liu et al., arXiv 2402.09353) as a differentiable op:
y = (magnitude / norms)∘u + bias, where u = x (W + s b a)ᵀ is the result of the LoRA op, and the norms are those of the
rows of W + s b a. No gradient flows through the norms (section 4.3). u, magnitude and norms are saved. Second
derivatives are those of the twin, whose ops torch differentiates.
"""

from __future__ import annotations

import torch

from . import composite, linear
from .observers import named, not_compiled
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
