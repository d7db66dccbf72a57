"""The linear layers of all experts with their LoRA adapters as one differentiable op.

Rows are sorted by expert (``offsets``: the end of each expert's rows). The base product y_e = x_e W_eᵀ is torch's
grouped product; S_e = x_e a_eᵀ, the update s S_e b_eᵀ, and the gradients of the factors are ops of all experts at once
(``kernels.experts``, or their twins in ``reference.experts``). W + ΔW is never formed. x and S are saved.

As in linear.py, eager calls use an autograd.Function, and traced calls the registered ops ``lora_fast::grouped_linear``
and ``lora_fast::grouped_linear_backward``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from . import composite
from .observers import modes, named, not_compiled, profiled, sees_ops
from .reference import experts as reference

_traced, _any_autocast = torch.compiler.is_compiling, torch._C._is_any_autocast_enabled


def forward(ops, x, weight, lora_A, lora_B, scaling, offsets) -> tuple[Tensor, Tensor]:
    """Returns y (n, d_out) and S (n, r) of x (n, d_in). The weight is cast to x's dtype. Autocast, which has cast x, is
    turned off: the thin products keep the factors' precision."""
    if _any_autocast():
        with torch.autocast(x.device.type, enabled=False):
            return forward(ops, x, weight, lora_A, lora_B, scaling, offsets)
    s = ops.project(x, lora_A, offsets)
    y = reference.product(x, weight.to(x.dtype).mT, offsets, zero_rest=False)
    return ops.add_product(y, s, lora_B.mT, scaling, offsets), s


def backward(ops, dy, x, s, weight, lora_A, lora_B, scaling, offsets, needs) -> tuple:
    """Returns dx, da and db, each None where ``needs`` (three bools in that order) is False. Autocast is turned off,
    because backward may run in another region of it than forward."""
    if _any_autocast():
        with torch.autocast(x.device.type, enabled=False):
            return backward(ops, dy, x, s, weight, lora_A, lora_B, scaling, offsets, needs)
    need_x, need_a, need_b = needs
    dy = dy.contiguous()
    ds = ops.grad_s(dy, lora_B, scaling, offsets) if need_x or need_a else None
    da, db = ops.grad_factors(x, dy, s, ds, lora_A, lora_B, scaling, offsets, need_a, need_b)
    dx = None
    if need_x:
        dx = reference.product(dy, weight.to(dy.dtype), offsets, zero_rest=False)
        dx = ops.add_product(dx, ds, lora_A, 1.0, offsets)
    return dx, da, db


def _backward_observed(ops, *arguments) -> tuple:
    """Returns what ``backward`` returns, while a mode or a profiler looks."""
    if ops is not reference and sees_ops():
        return backward_node(ops, *arguments)
    with named("lora_fast::grouped_linear_backward"):
        return backward(ops, *arguments)


def _forward_observed(ops, x, weight, lora_A, lora_B, scaling, offsets) -> tuple[Tensor, Tensor]:
    """Returns what ``forward`` returns, while a mode or a profiler looks."""
    if ops is not reference and sees_ops():
        return grouped_linear_op(x, weight, lora_A, lora_B, float(scaling), offsets, True)
    with named("lora_fast::grouped_linear"):
        return forward(ops, x, weight, lora_A, lora_B, scaling, offsets)


def backward_node(ops, dy, x, s, weight, lora_A, lora_B, scaling, offsets, needs) -> tuple:
    """Returns what ``backward`` returns, by the registered op."""
    arguments = dy, x, s, weight, lora_A, lora_B, float(scaling), offsets, ops is not reference, list(needs)
    grads = iter(grouped_linear_backward_op(*arguments))
    return tuple(next(grads) if needed else None for needed in needs)


def differentiable_backward(ops, dy, x, s, weight, lora_A, lora_B, scaling, offsets, needs) -> tuple:
    """Returns what ``backward`` returns, as functions of dy, x, a and b that are differentiable again."""
    need_x, need_a, need_b = needs
    with torch.autocast(x.device.type, enabled=False):
        dx, s = None, reference.project(x, lora_A, offsets)
        ds = reference.grad_s(dy, lora_B, scaling, offsets)
        da, db = reference.grad_factors(x, dy, s, ds, lora_A, lora_B, scaling, offsets, need_a, need_b)
        if need_x:
            product = reference.product(dy.contiguous(), weight.to(dy.dtype), offsets)
            dx = (product + reference.update(ds, lora_A, offsets)).to(x.dtype)
        return dx, da, db


