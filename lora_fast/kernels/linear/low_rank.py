"""The low-rank parts of layers whose weights other libraries multiply, quantised ones: S before the library's product,
and the updates of y and dx after it, in the library's own result.

Plans are kept by signature, as in ``linear/__init__.py``. The gradients of the factors are those of groups
(``groups.group_thin_gradients``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import device
from ..launch import DropoutMask, by_jit, contiguous_rows, thin_dtype
from . import signature, strategies
from .gemm import Update
from .group_gemm import GroupUpdate, Part
from .group_plans import ProjectPasses
from .groups import planned
from .signature import flat, share_memory


class ProjectPlan:
    """Computes every S for one signature of x and the members' a."""

    def __init__(self, x: Tensor, lora_As: Sequence[Tensor], keeps: Sequence):
        rows, factors = flat(x), [contiguous_rows(a) for a in lora_As]
        ways = [
            strategies.project_way(rows, a.dtype, len(a), keep is not None)
            for a, keep in zip(factors, keeps, strict=True)
        ]
        by_cublas = x.dim() != 2 and any(way.thin == "cublas" for way in ways)
        self.needs_layout = by_cublas or not share_memory((x, *lora_As), (rows, *factors))
        self.passes = ProjectPasses(rows, [*zip(factors, keeps, strict=True)], ways, rounded=False)

    def __call__(self, x: Tensor, lora_As: Sequence[Tensor], keeps: Sequence, stream: int | None) -> list[Tensor]:
        if self.needs_layout:
            x, lora_As = flat(x), [contiguous_rows(a) for a in lora_As]
        return self.passes(x, lora_As, keeps, stream)


class UpdatePlan:
    """Adds one thin product to y, or to dx, for one signature."""

    def __init__(self, rows: Tensor, thin: Tensor, factor: Tensor, dropout: bool, transposed: bool):
        self.needs_layout = contiguous_rows(factor) is not factor
        factor, d_out = contiguous_rows(factor), rows.shape[-1]
        self.update = Update(flat(rows), factor, thin.shape[1], dropout, transposed, d_out)

    def __call__(self, rows, thin, factor, scaling: float, keep: DropoutMask | None, stream: int | None) -> None:
        factor = contiguous_rows(factor) if self.needs_layout else factor
        self.update(rows, rows, thin, factor, scaling, keep, stream)


class GroupUpdatePlan:
    """Adds several thin products to dx, for one signature."""

    def __init__(self, dx: Tensor, columns: tuple):
        dss, factors, keeps = columns
        laid_out = [contiguous_rows(a) for a in factors]
        self.needs_layout = not share_memory(tuple(factors), tuple(laid_out))
        rows = flat(dx)
        parts = [Part(rows, None, ds, a, keep) for ds, a, keep in zip(dss, laid_out, keeps, strict=True)]
        self.update = GroupUpdate(parts, dx.shape, range(len(parts)))

    def __call__(self, dx: Tensor, columns: tuple, stream: int | None) -> None:
        dss, factors, keeps = columns
        factors = [contiguous_rows(a) for a in factors] if self.needs_layout else factors
        self.update.add(dx, dx, dss, factors, keeps, stream)


def group_project(x: Tensor, lora_As: Sequence[Tensor], keeps: Sequence[DropoutMask | None]) -> list[Tensor]:
    """Returns S (n_tokens, r) of each of one to four members for x (..., d_in). Twin:
    ``reference.linear.group_project``."""
    if not device.is_current(x) or signature.in_autocast(x):
        with signature.undisturbed(x):
            return group_project(x, lora_As, keeps)
    if x.numel() == 0:
        rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
        return [torch.zeros((rows, len(a)), dtype=thin_dtype(x, a, False), device=x.device) for a in lora_As]
    if by_jit():
        return ProjectPlan(x, lora_As, keeps)(x, lora_As, keeps, None)
    factors = tuple([(a.shape, a.dtype, keep is None) for a, keep in zip(lora_As, keeps, strict=True)])
    key = [x.shape, x.dtype, device.index(x), factors]
    plan = planned(ProjectPlan, key, (x, *lora_As), x, x, lora_As, keeps)
    return plan(x, lora_As, keeps, device.stream(x))


def add_to_y(y: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Adds scaling · S bᵀ to y (..., d_out), which is contiguous, for S (n_tokens, r). Twin:
    ``reference.linear.add_to_y``."""
    _add(y, s, lora_B, float(scaling), None, True)


def _add(rows: Tensor, thin: Tensor, factor: Tensor, scaling: float, keep: DropoutMask | None, transposed: bool):
    if rows.numel() == 0:
        return
    if not device.is_current(rows):
        with torch.cuda.device(rows.device):
            return _add(rows, thin, factor, scaling, keep, transposed)
    arguments = rows, thin, factor, keep is not None, transposed
    if by_jit():
        return UpdatePlan(*arguments)(rows, thin, factor, scaling, keep, None)
    key = [rows.shape, rows.dtype, device.index(rows), thin.dtype, factor.shape, factor.dtype, keep is None, transposed]
    plan = planned(UpdatePlan, key, (rows, thin, factor), rows, *arguments)
    plan(rows, thin, factor, scaling, keep, device.stream(rows))


def add_to_dx(dx: Tensor, parts: Sequence[tuple]) -> None:
    """Adds Σ keep∘(dS a) to dx (..., d_in), which is contiguous, for one to four parts (dS, lora_A, keep). Twin:
    ``reference.linear.add_to_dx``."""
    if len(parts) == 1:
        (ds, a, keep), = parts  # fmt: skip
        return _add(dx, ds, a, 1.0, keep, False)
    if dx.numel() == 0:
        return
    if not device.is_current(dx):
        with torch.cuda.device(dx.device):
            return add_to_dx(dx, parts)
    columns = dss, factors, _ = tuple(zip(*parts, strict=True))
    if by_jit():
        return GroupUpdatePlan(dx, columns)(dx, columns, None)
    kinds = tuple([(ds.dtype, a.shape, a.dtype, keep is None) for ds, a, keep in parts])
    key = [dx.shape, dx.dtype, device.index(dx), kinds]
    plan = planned(GroupUpdatePlan, key, (dx, *dss, *factors), dx, dx, columns)
    plan(dx, columns, device.stream(dx))
