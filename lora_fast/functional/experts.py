"""The public function of the linear layers of all experts with their LoRA adapters: checks the arguments, then runs the
op, or plain torch ops where the op cannot serve the call."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend, checks
from ..ops import experts as experts_op
from .linear import in_autocast, narrow, reason_against_op

_apply = super(torch.autograd.Function, experts_op.GroupedLinearFunction).apply  # as linear._apply


def lora_grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    offsets: Tensor,
) -> Tensor:
    """Frozen linear layers of the experts of a mixture, each with its LoRA adapter, as one differentiable op:
    ``y_e = x_e W_eᵀ + bias_e + scaling · x_e a_eᵀ b_eᵀ`` for the rows x_e that are routed to expert e.

    W + ΔW is never formed, and no launch depends on the number of experts or on the routing. Only x and S = x aᵀ are
    saved for backward. The base product is ``torch.nn.functional.grouped_mm``. Under autocast x and weight are cast to
    the autocast dtype; the factors keep their own.

    Plain torch ops run where the op cannot serve the call, as in ``lora_linear``. The gradients are differentiable
    again (``create_graph=True``).

    Args:
        x: (n, d_in), sorted by expert; float16, bfloat16, float32 or (torch backend) float64.
        weight: (E, d_out, d_in) in x's dtype, any strides (a stack of (d_in, d_out) as its ``.mT``); frozen.
        bias: (E, d_out), or None.
        lora_A: (E, r, d_in), r from 1 to 256, any floating dtype and strides.
        lora_B: (E, d_out, r), likewise.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        offsets: int32 (E,), the end of each expert's rows: expert e has the rows from offsets[e - 1] (0 for the first)
            to offsets[e]. They do not decrease. Rows from offsets[-1] on belong to no expert: their y and their
            gradient are 0. On a GPU the values are not checked, since the host would have to wait for them.

    Returns:
        y (n, d_out) in x's dtype (the autocast dtype under autocast). Each gradient has its argument's dtype.

    Raises:
        ArgumentError: shapes, dtypes, devices or values that do not fit.
        BackendError: the Triton backend is chosen and cannot run here.
    """
    _check(x, weight, bias, lora_A, lora_B, scaling, offsets)
    if in_autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if reason_against_op(x, weight, lora_A, lora_B) is not None:
        y = _composite(x, weight, lora_A, lora_B, scaling, offsets)
    elif torch.compiler.is_compiling():
        triton = backend.uses_triton(x)
        lora_A, lora_B = (narrow(factor) if triton else factor for factor in (lora_A, lora_B))
        y = experts_op.grouped_linear_op(x, weight, lora_A, lora_B, float(scaling), offsets, triton)[0]
    else:
        triton = backend.forward_uses_triton(x)
        lora_A, lora_B = (narrow(factor) if triton else factor for factor in (lora_A, lora_B))
        ops = backend.load_ops("experts", triton)
        y = _apply(ops, x.contiguous(), weight, lora_A, lora_B, float(scaling), offsets.contiguous())
    return y if bias is None else plus_bias(y, bias, offsets)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """The experts' linear layers without adapters, ``y_e = x_e W_eᵀ + bias_e``; arguments as ``lora_grouped_linear``.
    The weight may be trained."""
    is_in_graph = torch.compiler.is_compiling() and not weight.requires_grad
    product = experts_op.grouped_product_op if is_in_graph else experts_op.reference.product
    y = product(x, weight.to(x.dtype).mT, offsets)
    return y if bias is None else plus_bias(y, bias, offsets)


def plus_bias(y: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Returns y plus the bias (E, d_out) of each row's expert, 0 for rows of none."""
    rest = bias.new_zeros((1, bias.shape[1]))
    return y + torch.cat((bias, rest))[experts_op.reference.experts_of(offsets, len(y))].to(y.dtype)


def _composite(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, offsets: Tensor) -> Tensor:
    s = experts_op.reference.project(x, lora_A, offsets)
    update = experts_op.reference.update(s, lora_B.mT, offsets) * scaling
    return (experts_op.reference.product(x, weight.to(x.dtype).mT, offsets) + update).to(x.dtype)


def _check(x, weight, bias, lora_A, lora_B, scaling, offsets) -> None:
    named = {"x": x, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "offsets": offsets}
    for name, tensor in named.items():
        if tensor is None and name == "bias":
            continue
        if checks.tensor(tensor, name).device != x.device:
            raise checks.ArgumentError(name, f"a tensor on x's device {x.device}", tensor.device)
        if tensor.layout is not checks.STRIDED:
            raise checks.ArgumentError(name, "a dense tensor", tensor.layout)
        if name != "offsets" and tensor.dtype not in checks.FLOATS:
            raise checks.ArgumentError(name, "a dtype among float16, bfloat16, float32, float64", tensor.dtype)
    if weight.dim() != 3 or len(weight) == 0:
        raise checks.ArgumentError("weight", "shape (E, d_out, d_in) of at least one expert", tuple(weight.shape))
    if lora_A.dim() != 3 or not 1 <= lora_A.shape[1] <= checks.LARGEST_RANK:
        expected = f"shape (E, r, d_in) with r from 1 to {checks.LARGEST_RANK}"
        raise checks.ArgumentError("lora_A", expected, tuple(lora_A.shape))
    (n_experts, d_out, d_in), r = weight.shape, lora_A.shape[1]
    shapes = {"lora_A": (n_experts, r, d_in), "lora_B": (n_experts, d_out, r), "bias": (n_experts, d_out)}
    for name, shape in {**shapes, "offsets": (n_experts,)}.items():
        if named[name] is not None and tuple(named[name].shape) != shape:
            expected = f"shape {shape} to fit weight {tuple(weight.shape)} and rank {r}"
            raise checks.ArgumentError(name, expected, tuple(named[name].shape))
    if x.dim() != 2 or x.shape[1] != d_in:
        raise checks.ArgumentError("x", f"shape (n, {d_in}) to fit weight {tuple(weight.shape)}", tuple(x.shape))
    if x.dtype is not weight.dtype and not in_autocast(x):
        raise checks.ArgumentError("x", f"weight's dtype {weight.dtype} (or an autocast region)", x.dtype)
    if weight.requires_grad:
        raise checks.ArgumentError("weight", "a frozen tensor (its gradient is never formed)", "requires_grad=True")
    if not abs(checks.finite(scaling, "scaling")) <= checks.LARGEST_SCALING:
        raise checks.ArgumentError("scaling", "a finite number, as float32 can hold it", checks.shown(scaling))
    check_offsets(offsets, len(x))


def check_offsets(offsets: Tensor, n: int) -> None:
    """Checks the dtype of the offsets and, where that does not wait for a device, their values."""
    if offsets.dtype is not torch.int32:
        raise checks.ArgumentError("offsets", "dtype torch.int32", offsets.dtype)
    if type(offsets) is Tensor and offsets.is_cpu and not torch.compiler.is_compiling():
        ends = [0, *offsets.tolist(), n]
        if ends != sorted(ends):
            expected = f"the ends of the experts' rows, which do not decrease and are from 0 to {n}"
            raise checks.ArgumentError("offsets", expected, offsets.tolist())
