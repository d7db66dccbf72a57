"""Plain-torch twin of DoRA's ops: the specification, the oracle of the tests, and the backend on a CPU. None but
``column_scale`` and ``differentiable_backward`` is differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from . import linear

__all__ = ["backward", "column_scale", "column_scale_backward", "forward", "weight_norms"]

_CANCELLED = 1e-2  # of ‖W‖²: below it the formula of squares has lost digits
_ROWS = 256  # of a block of W + s b a, so that it stays in a CPU's caches


def row_squares(weight: Tensor) -> Tensor:
    """Returns ‖W_i‖² of each row: (d_out, d_in) → (d_out,), in at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()


def weight_norms(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, squares: Tensor | None = None
) -> Tensor:
    """‖W_i + s b_i a‖ of each row: (d_out, d_in), (r, d_in), (d_out, r) → (d_out,) in a's dtype, as PEFT rounds it.

    On a CPU it is the root of ‖W_i‖² + 2 s b_i·(W aᵀ)_i + s² b_i a aᵀ b_iᵀ, which never forms b a. ``squares`` are
    ``row_squares`` if the caller has them. Rows of which the terms cancel are computed as they are written, and so are
    all rows on other devices, which would have to be waited for.
    """
    if not weight.is_cpu:
        return written_norms(weight, lora_A, lora_B, scaling)
    wide = torch.promote_types(weight.dtype, torch.float32)
    squares = row_squares(weight) if squares is None else squares
    a, b = lora_A.to(wide), lora_B.to(wide)
    cross = linear.project(weight, lora_A).to(wide).mul_(b).sum(1)
    result = squares + (2 * scaling) * cross + scaling * scaling * ((b @ (a @ a.t())) * b).sum(1)
    rows = (result < _CANCELLED * squares).nonzero().view(-1)
    result = result.clamp_(min=0).sqrt_()
    if len(rows):
        result[rows] = _norms(weight[rows], lora_A, lora_B[rows], scaling, wide)
    return result.to(lora_A.dtype)


def written_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Returns what ``weight_norms`` does, computed as it is written, in blocks of rows. Its ops do not depend on
    values, so that they can be traced and transformed."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    blocks = zip(weight.split(_ROWS), lora_B.split(_ROWS), strict=True)
    return torch.cat([_norms(w, lora_A, b, scaling, wide) for w, b in blocks]).to(lora_A.dtype)


def _norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, wide: torch.dtype) -> Tensor:
    total = torch.addmm(weight.to(wide), lora_B.to(wide), lora_A.to(wide), alpha=scaling)
    return torch.linalg.vector_norm(total, dim=1)


def column_scale(u: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
    """y = (magnitude / norms)∘u + bias: (..., d_out), (d_out,), (d_out,), (d_out,) or None → (..., d_out) in u's
    dtype."""
    scale = _scale(magnitude, norms, u)
    if bias is None or u.is_nested:  # for which torch has no addcmul
        y = u * scale if bias is None else u * scale + bias.to(scale.dtype)
    else:
        y = torch.addcmul(bias.to(scale.dtype), u, scale)
    return y if y.dtype is u.dtype else y.to(u.dtype)


def column_scale_backward(
    dy: Tensor, u: Tensor, magnitude: Tensor, norms: Tensor, need_u: bool = True, need_magnitude: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """du = (magnitude / norms)∘dy: (..., d_out) in u's dtype, and the gradient of the magnitude, Σ_t dy∘u / norms:
    (d_out,) in its dtype; None where not needed. It is not differentiable: du takes the memory of dy∘u, since new
    memory costs a CPU more than the products."""
    scale = _scale(magnitude, norms, u)
    product = dy.to(scale.dtype) * u if need_magnitude else None
    dm = None if product is None else _total(product, magnitude, norms)
    return torch.mul(dy, scale, out=product).to(u.dtype) if need_u else None, dm


def differentiable_backward(
    dy: Tensor, u: Tensor, magnitude: Tensor, norms: Tensor, need_u: bool, need_magnitude: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns what ``column_scale_backward`` does, as functions that are differentiable again and can be mapped."""
    scale = _scale(magnitude, norms, u)
    dm = _total(dy.to(scale.dtype) * u, magnitude, norms) if need_magnitude else None
    return (dy * scale).to(u.dtype) if need_u else None, dm


def _total(product: Tensor, magnitude: Tensor, norms: Tensor) -> Tensor:
    """Returns the gradient of the magnitude from dy∘u (..., d_out)."""
    total = product.reshape(-1, product.shape[-1]).sum(0)
    return (total / norms.to(total.dtype)).to(magnitude.dtype)


def _scale(magnitude: Tensor, norms: Tensor, u: Tensor) -> Tensor:
    """Returns magnitude / norms in at least float32."""
    wide = torch.promote_types(u.dtype, torch.float32)
    return magnitude.to(wide) / norms.to(wide)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norms: Tensor,
    scaling: float, rounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y = (magnitude / norms)∘u + bias (..., d_out), S (n_tokens, r) and what backward needs of the product,
    (n_tokens, d_out): here u = x Wᵀ + scaling S bᵀ."""
    u, s = linear.forward(x, weight, None, lora_A, lora_B, scaling, None, rounded)
    return column_scale(u, magnitude, norms, bias), s, u.view(-1, u.shape[-1])


def backward(
    dy: Tensor, x: Tensor, s: Tensor, kept: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor,
    norms: Tensor, scaling: float, rounded: bool = False,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dx (..., d_in), da, db and the gradient of the magnitude, each None where ``needs`` (of x, a, b and the
    magnitude) is False."""
    need_x, need_a, need_b, need_m = needs
    rows, scale = dy.reshape(kept.shape), _scale(magnitude, norms, x)[:, None]
    du, dm = column_scale_backward(rows, kept, magnitude, norms, need_x, need_m)
    # Float32 factors keep their gradients' precision: du has been rounded to dy's dtype.
    scaled_b = (scale * lora_B).to(lora_B.dtype)
    thin_needs = need_x or need_a, need_a, need_b
    ds, da, db = linear.thin_gradients(rows, x, s, lora_A, scaled_b, scaling, None, rounded, thin_needs)
    dx = None if du is None or ds is None else linear.grad_x(du, weight, ds, lora_A).view(x.shape)
    return dx, da, None if db is None else (scale * db).to(db.dtype), dm
