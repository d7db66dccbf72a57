"""The layer and the Cayley transform as plain differentiable torch ops, for calls that the ops with their own backward
cannot serve: tensors that are no plain ones or were made under inference_mode, transforms of functions, traces, and
second derivatives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import PLAIN
from ..quantized import QuantizedWeight
from .reference.cayley import EPS
from .reference.linear import keep_scale

FUNCTORCH = "torch.func transform (vmap, grad, jvp, …)"
JIT_TRACE = "torch.jit.trace"
COMPUTED = "a weight that is computed from others"  # whose gradient the op does not form: fast weights, masks
QUANTIZED_TRACED = "quantised weight in a graph that torch.compile or torch.export traces"
_FROZEN = torch.empty(0, dtype=torch.float32, device="cpu")  # stands for a quantised weight
INFERENCE = "tensors made under torch.inference_mode"  # the op would save them, also where plain ops need not
_STRIDED = torch.strided
# Looked up once, because attribute accesses cost host time in every layer's call.
_traced, _functorch, _jit_trace, _modes, _mode = (
    torch.compiler.is_compiling,
    torch._C._are_functorch_transforms_active,
    torch._C._is_tracing,
    torch._C._len_torch_dispatch_stack,
    torch._C._get_dispatch_mode,
)
_grad = torch.is_grad_enabled
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_TRACING = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def reason(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """Returns why the plain ops have to run for these tensors in this state of torch, or None if the op can serve the
    call. Every call of a layer asks."""
    if not (type(x) in PLAIN and type(weight) in PLAIN and type(lora_A) in PLAIN and type(lora_B) in PLAIN):
        if isinstance(weight, QuantizedWeight):
            return QUANTIZED_TRACED if _traced() else reason(x, _FROZEN, lora_A, lora_B)
        return _subclass(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B)
    if weight.requires_grad and not weight.is_leaf:
        return COMPUTED
    if _traced():
        return _in_graph()
    if x.layout is not _STRIDED or x.is_nested or x.is_meta:
        return "nested x" if x.is_nested else "x on the meta device" if x.is_meta else f"x of layout {x.layout}"
    if _functorch() or forward_ad._current_level >= 0 or _jit_trace() or _modes() > 0:
        return transform()
    if _grad() and (weight.is_inference() or lora_A.is_inference() or lora_B.is_inference() or x.is_inference()):
        return INFERENCE
    return None


def _in_graph() -> str | None:
    """Returns why a call that torch.compile or torch.export traces does not become the registered op: a program is to
    run without this package, and the op has no rule for transforms."""
    return "torch.export" if _in_export() else FUNCTORCH if _in_transform() else None


def _in_transform() -> bool:
    return _functorch()


def _in_export() -> bool:
    """Returns what ``torch.compiler.is_exporting`` does, which the compiler of torch 2.10 takes to be always True."""
    return torch.compiler._is_exporting_flag


# torch.compile calls them instead of tracing them, which would leave nodes in every graph. It guards on transforms
# itself.
_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
_in_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transform() -> str | None:
    """Returns which transform of functions, or which trace, runs now."""
    if _functorch():
        return FUNCTORCH
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if _jit_trace():
        return JIT_TRACE
    if _modes() > 0:  # of infrastructure: those of users see the op's products
        return next((f"{kind.name.lower()} mode of torch.fx" for kind in _TRACING if _mode(kind) is not None), None)
    return None


def reason_for_parameters(parameters: Iterable[Tensor]) -> str | None:
    """Returns what ``reason`` does, for an op of parameters alone."""
    if _traced():
        return _in_graph()
    for parameter in parameters:
        if type(parameter) not in PLAIN or parameter.is_meta:
            return f"a parameter of type {type(parameter).__name__} on {parameter.device}"
    return transform()


def _subclass(**tensors: Tensor) -> str | None:
    """Returns the name and type of the first tensor that is no plain one. What is no tensor at all is left to the
    checks of arguments."""
    for name, tensor in tensors.items():
        if type(tensor) not in PLAIN and isinstance(tensor, Tensor):
            return f"{name} of type {type(tensor).__name__}"
    return None


def is_plain(tensor: Tensor) -> bool:
    """Returns whether the ops can read a gradient that reaches their backward. ``is_grads_batched=True`` batches it by
    other means than torch.func."""
    return type(tensor) in PLAIN and not _functorch() and not _is_batched(tensor)


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: float,
    keep: Tensor | None = None,
) -> Tensor:
    """Returns y (..., d_out) of x (..., d_in) by PEFT's formula, in PEFT's order of casts. Dropout draws its mask
    unless ``keep``, of x's shape, is one."""
    return add_adapter(_base_product(x, weight, bias), x, lora_A, lora_B, scaling, dropout_p, keep)


