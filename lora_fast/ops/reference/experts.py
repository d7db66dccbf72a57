"""Plain-torch twin of the experts' ops: the specification, the oracle of the tests, and the backend on a CPU.

Rows (n, d) are sorted by expert. ``offsets``, int32 (E,), holds the end of each expert's rows, so that expert e has the
rows from offsets[e - 1] to offsets[e]. No function has a loop over experts. All but ``add_product`` are
differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..observers import sees_ops

__all__ = ["add_product", "grad_factors", "grad_s", "project"]

_GROUPED = (torch.bfloat16, torch.float16, torch.float32)  # dtypes of torch's grouped product
_ALIGNMENT = 16  # bytes: what it needs of strides and addresses


def product(rows: Tensor, weight: Tensor, offsets: Tensor, zero_rest: bool = True) -> Tensor:
    """Returns rows_e weight_e of each expert: (n, k), (E, k, m) in the same dtype, any strides → (n, m). Rows that
    belong to no expert, from offsets[-1] on, give 0, or with ``zero_rest=False`` may be undefined."""
    if _needs_node(rows, weight):
        return _Product.apply(rows, weight, offsets)
    if len(rows) and rows.stride(1) == 1 and _takes(rows) and _takes(weight):
        result = F.grouped_mm(rows, weight, offs=offsets)
        return _without_rest(result, offsets) if zero_rest else result
    return _unpadded(torch.bmm(_padded(rows, offsets), weight), offsets, len(rows))


class _Product(torch.autograd.Function):
    """``product``. Torch's derivative of its grouped product does not take the strides of every gradient."""

    @staticmethod
    def forward(ctx, rows, weight, offsets):
        need_rows, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if need_weight else None, weight if need_rows else None, offsets)
        return product(rows, weight, offsets)

    @staticmethod
    def backward(ctx, dy):
        rows, weight, offsets = ctx.saved_tensors
        need_rows, need_weight, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        d_rows = product(dy, weight.mT, offsets) if need_rows else None
        return d_rows, _outer(rows, dy, offsets) if need_weight else None, None


def project(x: Tensor, lora_A: Tensor, offsets: Tensor) -> Tensor:
    """S_e = x_e a_eᵀ: (n, d_in), (E, r, d_in) → (n, r) in the wider of both dtypes."""
    wide = torch.promote_types(x.dtype, lora_A.dtype)
    return _thin(x.to(wide), lora_A.to(wide).mT, offsets)


def update(thin: Tensor, factor: Tensor, offsets: Tensor) -> Tensor:
    """thin_e factor_e: (n, r), (E, r, d) → (n, d) in the wider of both dtypes."""
    wide, missing = torch.promote_types(thin.dtype, factor.dtype), _missing(thin.shape[1], thin)
    thin, factor = F.pad(thin.to(wide), (0, missing)), F.pad(factor.to(wide), (0, 0, 0, missing))
    return product(thin.contiguous(), factor.contiguous(), offsets)


def add_product(rows: Tensor, thin: Tensor, factor: Tensor, scaling: float, offsets: Tensor) -> Tensor:
    """Returns rows_e + scaling · thin_e factor_e: (n, d), (n, r), (E, r, d) → (n, d), 0 in rows of no expert. It is in
    place unless a mode of torch sees the products, as that of selective checkpointing, which keeps them and uses them
    again."""
    result = (rows.add if sees_ops() else rows.add_)(update(thin, factor, offsets), alpha=scaling)
    return _without_rest(result, offsets)


def grad_s(dy: Tensor, lora_B: Tensor, scaling: float, offsets: Tensor) -> Tensor:
    """dS_e = scaling · dy_e b_e: (n, d_out), (E, d_out, r) → (n, r) in the wider of both dtypes."""
    wide = torch.promote_types(dy.dtype, lora_B.dtype)
    return _thin(dy.to(wide), lora_B.to(wide), offsets) * scaling


