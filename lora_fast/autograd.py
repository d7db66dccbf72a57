"""What is saved and which launcher runs.

Eager calls take ``LoRALinearFunction``, a bare autograd.Function (least host time); traced calls (torch.compile) take
the registered ops ``lora_fast::lora_linear`` and ``lora_fast::lora_linear_backward``. Both run ``forward`` and
``backward`` below. Saved for backward: x and S (the weights are the module's own); the dropout mask is drawn again from
its seed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend, reference


def forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    """y (..., d_out) and S (n_tokens, r) of x (..., d_in); weight and bias are cast to x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    ops = _ops(x)
    keep, scale = _mask(ops, rows, scaling, dropout_p, seed)
    s = ops.project(rows, lora_A, scale, keep)
    y = ops.linear(rows, weight, bias, s, lora_B)
    return y.view(*x.shape[:-1], weight.shape[0]), s


def backward(dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs) -> list[Tensor | None]:
    """dx, dbias, da, db, each None where ``needs`` (four bools in that order) says so."""
    need_x, need_bias, need_a, need_b = needs
    dy_rows, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    ops = _ops(dy)
    dx = da = db = None
    if need_x or need_a or need_b:
        ds, db = ops.grad_s_b(dy_rows, s, lora_B, need_x or need_a, need_b)
    if need_x or need_a:
        keep, scale = _mask(ops, rows, scaling, dropout_p, seed)
    if need_a:
        da = ops.grad_a(rows, ds, lora_A, scale, keep)
    if need_x:
        dx = ops.grad_x(dy_rows, weight.to(dy.dtype), ds, lora_A, scale, keep).view(x.shape)
    return [dx, dy_rows.sum(0) if need_bias else None, da, db]


def _ops(tensor: Tensor):
    """The Triton launchers or their torch twins: two modules with the same functions."""
    if not backend.uses_triton(tensor.device, tensor.dtype):
        return reference
    from .kernels import layer

    return layer


def _mask(ops, rows, scaling, dropout_p, seed):
    """The dropout mask as ``ops`` takes it (None without dropout), and scaling with 1/(1-p) in it."""
    if dropout_p == 0.0:
        return None, scaling
    return ops.draw_mask(seed, *rows.shape, dropout_p, rows.device), scaling * reference.keep_scale(dropout_p)


class LoRALinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
        y, s = forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        ctx.save_for_backward(x, s, weight, lora_A, lora_B)
        ctx.constants = scaling, dropout_p, seed
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, weight, lora_A, lora_B = ctx.saved_tensors
        need_x, _, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        needs = (need_x, need_bias, need_a, need_b)
        dx, dbias, da, db = backward(dy, x, s, weight, lora_A, lora_B, *ctx.constants, needs)
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        return dx, None, dbias, da, db, None, None, None


@torch.library.custom_op("lora_fast::lora_linear", mutates_args=())
def lora_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


@lora_linear_op.register_fake
def _(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    n_tokens = x.numel() // x.shape[-1]
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((n_tokens, lora_A.shape[0]))


@torch.library.custom_op("lora_fast::lora_linear_backward", mutates_args=())
def lora_linear_backward_op(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that ``needs`` (dx, dbias, da, db) asks for, in that order."""
    grads = backward(dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs)
    return [grad for grad in grads if grad is not None]


@lora_linear_backward_op.register_fake
def _(dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    grads = x.new_empty(x.shape), dy.new_empty(weight.shape[0]), torch.empty_like(lora_A), torch.empty_like(lora_B)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _setup_context(ctx, inputs, output):
    x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed = inputs
    _, s = output
    ctx.save_for_backward(x, s, weight, lora_A, lora_B, seed)
    ctx.constants = scaling, dropout_p
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dy, ds_unused):
    if dy is None:
        return (None,) * 8
    x, s, weight, lora_A, lora_B, seed = ctx.saved_tensors
    need_x, _, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    needs = [need_x, need_bias, need_a, need_b]
    grads = iter(lora_linear_backward_op(dy, x, s, weight, lora_A, lora_B, *ctx.constants, seed, needs))
    dx, dbias, da, db = (next(grads) if needed else None for needed in needs)
    if dbias is not None:
        dbias = dbias.to(ctx.bias_dtype)
    return dx, None, dbias, da, db, None, None, None


lora_linear_op.register_autograd(_op_backward, setup_context=_setup_context)