def add_adapter(
    result: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: float,
    keep: Tensor | None = None,
) -> Tensor:
    """Returns the frozen layer's result plus the adapter's part, as ``linear``."""
    x = x.to(lora_A.dtype)
    if keep is not None:
        x = x * (keep * keep_scale(dropout_p)).to(x.dtype)
    elif dropout_p > 0.0:
        x = F.dropout(x, dropout_p)
    return (result + F.linear(F.linear(x, lora_A), lora_B) * scaling).to(result.dtype)


def _base_product(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Returns the frozen layer's result, differentiable. A quantised layer adds its own bias."""
    if isinstance(weight, QuantizedWeight):
        result: Tensor = weight.module(x)
        return result if bias is None else result + bias.to(result.dtype)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)  # float32 beside 16 bits, which F.linear does not take
    return F.linear(x, weight, bias)


def linear_gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None,
    rounded: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns dx (..., d_in), da (r, d_in) and db (d_out, r), each None where ``needs`` (of x, a, b) is False, as
    functions of dy, x, a and b that are differentiable again. Arguments as those of ``ops.linear.backward``, but the
    mask ``keep`` (n_tokens, d_in) is a tensor and ``scaling`` includes its scale. With S db is a function of dy alone,
    and x is not read."""
    need_x, need_a, need_b = needs
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    wide = x.dtype if rounded else torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), x.dtype)
    a, b, dy_wide, kept = lora_A.to(wide), lora_B.to(wide), dy_rows.to(wide), rows.to(wide)
    if keep is not None:
        kept = kept * keep
    ds = scaling * (dy_wide @ b)
    dx = da = db = None
    if need_x:
        part = ds @ a if keep is None else ds @ a * keep
        dx = (dy_rows @ weight.to(dy.dtype) + part).to(x.dtype).reshape(x.shape)
    if need_a:
        da = (ds.mT @ kept).to(lora_A.dtype)
    if need_b:
        db = (scaling * (dy_wide.mT @ (kept @ a.mT if s is None else s.to(wide)))).to(lora_B.dtype)
    return dx, da, db


def cayley(
    free_a: Tensor, free_b: Tensor, free_scale: Tensor | None = None, bound: float = 0.5, power: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns a (r, d_in) and b (d_out, r) of one pair by the formulas of ``reference.cayley``, in float64 as there.
    The columns of b are scaled if ``free_scale`` is given."""
    rank, wide = free_a.shape[0], torch.promote_types(free_a.dtype, torch.float32)
    a, b = free_a.double(), free_b.double()
    a1, a2 = a[:, :rank], a[:, rank:]
    eye = torch.eye(rank, dtype=a.dtype, device=a.device)
    m = a1.mT - a1 + a2 @ a2.mT + b.mT @ b
    m = m + (1 + EPS * torch.linalg.matrix_norm(m.detach())) * eye
    inverse = torch.linalg.inv_ex(m)[0]
    result_a = torch.cat((2 * inverse.mT - eye, -2 * inverse.mT @ a2), -1)
    result_b = -2 * b @ inverse
    if free_scale is not None:
        shares = torch.softmax(free_scale.double() / rank**0.5, -1)
        result_b = result_b * (2 * bound * shares**power)
    return result_a.to(wide), result_b.to(wide)
