"""A linear layer with several LoRA adapters, one for each row of x: the base product by torch, then S of all rows and
the update of y (``kernels.batched``, or their twins in ``reference.batched``), in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.records import AdapterTable
from .observers import named
from .reference import batched as reference

__all__ = ["composite", "forward", "reference", "sort_rows"]


def forward(
    ops, x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, rows: Tensor, ends: Tensor
) -> Tensor:
    """Returns y (..., d_out) of x (..., d_in), without gradients."""
    with named("lora_fast::lora_linear_batched"):
        x_rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        y = F.linear(x_rows, weight, bias)
        s = ops.project(x_rows, table, rows, ends)
        return ops.add_product(y, s, table, rows, ends).view(*x.shape[:-1], len(weight))


def sort_rows(adapters: Tensor, n_adapters: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns ``rows`` and ``ends`` of samples of ``size`` rows each, whose adapters (n,) the device knows. Numbers
    that are no adapter's stand for none. The host does not wait."""
    keys = torch.where((adapters < 0) | (adapters >= n_adapters), n_adapters, adapters)
    ordered, order = torch.sort(keys, stable=True)
    arange = lambda n: torch.arange(n, dtype=ordered.dtype, device=ordered.device)
    ends = torch.searchsorted(ordered, arange(n_adapters), right=True, out_int32=True)
    rows = order[:, None] * size + arange(size)
    return rows.reshape(-1).to(torch.int32), ends * size


def composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    adapters: Tensor,
) -> Tensor:
    """Returns y by plain differentiable ops, for adapters of any of x's leading dimensions. Each adapter's product is
    computed for all rows, and is 0 in those of other adapters."""
    wide = torch.promote_types(x.dtype, lora_A[0].dtype)
    y = F.linear(x, weight, bias).to(wide)
    for adapter, (a, b, scale) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        own = (adapters == adapter).reshape(*adapters.shape, *[1] * (x.dim() - adapters.dim()))
        s = F.linear(torch.where(own, x, 0).to(wide), a.to(wide))
        y = y + torch.where(own, F.linear(s, b.to(wide)) * scale, 0)
    return y.to(x.dtype)
