"""Compiled layers on the torch ops: replaces the registered ops by plain ones in the graphs of Inductor, which is
torch.compile's default backend.

The compiler cannot look into a registered op, and its call has a cost. The replacement runs on the graphs of forward
and of backward, after it is decided what is saved between them, so x and S are saved as by the op. Inductor fuses the
plain ops with what comes before and after: the sum of the parts of y and of dx, and the dropout mask. Other backends
of torch.compile, the kernels, and what ``_is_plain`` excludes keep the ops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..at_import import after_import
from ..checks import NUMBERS
from . import linear
from .reference import linear as reference


def forward(x, weight, bias, lora_A, lora_B, seed, scaling: float, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Returns y and S as ``linear.forward`` does, by functional ops."""
    rows = kept = x.reshape(-1, x.shape[-1])
    if dropout_p:
        kept, scaling = rows * reference.draw_mask(x, dropout_p, seed), scaling * reference.keep_scale(dropout_p)
    s = kept @ lora_A.mT
    shape = *x.shape[:-1], weight.shape[0]  # the parts have it, so that their sum is fused with what follows
    return F.linear(rows, weight, bias).view(shape) + (s @ (lora_B * scaling).mT).view(shape), s


def backward(dy, x, s, weight, lora_A, lora_B, seed, scaling: float, dropout_p: float, needs) -> list[Tensor]:
    """Returns the needed ones of dx, da and db as ``linear.lora_linear_backward_op`` does, by functional ops."""
    need_x, need_a, need_b = needs
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    keep, grads = None, []
    if dropout_p:
        keep, scaling = reference.draw_mask(x, dropout_p, seed), scaling * reference.keep_scale(dropout_p)
    ds = dy_rows @ (lora_B * scaling)
    if need_x:
        part = ds @ lora_A if keep is None else (ds @ lora_A) * keep
        grads.append((dy_rows @ weight).view(x.shape) + part.view(x.shape))
    if need_a:
        grads.append(ds.mT @ (rows if keep is None else rows * keep))
    if need_b:  # as (Sᵀ dy)ᵀ, which MKL computes in half the time of dyᵀ S
        grads.append(((s.mT @ dy_rows) * scaling).mT.contiguous())
    return grads


def _is_plain(scaling: Any, seed: Any, triton: bool, *nodes: Any) -> bool:
    """Returns whether the functions above compute what the op does: on the torch ops, with constants, with a mask that
    a compiler can draw, and on tensors of one dtype, whose precision is enough for one more rounding than the op's."""
    dtypes = {node.meta["val"].dtype for node in nodes}
    drawn = seed is None or seed.meta["val"].dtype is not torch.int64
    return not triton and type(scaling) in NUMBERS and drawn and len(dtypes) == 1 and dtypes.pop().itemsize >= 4


def _replace_forward(match, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, rounded, triton) -> None:
    if _is_plain(scaling, seed, triton, x, weight, lora_A, lora_B):
        compute = partial(forward, scaling=scaling, dropout_p=dropout_p)
        _replace(match, compute, x, weight, bias, lora_A, lora_B, seed)


def _replace_backward(
    match, dy, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, rounded, triton, needs
) -> None:
    tensors = dy, x, s, weight, lora_A, lora_B
    if any(needs) and _is_plain(scaling, seed, triton, *tensors):
        compute = partial(backward, scaling=scaling, dropout_p=dropout_p, needs=needs)
        # A list of one result would be taken for the result itself.
        _replace(match, lambda *tensors: [*compute(*tensors), None], *tensors, seed)


def _replace(match, compute: Callable, *nodes: Any) -> None:
    """Puts the ops of ``compute`` at the place of the match. Some of its arguments may be None."""

    def call(*tensors):
        rest = iter(tensors)
        return compute(*(None if node is None else next(rest) for node in nodes))

    match.replace_by_example(call, [node for node in nodes if node is not None])


def register() -> None:
    """Adds the replacements to Inductor's own, which run once for each graph. Where a version of torch has none of this
    name, compiled layers keep the ops."""
    from torch._inductor import pattern_matcher
    from torch._inductor.fx_passes import post_grad

    if not hasattr(post_grad, "pass_patterns") or not hasattr(pattern_matcher, "CallFunctionVarArgs"):
        return
    for op, replace in ((linear.lora_linear_op, _replace_forward), (linear.lora_linear_backward_op, _replace_backward)):
        pattern = pattern_matcher.CallFunctionVarArgs(op._opoverload)
        pattern_matcher.register_graph_pattern(pattern, pass_dict=post_grad.pass_patterns[0])(replace)


after_import("torch._inductor.fx_passes.post_grad", register)
