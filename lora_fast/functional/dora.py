"""The public function of a DoRA layer, and its parts: the norms of the rows, which a layer caches, and the column
scale, which follows the LoRA op."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend, checks
from ..ops import composite, seeds
from ..ops import dora as dora_op
from ..ops import linear as linear_op
from ..ops.observers import modes, sees_ops
from .linear import casts, check, checked, in_autocast, is_autocast_on, lora_linear, narrow, reason_against_op

_apply = super(torch.autograd.Function, dora_op.ColumnScaleFunction).apply  # as linear._apply
_apply_linear = super(torch.autograd.Function, dora_op.DoRALinearFunction).apply


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """A frozen linear layer with a DoRA adapter (Liu et al., arXiv 2402.09353, eq. 5):
    ``y = (magnitude / ‖W + scaling · b a‖)∘(x (W + scaling · b a)ᵀ) + bias``, the norm that of each row.

    It computes what PEFT's layer does: the norms get no gradient, and are rounded to lora_A's dtype. With dropout, the
    product of what is kept of x is scaled, and the product of what is dropped is not: ``y = c∘u(x') + (x - x') Wᵀ +
    bias`` for x' = dropout(x), c = magnitude / norms and u by ``lora_linear``. b a is never formed.

    Args:
        x, weight, bias, lora_A, lora_B, dropout_p, seed: as ``lora_linear``. The mask is torch's own, as nn.Dropout
            draws it, unless there is a seed.
        magnitude: (d_out,), any floating dtype.
        scaling: a finite number.

    Returns:
        y (..., d_out) in x's dtype (the autocast dtype under autocast). Each gradient has its argument's dtype.

    Raises:
        ArgumentError, BackendError: as ``lora_linear``.
    """
    scaling = checks.finite(scaling, "scaling")
    dropout_p = checks.probability(dropout_p, "dropout_p")
    check_row_values("magnitude", magnitude, weight)
    if bias is not None:
        check_row_values("bias", bias, weight)
    for name, tensor in (("x", x), ("lora_A", lora_A), ("lora_B", lora_B)):
        checks.tensor(tensor, name)
    check(x, weight, None, lora_A, lora_B, scaling, dropout_p)
    dropped = x if dropout_p == 0.0 else _dropout(x, dropout_p, seed)
    norms = weight_norms(weight, lora_A, lora_B, scaling)
    y = scaled_linear(dropped, weight, bias if dropout_p == 0.0 else None, lora_A, lora_B, magnitude, norms, scaling)
    return y if dropout_p == 0.0 else plus_dropped(y, x, dropped, weight, bias)


def weight_norms(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, squares: Tensor | None = None
) -> Tensor:
    """Returns the norms of the rows of W + scaling · b a, (d_out,) in lora_A's dtype, detached, for arguments of
    ``lora_linear``. ``squares``: ``row_squares(weight)`` if the caller keeps them; the kernels do not need them."""
    kind, tensors = weight.device.type, (weight, lora_A, lora_B)
    with torch.no_grad(), torch.autocast(kind, enabled=False) if is_autocast_on(kind) else nullcontext():
        if torch.compiler.is_compiling() or sees_ops() or composite.reason_for_parameters(tensors) is not None:
            norms = dora_op.reference.written_norms(weight, lora_A, lora_B, scaling)
            return norms.detach()  # of forward-mode derivatives, too
        triton = backend.uses_triton(weight)
        a, b = (narrow(factor) if triton else factor for factor in (lora_A, lora_B))
        norms = backend.load_ops("dora", triton).weight_norms(weight, a, b, scaling, squares)
        return norms.to(lora_A.dtype)


def scaled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norms: Tensor,
    scaling: float | Tensor,
) -> Tensor:  # fmt: skip
    """Returns (magnitude / norms)∘u + bias with u = x (W + scaling · b a)ᵀ, for arguments of ``dora_linear`` and the
    norms of the rows. One op computes it, or in graphs, transforms and under modes of torch ``lora_linear`` and
    ``column_scale``."""
    is_seen = torch.compiler.is_compiling() or (modes() > 0 and sees_ops())
    if is_seen or (reason_against_op(x, weight, lora_A, lora_B) or reason_against_op(x, weight, magnitude, norms)):
        return column_scale(lora_linear(x, weight, None, lora_A, lora_B, scaling), magnitude, norms, bias)
    rounded = casts(x, weight)
    weight, bias, lora_A, lora_B, scaling, _ = checked(x, rounded, weight, bias, lora_A, lora_B, scaling, 0.0)
    if rounded:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    ops = backend.load_ops("dora", backend.forward_uses_triton(x))
    arguments = x, weight, bias, lora_A, lora_B, magnitude, norms, scaling, rounded
    return _apply_linear(ops, *arguments) if torch.is_grad_enabled() else dora_op.forward(ops, *arguments)[0]


def column_scale(u: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (magnitude / norms)∘u + bias, (..., d_out) in u's dtype, differentiable in all but the norms."""
    if (
        torch.compiler.is_compiling()
        or (modes() > 0 and sees_ops())
        or composite.reason(u, norms, magnitude, magnitude) is not None
    ):
        return dora_op.reference.column_scale(u, magnitude, norms, bias)  # what modes see can be differentiated again
    return _apply(backend.load_ops("dora", backend.forward_uses_triton(u)), u, magnitude, norms, bias)


def plus_dropped(y: Tensor, x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns y plus the frozen layer's result of what dropout has taken from x, (x - kept) Wᵀ + bias."""
    rest = x - kept
    if in_autocast(x):
        return y + F.linear(rest, weight, bias)
    return y + F.linear(rest, weight, None if bias is None else bias.to(rest.dtype))


def check_row_values(name: str, values: Tensor, weight: Tensor) -> None:
    """Raises ArgumentError if ``values`` are not one float for each row of the weight, on its device."""
    if checks.tensor(weight, "weight").dim() != 2:
        raise checks.ArgumentError("weight", "shape (d_out, d_in)", tuple(weight.shape))
    expected = f"a dense tensor of floats, shape ({len(weight)},), to fit weight"
    values = checks.tensor(values, name)
    is_dense = values.layout is checks.STRIDED and values.dtype in checks.FLOATS
    if not is_dense or tuple(values.shape) != (len(weight),):
        raise checks.ArgumentError(name, expected, f"{checks.shown(values)}, {values.layout}")
    if values.device != weight.device:
        raise checks.ArgumentError(name, f"a tensor on weight's device {weight.device}", values.device)


def _dropout(x: Tensor, dropout_p: float, seed: int | None) -> Tensor:
    if seed is None:
        return F.dropout(x, dropout_p)
    seeds.check(seed)
    kept = linear_op.mask_like(x, dropout_p, seed)
    return x * kept * linear_op.reference.keep_scale(dropout_p)
