"""The linear layer with its LoRA adapter as a differentiable op.

Eager calls use ``LoRALinearFunction``, a bare autograd.Function, which takes the least host time. Traced calls
(torch.compile, compiled autograd) use the registered ops ``lora_fast::lora_linear`` and
``lora_fast::lora_linear_backward``; so does the Function for kernels while a mode of torch is active (observers.py).
Both run ``forward`` and ``backward`` below. x and S are saved for backward, beside the module's own weights; the
dropout mask is drawn again from its seed. ``seed`` is an int or an int64 in a 0-d tensor. In traced calls of the torch
ops it is two int32 keys of another mask, which a compiler draws (inductor.py), unless the caller gives a seed. With the
torch ops on a GPU it is the mask itself, which is saved as well. Where backward itself is differentiated or mapped
(``create_graph=True``, ``is_grads_batched=True``) it computes the gradients by plain torch ops
(``composite.linear_gradients``).
"""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor

from .. import backend
from . import composite, quantized
from .observers import modes, named, not_compiled, profiled, sees_ops
from .reference import linear as reference

# Looked up once, because attribute accesses cost host time in every call.
_traced, _any_autocast = torch.compiler.is_compiling, torch._C._is_any_autocast_enabled


def bernoulli_mask(x: Tensor, dropout_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Returns a dropout mask of x (..., d_in), bool (n_tokens, d_in), drawn on x's device without waiting for it. With
    no generator it is the device's default one."""
    d_in = x.shape[-1]
    kept = 1.0 - reference.drop_level(dropout_p) / reference.DROP_LEVELS
    mask = torch.empty((x.numel() // d_in, d_in), dtype=torch.bool, device=x.device)
    return mask.bernoulli_(kept, generator=generator)


def forward(ops, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, rounded) -> tuple[Tensor, Tensor]:
    """Returns y (..., d_out) and S (n_tokens, r) of x (..., d_in). Weight and bias are cast to x's dtype; with
    ``rounded`` (autocast) the factors are rounded to it, too."""
    if weight.dtype is None:
        (y,), (s,) = quantized.forward(ops, x, [(weight, bias, lora_A, lora_B, scaling, dropout_p, seed)])
        return y, s
    keep = None
    if dropout_p:
        keep, scaling = ops.draw_mask(x, dropout_p, seed), scaling * reference.keep_scale(dropout_p)
    if weight.dtype is not x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    return ops.forward(x, weight, bias, lora_A, lora_B, scaling, keep, rounded)


def backward(ops, dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, rounded, needs) -> tuple:
    """Returns dx, da and db, each None where ``needs`` (three bools in that order) is False. Autocast is turned off,
    because forward has already cast the tensors, and backward may run in another autocast region than forward."""
    if _any_autocast():
        with torch.autocast(x.device.type, enabled=False):
            return backward(ops, dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, rounded, needs)
    if weight.dtype is None:
        member, (need_x, need_a, need_b) = (weight, None, lora_A, lora_B, scaling, dropout_p, seed), needs
        dx, (da,), (db,) = quantized.backward(ops, [dy], x, [s], [member], (need_x, [need_a], [need_b]))
        return dx, da, db
    keep = None
    if dropout_p:
        scaling *= reference.keep_scale(dropout_p)
        if needs[0] or needs[1]:  # db = scaling · dyᵀ S needs no mask: S was computed from the masked x
            keep = ops.draw_mask(x, dropout_p, seed)
    if needs[0] and weight.dtype is not dy.dtype:  # only dx reads the weight
        weight = weight.to(dy.dtype)
    return ops.backward(dy, x, s, weight, lora_A, lora_B, scaling, keep, rounded, needs)


def differentiable_backward(ops, dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, rounded, needs) -> tuple:
    """Returns what ``backward`` returns, as functions of dy, x, a and b that are differentiable again."""
    keep = None
    if dropout_p:
        scaling *= reference.keep_scale(dropout_p)
        keep = mask(ops, x.detach(), dropout_p, seed)
    with torch.autocast(x.device.type, enabled=False):
        s = None if needs[1] else s  # without a gradient of a, x is not kept
        return composite.linear_gradients(dy, x, s, weight, lora_A, lora_B, scaling, keep, rounded, needs)


def mask(ops, x: Tensor, dropout_p: float, seed: int | Tensor) -> Tensor:
    """Returns the dropout mask of a seed, bool (n_tokens, d_in), as these ops draw it."""
    if ops is reference:
        return reference.draw_mask(x, dropout_p, seed)
    d_in = x.shape[-1]
    return reference.philox_mask(seed, x.numel() // d_in, d_in, dropout_p, x.device)


def mask_like(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    """Returns the torch ops' dropout mask of a seed in x's shape, on x's device."""
    return reference.draw_mask(x, dropout_p, seed).to(x.device).view(x.shape)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=dtype)  # torch sums in float32 at least


def is_checkpointed() -> bool:
    """Returns whether activation checkpointing runs this forward: inside a backward, which needs what is saved at once,
    or under its hooks, which discard what is saved until then. Both runs of a forward must save the same dtypes."""
    if torch._C._current_graph_task_id() != -1:
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__


def _forward_observed(ops, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, rounded) -> tuple:
    """Returns what ``forward`` returns, while a mode or a profiler looks. Kernels are visible to a mode by the
    registered op, the twins by their products, and of a quantised layer the library's product."""
    if ops is not reference and sees_ops() and weight.dtype is not None:
        constants = float(scaling), dropout_p, _seed_tensor(seed, x), rounded, True
        return lora_linear_op(x, weight, bias, lora_A, lora_B, *constants)
    with named("lora_fast::lora_linear"):
        return forward(ops, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, rounded)


def forward_without_grad(ops, *arguments) -> Tensor:
    """Returns y as ``forward`` does, and records nothing for a backward."""
    return (_forward_observed if modes() > 0 or profiled() else forward)(ops, *arguments)[0]


def _backward_observed(ops, dy, x, s, weight, *arguments) -> tuple:
    """Returns what ``backward`` returns, while a mode or a profiler looks."""
    if ops is not reference and sees_ops() and weight.dtype is not None:
        return backward_node(ops, dy, x, s, weight, *arguments)
    with named("lora_fast::lora_linear_backward"):
        return backward(ops, dy, x, s, weight, *arguments)


def _seed_tensor(seed: int | Tensor | None, x: Tensor) -> Tensor | None:
    return torch.full((), seed, dtype=torch.int64, device=x.device) if isinstance(seed, int) else seed


def backward_node(ops, dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, rounded, needs) -> tuple:
    """Returns what ``backward`` returns, by the registered op, or of a quantised layer by plain torch ops. Compiled
    autograd traces the backward of an eager forward, and it cannot trace the kernels and NumPy."""
    if weight.dtype is None:
        arguments = weight, lora_A, lora_B, scaling, dropout_p, seed, rounded, needs
        return differentiable_backward(ops, dy, x, s, *arguments)
    need_x, need_a, need_b = needs
    seed, triton = _seed_tensor(seed, x), ops is not reference
    constants = float(scaling), dropout_p, seed, rounded, triton, [need_x, need_a, need_b]
    grads = iter(lora_linear_backward_op(dy, x, s, weight, lora_A, lora_B, *constants))
    return tuple(next(grads) if needed else None for needed in needs)


def unread_x(dy: Tensor, lora_A: Tensor, is_second: bool) -> Tensor:
    """Returns a tensor without defined values in place of x, which is not kept where a is frozen."""
    if is_second and torch.is_grad_enabled():
        raise RuntimeError("second derivatives of a layer with a frozen lora_A: set lora_A.requires_grad_(True)")
    return dy.new_empty((*dy.shape[:-1], lora_A.shape[1]))


def kept_weight(weight: Tensor, x: Tensor, need_x: bool) -> Tensor:
    """Returns the weight that forward keeps for backward, which would cast it again. A copy is kept only where it does
    not live from forward to backward."""
    if weight.dtype is x.dtype or weight.dtype is None or not need_x:
        return weight
    return weight.to(x.dtype) if is_checkpointed() else weight


def read_and_unread(weight, lora_A, lora_B, need_x: bool, need_a: bool) -> tuple[tuple, tuple]:
    """Returns the three tensors twice, with None in place of those that backward does not read, and of those that it
    reads. What it does not read may be changed in place, and need not be saved. A quantised weight is no tensor to
    save: its layer has it."""
    read_weight = need_x and weight.dtype is not None
    read = weight if read_weight else None, *((lora_A, lora_B) if need_x or need_a else (None, None))
    return read, (None if read_weight else weight, *((None, None) if need_x or need_a else (lora_A, lora_B)))


def restored(saved: tuple, unread: tuple) -> tuple:
    """Returns the three tensors of ``read_and_unread``."""
    return tuple(u if tensor is None else tensor for tensor, u in zip(saved, unread, strict=True))


class LoRALinearFunction(torch.autograd.Function):
    @staticmethod
    @not_compiled
    def forward(ctx, ops, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, rounded):
        _, need_x, _, _, need_a = ctx.needs_input_grad[:5]
        weight = kept_weight(weight, x, need_x)
        run = _forward_observed if modes() > 0 or profiled() else forward
        y, s = run(ops, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, rounded)
        seed_tensor, seed = (seed, None) if isinstance(seed, Tensor) else (None, seed)
        if need_x and need_a and weight.dtype is not None:
            ctx.save_for_backward(x, s, weight, lora_A, lora_B, seed_tensor)
            ctx.unread = None
        else:
            read, ctx.unread = read_and_unread(weight, lora_A, lora_B, need_x, need_a)
            ctx.save_for_backward(x if need_a else None, s, *read, seed_tensor)
        ctx.ops = ops  # kept for backward: the two modules draw different dropout masks
        ctx.constants = scaling, dropout_p, seed, rounded
        if bias is not None:
            ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @not_compiled
    def backward(ctx, dy):
        needs, need_bias = needs_of(ctx), ctx.needs_input_grad[3]
        dx = dbias = da = db = None
        if any(needs):
            if _traced():
                compute = backward_node
            elif torch.is_grad_enabled() or not composite.is_plain(dy):
                compute = differentiable_backward
            else:
                compute = _backward_observed if modes() > 0 or profiled() else backward
            dx, da, db = compute(ctx.ops, dy, *saved_arguments(ctx, dy, needs), needs)
        if need_bias:
            dbias = bias_gradient(dy, ctx.bias_dtype)
        return None, dx, None, dbias, da, db, None, None, None, None


def needs_of(ctx) -> tuple[bool, bool, bool]:
    """Returns which gradients of x, a and b a LoRALinearFunction needs."""
    _, need_x, _, _, need_a, need_b = ctx.needs_input_grad[:6]
    return need_x, need_a, need_b


def saved_arguments(ctx, dy: Tensor, needs: tuple[bool, bool, bool]) -> tuple:
    """Returns the arguments of ``backward`` between dy and needs, from what a LoRALinearFunction has saved."""
    x, s, weight, lora_A, lora_B, seed_tensor = ctx.saved_tensors
    scaling, dropout_p, seed, rounded = ctx.constants
    if ctx.unread is not None:
        weight, lora_A, lora_B = restored((weight, lora_A, lora_B), ctx.unread)
        need_x, need_a, need_b = needs
        x = x if need_a else unread_x(dy, lora_A, need_x and need_b)
    seed = seed if seed_tensor is None else seed_tensor
    return x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, rounded


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
    rounded: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    return forward(
        backend.load_ops("linear", triton), x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, rounded
    )


def _wider(x: torch.dtype, factor: torch.dtype, triton: bool) -> torch.dtype:
    """Returns the wider of both dtypes, for the kernels at most float32."""
    wide = torch.promote_types(x, factor)
    return torch.float32 if triton and wide is torch.float64 else wide


@lora_linear_op.register_fake
def _(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, rounded, triton):
    n_tokens = x.numel() // x.shape[-1]
    s = x.new_empty((n_tokens, lora_A.shape[0]), dtype=x.dtype if rounded else _wider(x.dtype, lora_A.dtype, triton))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), s


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
    rounded: bool,
    triton: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Returns those of the gradients dx, da and db for which ``needs`` is True, in that order."""
    need_x, need_a, need_b = needs
    dx = da = db = None
    if need_x or need_a or need_b:
        constants = scaling, dropout_p, seed, rounded, (need_x, need_a, need_b)
        dx, da, db = backward(backend.load_ops("linear", triton), dy, x, s, weight, lora_A, lora_B, *constants)
    return [grad for grad in (dx, da, db) if grad is not None]


@lora_linear_backward_op.register_fake
def _(dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, rounded, triton, needs):
    factors = lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)  # contiguous, whatever the factors are
    grads = x.new_empty(x.shape), *factors
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _setup_context(ctx, inputs, output):
    x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, rounded, triton = inputs
    _, s = output
    ctx.save_for_backward(x, s, weight, lora_A, lora_B, seed)
    ctx.constants, ctx.backend = (scaling, dropout_p), (rounded, triton)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dy, ds_unused):
    if dy is None:  # only S, which has no gradient, was used
        return (None,) * 10
    *tensors, seed = ctx.saved_tensors
    need_x, _, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    needs = [need_x, need_a, need_b]
    grads = iter(lora_linear_backward_op(dy, *tensors, *ctx.constants, seed, *ctx.backend, needs))
    dx, da, db = (next(grads) if needed else None for needed in needs)
    dbias = bias_gradient(dy, ctx.bias_dtype) if need_bias else None
    return dx, None, dbias, da, db, None, None, None, None, None


lora_linear_op.register_autograd(_op_backward, setup_context=_setup_context)