class GroupedLinearFunction(torch.autograd.Function):
    @staticmethod
    @not_compiled
    def forward(ctx, ops, x, weight, lora_A, lora_B, scaling, offsets):
        run = _forward_observed if modes() > 0 or profiled() else forward
        y, s = run(ops, x, weight, lora_A, lora_B, scaling, offsets)
        ctx.save_for_backward(x, s, weight, lora_A, lora_B, offsets)
        ctx.ops, ctx.scaling = ops, scaling
        return y

    @staticmethod
    @not_compiled
    def backward(ctx, dy):
        x, s, weight, lora_A, lora_B, offsets = ctx.saved_tensors
        _, need_x, _, need_a, need_b, *_ = ctx.needs_input_grad
        needs = need_x, need_a, need_b
        if _traced():
            compute = backward_node
        elif torch.is_grad_enabled() or not composite.is_plain(dy):
            compute = differentiable_backward
        else:
            compute = _backward_observed if modes() > 0 or profiled() else backward
        dx, da, db = compute(ctx.ops, dy, x, s, weight, lora_A, lora_B, ctx.scaling, offsets, needs)
        return None, dx, None, da, db, None, None


@torch.library.custom_op("lora_fast::grouped_linear", mutates_args=())
def grouped_linear_op(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, offsets: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    y, s = forward(backend.load_ops("experts", triton), x, weight, lora_A, lora_B, scaling, offsets)
    return y.contiguous(), s.contiguous()  # the strides that graphs expect


@grouped_linear_op.register_fake
def _(x, weight, lora_A, lora_B, scaling, offsets, triton):
    wide = torch.promote_types(x.dtype, lora_A.dtype)
    return x.new_empty((len(x), weight.shape[1])), x.new_empty((len(x), lora_A.shape[1]), dtype=wide)


@torch.library.custom_op("lora_fast::grouped_linear_backward", mutates_args=())
def grouped_linear_backward_op(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    offsets: Tensor,
    triton: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Returns those of the gradients dx, da and db for which ``needs`` is True, in that order."""
    arguments = dy, x, s, weight, lora_A, lora_B, scaling, offsets, tuple(needs)
    grads = backward(backend.load_ops("experts", triton), *arguments)
    return [grad.contiguous() for grad in grads if grad is not None]  # the strides that graphs expect


@grouped_linear_backward_op.register_fake
def _(dy, x, s, weight, lora_A, lora_B, scaling, offsets, triton, needs):
    grads = x.new_empty(x.shape), lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _setup_context(ctx, inputs, output):
    x, weight, lora_A, lora_B, scaling, offsets, triton = inputs
    ctx.save_for_backward(x, output[1], weight, lora_A, lora_B, offsets)
    ctx.scaling, ctx.triton = scaling, triton


def _op_backward(ctx, dy, _):
    x, s, weight, lora_A, lora_B, offsets = ctx.saved_tensors
    need_x, _, need_a, need_b, *_ = ctx.needs_input_grad
    ops = backend.load_ops("experts", ctx.triton)
    needs = need_x, need_a, need_b
    dx, da, db = backward_node(ops, dy, x, s, weight, lora_A, lora_B, ctx.scaling, offsets, needs)
    return dx, None, da, db, None, None, None


grouped_linear_op.register_autograd(_op_backward, setup_context=_setup_context)


@torch.library.custom_op("lora_fast::grouped_product", mutates_args=())
def grouped_product_op(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Returns ``reference.product`` of rows (n, k) and a frozen weight (E, k, m)."""
    return reference.product(rows, weight, offsets).contiguous()


@grouped_product_op.register_fake
def _(rows, weight, offsets):
    return rows.new_empty((len(rows), weight.shape[2]))


def _product_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _product_backward(ctx, dy):
    weight, offsets = ctx.saved_tensors
    return grouped_product_op(dy.contiguous(), weight.mT, offsets), None, None


grouped_product_op.register_autograd(_product_backward, setup_context=_product_setup_context)
