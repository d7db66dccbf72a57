"""The plans of members of a group that have nodes of their own in autograd: the thin gradients of one member, and dx of
all parts that the members have handed on. The plan of a whole group's backward computes its dx in the same way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import DropoutMask, contiguous_rows, thin_dtype
from . import signature, strategies
from .gemm import gemm_class
from .group_gemm import CublasGroupGemm, FusedGroupGemm, Part
from .signature import flat, share_memory


class SingleGemm:
    """dx of one member, as in a single layer, with the arguments of ``FusedGroupGemm``."""

    def __init__(self, parts: Sequence[Part], shape: tuple[int, ...], where: Sequence[int], strategy: str):
        (dy, weight, _, lora_A, keep), (self.place,) = parts[0], where
        r, dropout = len(lora_A), keep is not None
        self.gemm = gemm_class(strategy)(dy, weight, None, lora_A, r, dropout, False, shape)

    def __call__(self, dys, weights, dss, factors, keeps, stream: int | None = None) -> Tensor:
        i = self.place
        return self.gemm(dys[i], weights[i], None, dss[i], factors[i], 1.0, keeps[i], stream)


def dx_strategy(parts: Sequence[Part], ds_dtypes: Sequence[torch.dtype]) -> str:
    """Returns the GEMM's strategy for parts without dS, whose dtypes are given."""
    dys, weights, _, factors, keeps = zip(*parts, strict=True)
    dropout, r = any(keep is not None for keep in keeps), max(map(len, factors))
    if len(parts) > 1:
        return strategies.group_strategy(dys, weights, max(ds_dtypes, key=lambda d: d.itemsize), r, dropout)
    gemm = strategies.way("backward", dys[0], weights[0], ds_dtypes[0], r, dropout).gemm
    # "gluon" does not take a float32 dS beside an a of 16 bits.
    mixed = ds_dtypes[0] is not dys[0].dtype is factors[0].dtype
    return "fused" if mixed and gemm == "gluon" else gemm


def dx_gemm(parts: Sequence[Part], shape: tuple[int, ...], where: Sequence[int], strategy: str):
    """Returns what computes dx from parts that are laid out, and that have these places in a call."""
    if len(parts) == 1:
        return SingleGemm(parts, shape, where, strategy)
    return (CublasGroupGemm if strategy == "cublas" else FusedGroupGemm)(parts, shape, where)


class ThinPlan:
    """Computes dS, da and db of one member, for one signature. ``needs`` (dS, da, db): what is not needed is None."""

    def __init__(self, dy, x, s, lora_A, lora_B, dropout: bool, rounded: bool, needs: tuple[bool, bool, bool]):
        self.need_s, self.need_a, need_b = needs
        arguments, lead = (dy, x if self.need_a else None, s, lora_A, lora_B), dy.dim() != 2
        dy, x, s, a, b = laid_out = self._lay_out(*arguments)
        tensors = (tuple([t for t in tensors if t is not None]) for tensors in (arguments, laid_out))
        factor = dy.dtype if rounded else signature.wider(a, b)
        way = strategies.thin_way(dy, a.shape[1], factor, len(a), dropout)
        self.needs_layout = not share_memory(*tensors) or (lead and way.thin == "cublas")
        s, needs_s_b = dy if s is None else s, (self.need_s or self.need_a, need_b)
        self.grad_s_b = signature.grad_s_b_by(way, dy, s, b, needs_s_b, rounded)
        ds_dtype = thin_dtype(dy, b, rounded)
        self.grad_a = signature.grad_a_by(way, x, ds_dtype, a, dropout) if self.need_a else None

    def __call__(self, dy, x, s, lora_A, lora_B, scaling: float, keep: DropoutMask | None, stream: int | None):
        if self.needs_layout:
            dy, x, s, lora_A, lora_B = self._lay_out(dy, x if self.need_a else None, s, lora_A, lora_B)
        ds, db = self.grad_s_b(dy, dy if s is None else s, lora_B, scaling, stream)
        da = self.grad_a(x, ds, lora_A, keep, stream) if self.need_a else None
        return ds if self.need_s else None, da, db

    @staticmethod
    def _lay_out(dy, x, s, lora_A, lora_B) -> tuple:
        """Returns the arguments with the shapes and strides that the kernels need."""
        x, s = None if x is None else flat(x), None if s is None else s.contiguous()
        return flat(dy), x, s, contiguous_rows(lora_A), contiguous_rows(lora_B)


class GroupGradXPlan:
    """Computes dx of parts for one signature. ``columns``: those of ``Part``."""

    def __init__(self, x: Tensor, columns: tuple):
        self.any_strides = True
        parts = [Part(*part) for part in zip(*self._lay_out(*columns), strict=True)]
        strategy = dx_strategy(parts, [part.ds.dtype for part in parts])
        self.any_strides = by_cublas = strategy == "cublas"
        laid_out = self._lay_out(*columns)
        tensors = lambda columns: tuple([tensor for column in columns[:4] for tensor in column])
        self.needs_layout = not share_memory(tensors(columns), tensors(laid_out)) or (x.dim() != 2 and by_cublas)
        parts = [Part(*part) for part in zip(*laid_out, strict=True)]
        self.gemm = dx_gemm(parts, x.shape, range(len(parts)), strategy)

    def __call__(self, x: Tensor, columns: tuple, stream: int | None) -> Tensor:
        return self.gemm(*(self._lay_out(*columns) if self.needs_layout else columns), stream)

    def _lay_out(self, dys, weights, dss, factors, keeps) -> tuple:
        """Returns the columns with the shapes and strides that the kernels need."""
        weights = weights if self.any_strides else [contiguous_rows(weight) for weight in weights]
        dys, dss = [flat(dy) for dy in dys], [ds.contiguous() for ds in dss]
        return dys, weights, dss, [contiguous_rows(a) for a in factors], keeps
