"""A layer's forward and backward on the kernels, and the plans that make a call cheap for the host.

What a call launches follows from its signature: shapes, strides, dtypes and alignment of its tensors, which gradients
are needed, whether there is dropout, the device, whether float32 products may use TF32. ``Forward`` and ``Backward``
are what was decided for one signature: ways (strategies.py), tiles, grids, and launches that are prepared when they are
first made (launch.py). They hold no tensor and are kept by signature, so that a call reads addresses, allocates its
results and launches. In the interpreter, while ``tiles.assume`` holds, and while a launch hook is set (a profiler's),
nothing is kept and every launch goes through Triton's JIT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import device, tuned
from ..launch import Keep, alignments, allocator, by_jit, draw_mask, keep_plan, rows, tf32, thin_dtype
from . import strategies
from .cublas import CublasGradA, CublasGradSB, CublasProject
from .gemm import CublasGemm, gemm_of, grad_x, linear
from .grads import GradA, GradSB, grad_a, grad_s_b
from .project import Project, project

__all__ = ["backward", "draw_mask", "forward", "grad_a", "grad_s_b", "grad_x", "linear", "project"]


class Forward:
    """y and S of one signature."""

    def __init__(self, x, weight, bias, lora_A, lora_B, dropout: bool, rounded: bool):
        d_out, r, flat = len(weight), len(lora_A), _flat(x)
        factor = x.dtype if rounded else _wider(lora_A, lora_B)
        way = strategies.way("forward", flat, weight, factor, r, dropout)
        shape, self.weight_as_it_is = (*x.shape[:-1], d_out), way.gemm == "cublas"
        given = x, weight, bias, lora_A, lora_B
        laid_out = self._lay_out(*given)
        self.lay_out = not _same(given, laid_out) or (x.dim() != 2 and way.thin == "cublas")
        x, weight, bias, a, b = laid_out
        if way.thin == "split":
            self.project = Project(x, a, dropout, rounded, short=True, split=True)
            self.gemm = CublasGemm(x, weight, bias, b, r, False, True, shape, n_parts=self.project.shape[0])
            self.empty_s = allocator((len(x), r), thin_dtype(x, a, rounded), x.device)
        else:
            own = way.thin != "cublas"
            self.project = Project(x, a, dropout, rounded, way.thin == "short") if own else CublasProject(x, a, rounded)
            self.gemm = _gemm_of(way, a, b)(x, weight, bias, b, r, False, True, shape)
            self.empty_s = None

    def __call__(self, x, weight, bias, lora_A, lora_B, scaling: float, keep: Keep | None, stream: int | None):
        if self.lay_out:
            x, weight, bias, lora_A, lora_B = self._lay_out(x, weight, bias, lora_A, lora_B)
        s = self.project(x, lora_A, keep, stream)
        if self.empty_s is None:
            return self.gemm(x, weight, bias, s, lora_B, scaling, None, stream), s
        parts, s = s, self.empty_s()
        return self.gemm(x, weight, bias, parts, lora_B, scaling, None, stream, s), s

    def _lay_out(self, x, weight, bias, lora_A, lora_B):
        """As kernels take them."""
        weight = weight if self.weight_as_it_is else rows(weight)
        bias = bias if bias is None else bias.contiguous()
        return _flat(x), weight, bias, rows(lora_A), rows(lora_B)


class Backward:
    """dx, da and db of one signature, each None where ``needs`` (of x, a, b) says so."""

    def __init__(self, dy, x, s, weight, lora_A, lora_B, dropout: bool, rounded: bool, needs: tuple[bool, bool, bool]):
        r, flat = len(lora_A), _flat(dy)
        factor = dy.dtype if rounded else _wider(lora_A, lora_B)
        way = strategies.way("backward", flat, weight, factor, r, dropout)
        self.need_x, self.need_a, need_b = needs
        shape, self.weight_as_it_is = x.shape, way.gemm == "cublas"
        given = dy, x, s, weight, lora_A, lora_B
        laid_out = self._lay_out(*given)
        self.lay_out = not _same(given, laid_out) or (dy.dim() != 2 and way.thin == "cublas")
        dy, x, s, weight, a, b = laid_out
        needs_s_b = self.need_x or self.need_a, need_b
        grads = CublasGradSB if way.thin == "cublas" else GradSB
        self.grad_s_b = grads(dy, s, b, needs_s_b, rounded)
        ds_dtype = thin_dtype(dy, b, rounded)
        by_cublas = way.thin == "cublas" and not dropout and ds_dtype is x.dtype
        self.grad_a = CublasGradA() if by_cublas else GradA(x, ds_dtype, a, dropout) if self.need_a else None
        self.grad_x = _gemm_of(way, a, b)(dy, weight, None, a, r, dropout, False, shape) if self.need_x else None

    def __call__(self, dy, x, s, weight, lora_A, lora_B, scaling: float, keep: Keep | None, stream: int | None):
        if self.lay_out:
            dy, x, s, weight, lora_A, lora_B = self._lay_out(dy, x, s, weight, lora_A, lora_B)
        ds, db = self.grad_s_b(dy, s, lora_B, scaling, stream)
        da = self.grad_a(x, ds, lora_A, keep, stream) if self.need_a else None
        dx = self.grad_x(dy, weight, None, ds, lora_A, 1.0, keep, stream) if self.need_x else None
        return dx, da, db

    def _lay_out(self, dy, x, s, weight, lora_A, lora_B):
        """As kernels take them."""
        weight = weight if self.weight_as_it_is else rows(weight)
        return _flat(dy), _flat(x), s.contiguous(), weight, rows(lora_A), rows(lora_B)


def _wider(lora_A: Tensor, lora_B: Tensor) -> torch.dtype:
    """What the ways of a call depend on; both are usually the same."""
    return torch.promote_types(lora_A.dtype, lora_B.dtype)


def _gemm_of(way: strategies.Way, lora_A: Tensor, lora_B: Tensor) -> type:
    """The GEMM's class. "gluon" takes S and b, or dS and a, in one precision."""
    mixed = lora_A.dtype is not lora_B.dtype
    return gemm_of("fused" if mixed and way.gemm == "gluon" else way.gemm)


