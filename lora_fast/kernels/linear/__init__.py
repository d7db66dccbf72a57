"""A layer's forward and backward on the kernels, and the plans that reduce the host time of a call.

The launches of a call depend only on its signature: shapes, strides, dtypes and alignment of its tensors, which
gradients are needed, whether there is dropout, the device, and the settings of the process (``_settings``). A
``ForwardPlan`` or ``BackwardPlan`` holds the decisions for one signature: the way (strategies.py), tiles, grids and
launches, which are prepared when they first run (launch.py). Plans hold no tensors and are kept by signature, so a
later call only reads addresses, allocates its results and launches. In the interpreter, inside ``tiles.assume`` and
while a profiler's launch hook is set, no plan is kept and every launch goes through Triton's JIT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import device
from ..launch import DropoutMask, alignments, allocator, by_jit, contiguous_rows, draw_mask, thin_dtype
from . import signature, strategies
from .cublas import CublasProject
from .gemm import CublasGemm, grad_x, linear
from .grads import grad_a, grad_s_b
from .groups import group_backward, group_forward, group_grad_x, group_thin_gradients, thin_gradients
from .low_rank import add_to_dx, add_to_y, group_project
from .project import Project, project
from .signature import flat, in_autocast, share_memory

__all__ = [
    "add_to_dx", "add_to_y", "backward", "draw_mask", "forward", "grad_a", "grad_s_b", "grad_x", "group_backward",
    "group_forward", "group_grad_x", "group_project", "group_thin_gradients", "linear", "project", "thin_gradients",
]  # fmt: skip


class ForwardPlan:
    """Computes y and S for one signature."""

    project: Project | CublasProject
    empty_s: Callable[[], Tensor] | None

    def __init__(self, x, weight, bias, lora_A, lora_B, dropout: bool, rounded: bool):
        d_out, r = len(weight), len(lora_A)
        factor = x.dtype if rounded else signature.wider(lora_A, lora_B)
        way = strategies.way("forward", flat(x), weight, factor, r, dropout)
        # cuBLAS takes any strides; the kernels need contiguous rows.
        shape, self.any_weight_strides = (*x.shape[:-1], d_out), way.gemm == "cublas"
        arguments = x, weight, bias, lora_A, lora_B
        laid_out = self._lay_out(*arguments)
        self.needs_layout = not share_memory(arguments, laid_out) or (x.dim() != 2 and way.thin == "cublas")
        x, weight, bias, a, b = laid_out
        if way.thin == "split":
            self.project = Project(x, a, dropout, rounded, short=True, split=True)
            self.gemm = CublasGemm(x, weight, bias, b, r, False, True, shape, n_parts=self.project.splits)
            self.empty_s = allocator((len(x), r), thin_dtype(x, a, rounded), x.device)
        else:
            by_cublas, short = way.thin == "cublas", way.thin == "short"
            self.project = CublasProject(x, a, rounded) if by_cublas else Project(x, a, dropout, rounded, short)
            self.gemm = signature.gemm_of(way, a, b)(x, weight, bias, b, r, False, True, shape)
            self.empty_s = None

    def __call__(self, x, weight, bias, lora_A, lora_B, scaling: float, keep: DropoutMask | None, stream: int | None):
        if self.needs_layout:
            x, weight, bias, lora_A, lora_B = self._lay_out(x, weight, bias, lora_A, lora_B)
        s = self.project(x, lora_A, keep, stream)
        if self.empty_s is None:
            return self.gemm(x, weight, bias, s, lora_B, scaling, None, stream), s
        parts, s = s, self.empty_s()  # the GEMM's update adds the parts and writes S
        return self.gemm(x, weight, bias, parts, lora_B, scaling, None, stream, s), s

    def _lay_out(self, x, weight, bias, lora_A, lora_B):
        """Returns the arguments with the shapes and strides that the kernels need."""
        weight = weight if self.any_weight_strides else contiguous_rows(weight)
        bias = bias if bias is None else bias.contiguous()
        return flat(x), weight, bias, contiguous_rows(lora_A), contiguous_rows(lora_B)


class BackwardPlan:
    """Computes dx, da and db for one signature. ``needs`` (x, a, b): a gradient that is not needed is None."""

    grad_a: Any  # None where not needed, as grad_x
    grad_x: Any

    def __init__(self, dy, x, s, weight, lora_A, lora_B, dropout: bool, rounded: bool, needs: tuple[bool, bool, bool]):
        r = len(lora_A)
        factor = dy.dtype if rounded else signature.wider(lora_A, lora_B)
        way = strategies.way("backward", flat(dy), weight, factor, r, dropout)
        self.need_x, self.need_a, need_b = needs
        shape, self.any_weight_strides = x.shape, way.gemm == "cublas"
        arguments = dy, x, s, weight, lora_A, lora_B
        laid_out = self._lay_out(*arguments)
        self.needs_layout = not share_memory(arguments, laid_out) or (dy.dim() != 2 and way.thin == "cublas")
        dy, x, s, weight, a, b = laid_out
        needs_s_b = self.need_x or self.need_a, need_b
        self.grad_s_b = signature.grad_s_b_by(way, dy, s, b, needs_s_b, rounded)
        ds_dtype = thin_dtype(dy, b, rounded)
        self.grad_a = signature.grad_a_by(way, x, ds_dtype, a, dropout) if self.need_a else None
        gemm_class = signature.gemm_of(way, a, b)
        self.grad_x = gemm_class(dy, weight, None, a, r, dropout, False, shape) if self.need_x else None

    def __call__(self, dy, x, s, weight, lora_A, lora_B, scaling: float, keep: DropoutMask | None, stream: int | None):
        if self.needs_layout:
            dy, x, s, weight, lora_A, lora_B = self._lay_out(dy, x, s, weight, lora_A, lora_B)
        ds, db = self.grad_s_b(dy, s, lora_B, scaling, stream)
        da = self.grad_a(x, ds, lora_A, keep, stream) if self.need_a else None
        dx = self.grad_x(dy, weight, None, ds, lora_A, 1.0, keep, stream) if self.need_x else None
        return dx, da, db

    def _lay_out(self, dy, x, s, weight, lora_A, lora_B):
        """Returns the arguments with the shapes and strides that the kernels need."""
        weight = weight if self.any_weight_strides else contiguous_rows(weight)
        return flat(dy), flat(x), s.contiguous(), weight, contiguous_rows(lora_A), contiguous_rows(lora_B)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    keep: DropoutMask | None = None, rounded: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y (..., d_out) in x's dtype and S (n_tokens, r) for x (..., d_in), weight (d_out, d_in), lora_A (r, d_in)
    and lora_B (d_out, r). ``rounded`` rounds the factors to x's dtype. Twin: ``reference.linear.forward``."""
    if not device.is_current(x):
        with torch.cuda.device(x.device):
            return forward(x, weight, bias, lora_A, lora_B, scaling, keep, rounded)
    if in_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return forward(x, weight, bias, lora_A, lora_B, scaling, keep, rounded)
    if x.numel() == 0 or weight.numel() == 0:  # a grid must not be empty
        return signature.empty_forward(x, weight, bias, lora_A, rounded)
    scaling, dropout = float(scaling), keep is not None
    if by_jit():
        forward_plan = ForwardPlan(x, weight, bias, lora_A, lora_B, dropout, rounded)
        return forward_plan(x, weight, bias, lora_A, lora_B, scaling, keep, None)
    # If all addresses are aligned to 16 bytes, `addresses & 15` is 0: the usual case costs one test.
    addresses = x.data_ptr() | weight.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr()
    key = (
        x.shape, x.stride(), x.dtype, device.index(x), weight.shape, weight.stride(), lora_A.stride(), lora_A.dtype,
        lora_B.shape, lora_B.stride(), lora_B.dtype, None if bias is None else (bias.stride(), bias.data_ptr() & 15),
        addresses & 15 and alignments((x, weight, lora_A, lora_B)), dropout, rounded, signature.settings(x),
    )  # fmt: skip
    plan = signature.plans.get(key)
    if plan is None:
        plan = signature.keep(key, ForwardPlan(x, weight, bias, lora_A, lora_B, dropout, rounded), x)
    return plan(x, weight, bias, lora_A, lora_B, scaling, keep, device.stream(x))


def backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float,
    keep: DropoutMask | None = None, rounded: bool = False, needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dx (..., d_in), da (r, d_in) and db (d_out, r), each in its operand's dtype, for dy (..., d_out) and S
    (n_tokens, r) of the forward. ``needs`` (x, a, b; not all False): a gradient that is not needed is None.
    Twin: ``reference.linear.backward``."""
    if not device.is_current(x):
        with torch.cuda.device(x.device):
            return backward(dy, x, s, weight, lora_A, lora_B, scaling, keep, rounded, needs)
    if in_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return backward(dy, x, s, weight, lora_A, lora_B, scaling, keep, rounded, needs)
    if x.numel() == 0 or weight.numel() == 0:
        need_x, need_a, need_b = needs
        dx, da = torch.zeros_like(x) if need_x else None, torch.zeros_like(lora_A) if need_a else None
        return dx, da, torch.zeros_like(lora_B) if need_b else None
    scaling, dropout = float(scaling), keep is not None
    if by_jit():
        backward_plan = BackwardPlan(dy, x, s, weight, lora_A, lora_B, dropout, rounded, needs)
        return backward_plan(dy, x, s, weight, lora_A, lora_B, scaling, keep, None)
    addresses = dy.data_ptr() | x.data_ptr() | s.data_ptr() | weight.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr()
    key = (
        dy.shape, dy.stride(), x.shape, x.stride(), x.dtype, device.index(x), s.stride(), s.dtype, weight.shape,
        weight.stride(), lora_A.stride(), lora_A.dtype, lora_B.shape, lora_B.stride(), lora_B.dtype, needs,
        addresses & 15 and alignments((dy, x, s, weight, lora_A, lora_B)), dropout, rounded, signature.settings(x),
    )  # fmt: skip
    plan = signature.plans.get(key)
    if plan is None:
        plan = signature.keep(key, BackwardPlan(dy, x, s, weight, lora_A, lora_B, dropout, rounded, needs), x)
    return plan(dy, x, s, weight, lora_A, lora_B, scaling, keep, device.stream(x))