def grad_factors(
    x: Tensor, dy: Tensor, s: Tensor, ds: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    offsets: Tensor, need_a: bool = True, need_b: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """da_e = dS_eᵀ x_e: (E, r, d_in), and db_e = scaling · dy_eᵀ S_e: (E, d_out, r), in the factors' dtypes, 0 for
    experts without rows; None where not needed."""
    da = db = None
    if need_a and ds is not None:
        da = _outer(ds, x.to(ds.dtype), offsets).to(lora_A.dtype)
    if need_b:
        db = (_outer(s, dy.to(s.dtype), offsets).mT * scaling).to(lora_B.dtype)
    return da, db


def _thin(rows: Tensor, factor: Tensor, offsets: Tensor) -> Tensor:
    """Returns rows_e factor_e of factors (E, k, r), whose rank torch's grouped product takes in multiples only."""
    rank = factor.shape[2]
    factor = F.pad(factor, (0, _missing(rank, factor))).contiguous()
    return product(rows, factor, offsets).narrow(1, 0, rank)  # legacy vmap has no rule for a full slice


def _outer(thin: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Returns thin_eᵀ rows_e of each expert: (n, r), (n, d) in the same dtype → (E, r, d)."""
    if _needs_node(thin, rows):
        return _Outer.apply(thin, rows, offsets)
    rank = thin.shape[1]
    thin = F.pad(thin, (0, _missing(rank, thin))).contiguous()
    if all(map(_takes, (thin, rows))):
        return F.grouped_mm(thin.t(), rows, offs=offsets).narrow(1, 0, rank)
    return torch.bmm(_padded(thin, offsets).mT, _padded(rows, offsets)).narrow(1, 0, rank)


class _Outer(torch.autograd.Function):
    """``_outer``, likewise."""

    @staticmethod
    def forward(ctx, thin, rows, offsets):
        need_thin, need_rows, _ = ctx.needs_input_grad
        ctx.save_for_backward(thin if need_rows else None, rows if need_thin else None, offsets)
        return _outer(thin, rows, offsets)

    @staticmethod
    def backward(ctx, gradient):
        thin, rows, offsets = ctx.saved_tensors
        need_thin, need_rows, _ = ctx.needs_input_grad
        d_thin = product(rows, gradient.mT, offsets) if need_thin else None
        return d_thin, product(thin, gradient, offsets) if need_rows else None, None


def _needs_node(first: Tensor, second: Tensor) -> bool:
    """Returns whether autograd records a product of these, other than under a transform, which takes torch's ops."""
    return torch.is_grad_enabled() and (first.requires_grad or second.requires_grad) and not _is_transformed(first)


def _is_transformed(tensor: Tensor) -> bool:
    """Returns whether a transform of functions, forward-mode differentiation or ``is_grads_batched`` runs, of which
    torch's grouped product has no rule."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def _missing(rank: int, like: Tensor) -> int:
    """Returns how many columns are to be added to a rank, so that a row has a multiple of ``_ALIGNMENT`` bytes."""
    return -rank % (_ALIGNMENT // like.element_size())


def _takes(tensor: Tensor) -> bool:
    """Returns whether torch's grouped product takes an operand: rows or columns are contiguous, all else is aligned."""
    if tensor.dtype not in _GROUPED or not hasattr(F, "grouped_mm") or _is_transformed(tensor):
        return False
    if tensor.data_ptr() % _ALIGNMENT:
        return False
    *outer, last, inner = tensor.stride()
    strides = [inner if last == 1 else last if inner == 1 else 1, *outer]
    return all(stride * tensor.element_size() % _ALIGNMENT == 0 for stride in strides)


def experts_of(offsets: Tensor, n: int) -> Tensor:
    """Returns the expert of each of n rows, int64 (n,), E for rows of none."""
    return torch.searchsorted(offsets, torch.arange(n, dtype=offsets.dtype, device=offsets.device), right=True)


def _places(offsets: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Returns the expert of each row and the row's number among those of this expert."""
    experts = experts_of(offsets, n)
    starts = F.pad(offsets, (1, 0))
    return experts, torch.arange(n, dtype=torch.int64, device=offsets.device) - starts[experts]


def _padded(rows: Tensor, offsets: Tensor) -> Tensor:
    """Returns the rows of each expert as a batch (E + 1, most rows of one, d), 0 where it has fewer. It waits for the
    device. The last of the batch has the rows of no expert."""
    experts, places = _places(offsets, len(rows))
    most = int(places.max()) + 1 if len(rows) else 0
    return rows.new_zeros((len(offsets) + 1, most, rows.shape[1])).index_put((experts, places), rows)[:-1]


def _unpadded(batch: Tensor, offsets: Tensor, n: int) -> Tensor:
    """Returns the rows of a batch of ``_padded``, those of no expert as 0."""
    experts, places = _places(offsets, n)
    rest = batch.new_zeros((1, *batch.shape[1:]))
    return torch.cat((batch, rest))[experts, places]


def _without_rest(rows: Tensor, offsets: Tensor) -> Tensor:
    """Returns the rows with 0 in those that belong to no expert. On a GPU it does not wait for the device."""
    if rows.is_cpu and int(offsets[-1]) == len(rows):
        return rows
    kept = torch.arange(len(rows), dtype=offsets.dtype, device=rows.device)[:, None] < offsets[-1]
    return torch.where(kept, rows, 0)