def _flat(tensor: Tensor) -> Tensor:
    """(n_tokens, d), rows contiguous."""
    return rows(tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1]))


def _same(given: tuple, laid_out: tuple) -> bool:
    """Whether kernels may take the tensors as they were given: they look at addresses and at the strides of rows."""
    return all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(given, laid_out, strict=True))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    keep: Keep | None = None, rounded: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (..., d_out) and S (n_tokens, r) of x (..., d_in). Twin: ``reference.forward``."""
    if not device.is_current(x):
        with torch.cuda.device(x.device):
            return forward(x, weight, bias, lora_A, lora_B, scaling, keep, rounded)
    if _in_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return forward(x, weight, bias, lora_A, lora_B, scaling, keep, rounded)
    if x.numel() == 0 or weight.numel() == 0:
        y = x.new_zeros((*x.shape[:-1], len(weight)))
        y = y if bias is None else y + bias
        return y, x.new_zeros((x.numel() // max(1, x.shape[-1]), len(lora_A)), dtype=thin_dtype(x, lora_A, rounded))
    scaling, dropout = float(scaling), keep is not None
    if by_jit():
        plan = Forward(x, weight, bias, lora_A, lora_B, dropout, rounded)
        return plan(x, weight, bias, lora_A, lora_B, scaling, keep, None)
    addresses = x.data_ptr() | weight.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr()
    key = (
        x.shape, x.stride(), x.dtype, device.index(x), weight.shape, weight.stride(), lora_A.stride(), lora_A.dtype,
        lora_B.shape, lora_B.stride(), lora_B.dtype, None if bias is None else (bias.stride(), bias.data_ptr() & 15),
        addresses & 15 and alignments((x, weight, lora_A, lora_B)), dropout, rounded, tf32(x), tuned.changes(),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = keep_plan(_plans, key, Forward(x, weight, bias, lora_A, lora_B, dropout, rounded))
    return plan(x, weight, bias, lora_A, lora_B, scaling, keep, device.stream(x))


def backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float,
    keep: Keep | None = None, rounded: bool = False, needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx (..., d_in), da (r, d_in) and db (d_out, r), each None where ``needs`` (of x, a, b; not all False) says so.
    Twin: ``reference.backward``."""
    if not device.is_current(x):
        with torch.cuda.device(x.device):
            return backward(dy, x, s, weight, lora_A, lora_B, scaling, keep, rounded, needs)
    if _in_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return backward(dy, x, s, weight, lora_A, lora_B, scaling, keep, rounded, needs)
    if x.numel() == 0 or weight.numel() == 0:
        return tuple(torch.zeros_like(t) if need else None for t, need in zip((x, lora_A, lora_B), needs, strict=True))
    scaling, dropout = float(scaling), keep is not None
    if by_jit():
        plan = Backward(dy, x, s, weight, lora_A, lora_B, dropout, rounded, needs)
        return plan(dy, x, s, weight, lora_A, lora_B, scaling, keep, None)
    addresses = dy.data_ptr() | x.data_ptr() | s.data_ptr() | weight.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr()
    key = (
        dy.shape, dy.stride(), x.shape, x.stride(), x.dtype, device.index(x), s.stride(), s.dtype, weight.shape,
        weight.stride(), lora_A.stride(), lora_A.dtype, lora_B.shape, lora_B.stride(), lora_B.dtype, needs,
        addresses & 15 and alignments((dy, x, s, weight, lora_A, lora_B)), dropout, rounded, tf32(x), tuned.changes(),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = keep_plan(_plans, key, Backward(dy, x, s, weight, lora_A, lora_B, dropout, rounded, needs))
    return plan(dy, x, s, weight, lora_A, lora_B, scaling, keep, device.stream(x))


# ---- The plans

_plans: dict[tuple, Forward | Backward] = {}
_any_autocast = torch._C._is_any_autocast_enabled


def _in_autocast(x: Tensor) -> bool:
    """Whether torch's own products would cast their operands. Dtypes were decided by forward's caller, and backward may
    be called in another region than forward."""
    return _any_autocast() and torch.is_autocast_enabled(x.device.type)
