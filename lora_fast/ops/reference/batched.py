"""Plain-torch twin of the thin products of several adapters in one batch: the specification, the oracle of the tests,
and the backend on a CPU.

``rows`` int32 (n_rows,) has the numbers of x's rows, sorted by adapter; ``ends`` int32 (n_adapters,) has the end of
each adapter's range in it. From ``ends[-1]`` on rows belong to no adapter. The twins loop over the adapters that have
rows, so on a GPU they wait for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.grouping import sorted_places
from ...kernels.records import AdapterTable

__all__ = ["adapter_table", "add_product", "project", "sorted_rows"]


def adapter_table(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float]) -> AdapterTable:
    """Returns the adapters' record, without the kernels' table."""
    return AdapterTable(lora_A, lora_B, scaling, max(a.shape[0] for a in lora_A))


def sorted_rows(adapters: Sequence[int], n_adapters: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns ``rows`` and ``ends`` for samples of ``size`` rows each, whose adapters the host knows; a number below 0
    stands for none."""
    rows, ends = (
        torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in sorted_places(adapters, n_adapters, size)
    )
    return rows, ends


def project(x: Tensor, table: AdapterTable, rows: Tensor, ends: Tensor) -> Tensor:
    """S[t] = x[rows[t]] a_kᵀ for each sorted row t of adapter k: (n, d_in) → (n_rows, R) in the wider of x's dtype and
    the factors', 0 in the columns beyond the adapter's own rank and in rows of no adapter."""
    wide = torch.promote_types(x.dtype, table.lora_A[0].dtype)
    s = x.new_zeros((len(rows), table.r), dtype=wide)
    for adapter, own in ranges(ends):
        a = table.lora_A[adapter]
        s[own, : len(a)] = torch.mm(x.index_select(0, rows[own]).to(wide), a.to(wide).t())
    return s


def add_product(y: Tensor, s: Tensor, table: AdapterTable, rows: Tensor, ends: Tensor) -> Tensor:
    """y[rows[t]] += scaling_k · S[t] b_kᵀ for each sorted row t of adapter k, in place: (n, d_out). It is rounded
    once."""
    rows = rows.long()
    for adapter, own in ranges(ends):
        b, scaling = table.lora_B[adapter].to(s.dtype), table.scaling[adapter]
        result = y.index_select(0, rows[own]).to(s.dtype)
        result.addmm_(s[own, : b.shape[1]], b.t(), alpha=scaling)
        y.index_copy_(0, rows[own], result.to(y.dtype))
    return y


def ranges(ends: Tensor) -> list[tuple[int, slice]]:
    """Returns each adapter that has rows, and its range among the sorted ones."""
    places = [0, *ends.tolist()]
    bounds = enumerate(itertools.pairwise(places))
    return [(adapter, slice(begin, end)) for adapter, (begin, end) in bounds if end > begin]
