"""What is saved and which launcher runs.

Eager calls take ``LoRALinearFunction``, a bare autograd.Function (least host time); traced calls (torch.compile) take
the registered ops ``lora_fast::lora_linear`` and ``lora_fast::lora_linear_backward``. Both run ``forward`` and
``backward`` below. Saved for backward: x and S (the weights are the module's own); the dropout mask is drawn again from
its seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend, reference


def forward(ops, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    """y (..., d_out) and S (n_tokens, r) of x (..., d_in); weight and bias are cast to x's dtype."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    keep = None
    if dropout_p:
        keep, scaling = _mask(ops, rows, scaling, dropout_p, seed)
    if weight.dtype is not x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    s = ops.project(rows, lora_A, keep)
    y = ops.linear(rows, weight, bias, s, lora_B, scaling)
    return y if rows is x else y.view(*x.shape[:-1], weight.shape[0]), s


def backward(ops, dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs) -> tuple[Tensor | None, ...]:
    """dx, dbias, da, db, each None where ``needs`` (four bools in that order) says so."""
    need_x, need_bias, need_a, need_b = needs
    need_s = need_x or need_a
    dx = dbias = da = db = keep = None
    rows, dy_rows = x, dy
    if x.dim() != 2:
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if dropout_p and need_s:
        keep, scaling = _mask(ops, rows, scaling, dropout_p, seed)
    if need_s or need_b:
        ds, db = ops.grad_s_b(dy_rows, s, lora_B, scaling, need_s, need_b)
    if need_a:
        da = ops.grad_a(rows, ds, lora_A, keep)
    if need_x:
        dx = ops.grad_x(dy_rows, weight if weight.dtype is dy.dtype else weight.to(dy.dtype), ds, lora_A, keep)
        if rows is not x:
            dx = dx.view(x.shape)
    if need_bias:
        dbias = dy_rows.sum(0)
    return dx, dbias, da, db


def _ops(triton: bool):
    """The Triton launchers or their torch twins: two modules with the same functions. Forward chooses and backward
    follows: the two draw different dropout masks."""
    if not triton:
        return reference
    from .kernels import layer

    return layer


def _mask(ops, rows, scaling, dropout_p, seed):
    """The dropout mask as ``ops`` takes it, and scaling with 1/(1-p) in it."""
    return ops.draw_mask(seed, *rows.shape, dropout_p, rows.device), scaling * reference.keep_scale(dropout_p)


class LoRALinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
        ops = _ops(backend.uses_triton(x))
        y, s = forward(ops, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        ctx.save_for_backward(x, s, weight, lora_A, lora_B)
        ctx.ops, ctx.constants = ops, (scaling, dropout_p, seed)
        if bias is not None:
            ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # what once_differentiable would say, at a tenth of its host time
            raise RuntimeError("lora_linear has no second derivative: call backward without create_graph=True")
        need_x, _, need_bias, need_a, need_b, _, _, _ = ctx.needs_input_grad
        needs = need_x, need_bias, need_a, need_b
        dx, dbias, da, db = backward(ctx.ops, dy, *ctx.saved_tensors, *ctx.constants, needs)
        if need_bias and dbias.dtype is not ctx.bias_dtype:
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
    triton: bool,
) -> tuple[Tensor, Tensor]:
    return forward(_ops(triton), x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


@lora_linear_op.register_fake
def _(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, triton):
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
    triton: bool,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that ``needs`` (dx, dbias, da, db) asks for, in that order."""
    grads = backward(_ops(triton), dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs)
    return [grad for grad in grads if grad is not None]


@lora_linear_backward_op.register_fake
def _(dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, triton, needs):
    grads = x.new_empty(x.shape), dy.new_empty(weight.shape[0]), torch.empty_like(lora_A), torch.empty_like(lora_B)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _setup_context(ctx, inputs, output):
    x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, triton = inputs
    _, s = output
    ctx.save_for_backward(x, s, weight, lora_A, lora_B, seed)
    ctx.scaling, ctx.dropout_p, ctx.triton = scaling, dropout_p, triton
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dy, ds_unused):
    if dy is None:
        return (None,) * 9
    *tensors, seed = ctx.saved_tensors
    need_x, _, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    needs = [need_x, need_bias, need_a, need_b]
    grads = iter(lora_linear_backward_op(dy, *tensors, ctx.scaling, ctx.dropout_p, seed, ctx.triton, needs))
    dx, dbias, da, db = (next(grads) if needed else None for needed in needs)
    if dbias is not None:
        dbias = dbias.to(ctx.bias_dtype)
    return dx, None, dbias, da, db, None, None, None, None


lora_linear_op.register_autograd(_op_backward, setup_context=_setup_context)
