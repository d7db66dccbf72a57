"""Plain-torch twin of the linear ops: the specification, the oracle of the tests, and the backend on a CPU.

All floating dtypes are supported, including float64. ``x`` and ``dy`` are (n_tokens, d); ``keep`` is the dropout mask,
a bool (n_tokens, d_in), or None. ``scaling`` is alpha/r, times ``keep_scale(dropout_p)`` where there is a mask. None of
the functions is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.grouping import group_by
from ..observers import sees_ops
from .hashed_mask import hashed_mask
from .rounding import noise

__all__ = [
    "add_to_dx", "add_to_y", "backward", "draw_mask", "forward", "grad_a", "grad_s_b", "grad_x", "group_backward",
    "group_forward", "group_grad_x", "group_project", "group_thin_gradients", "linear", "project", "thin_gradients",
]  # fmt: skip

DROP_LEVELS = 1 << 16  # a dropout probability is a multiple of 1/65536


def drop_level(dropout_p: float) -> int:
    """Returns how many of the 65536 values of a 16-bit random number drop an element."""
    return round(DROP_LEVELS * dropout_p)


def keep_scale(dropout_p: float) -> float:
    """Returns 1/(1-p) for the p that is drawn (a multiple of 1/65536); 0 where everything is dropped."""
    kept = 1.0 - drop_level(dropout_p) / DROP_LEVELS
    return 1.0 / kept if kept else 0.0


def project(x: Tensor, lora_A: Tensor, keep: Tensor | None = None, rounded: bool = False) -> Tensor:
    """S = (keep∘x) aᵀ: (n_tokens, d_in), (r, d_in) → (n_tokens, r) in the wider of both dtypes. With ``rounded``, as
    under autocast, a is rounded to x's dtype and S has that dtype."""
    kept = x if keep is None else _kept(x, keep)
    lora_A = lora_A.to(x.dtype) if rounded else lora_A
    return F.linear(kept, lora_A) if lora_A.dtype is x.dtype else _wide_product(kept, lora_A.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y = x Wᵀ + bias + scaling · S bᵀ: → (n_tokens, d_out) in x's dtype."""
    return _add_product(F.linear(x, weight, bias), s, lora_B.t(), scaling)


def grad_s_b(
    dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float, need_s: bool = True, need_b: bool = True,
    rounded: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dS = scaling · dy b: (n_tokens, r) in the wider of dy's and b's dtypes (with ``rounded``, b is rounded to dy's
    dtype and dS has it); db = scaling · dyᵀ S: (d_out, r) in b's dtype; None where not needed."""
    b = lora_B.to(dy.dtype) if rounded else lora_B
    ds = _scaled_product(dy, b, scaling) if need_s else None
    if not need_b:
        return ds, None
    if dy.dtype is s.dtype and dy.dtype.itemsize >= 4:  # MKL takes less time for Sᵀ dy than for dyᵀ S
        db = _scaled_product(s.t(), dy, scaling).t().contiguous()
    else:
        db = _scaled_product(dy.t(), s, scaling)
    return ds, db if db.dtype is lora_B.dtype else db.to(lora_B.dtype)


def grad_a(x: Tensor, ds: Tensor, lora_A: Tensor, keep: Tensor | None = None) -> Tensor:
    """da = dSᵀ (keep∘x): → (r, d_in) in a's dtype."""
    kept = x if keep is None else _kept(x, keep)
    da = torch.mm(ds.t(), kept) if ds.dtype is x.dtype else _wide_product(kept.t(), ds).t().contiguous()
    return da if da.dtype is lora_A.dtype else da.to(lora_A.dtype)


def grad_x(dy: Tensor, weight: Tensor, ds: Tensor, lora_A: Tensor, keep: Tensor | None = None) -> Tensor:
    """dx = dy W + keep∘(dS a): → (n_tokens, d_in) in dy's dtype."""
    return _add_product(torch.mm(dy, weight), ds, lora_A, 1.0, keep)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    keep: Tensor | None = None, rounded: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y (..., d_out) and S (n_tokens, r) of x (..., d_in)."""
    rows = _rows(x)
    s = project(rows, lora_A, keep, rounded)
    return _unflat(linear(rows, weight, bias, s, lora_B, scaling), x), s


def backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float,
    keep: Tensor | None = None, rounded: bool = False, needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dx (..., d_in), da (r, d_in) and db (d_out, r), each None where ``needs`` (of x, a, b) is False."""
    need_x, need_a, need_b = needs
    ds, da, db = thin_gradients(dy, x, s, lora_A, lora_B, scaling, keep, rounded, (need_x or need_a, need_a, need_b))
    dx = grad_x(_rows(dy), weight, ds, lora_A, keep).view(x.shape) if need_x and ds is not None else None
    return dx, da, db


def thin_gradients(
    dy: Tensor, x: Tensor, s: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, keep: Tensor | None,
    rounded: bool, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dS (n_tokens, r), da (r, d_in) and db (d_out, r), each None where ``needs`` (of S, a, b) is False; da
    needs dS."""
    need_s, need_a, need_b = needs
    ds, db = grad_s_b(_rows(dy), s, lora_B, scaling, need_s, need_b, rounded)
    return ds, grad_a(_rows(x), ds, lora_A, keep) if need_a and ds is not None else None, db


# ---- Several layers of one x. A member is (weight, bias, lora_A, lora_B, scaling, keep), as arguments of ``forward``.
# S, da and db are products of their own here: those of stacked factors would have other bits.


def group_forward(
    x: Tensor, members: Sequence[tuple], rounded: bool = False
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Returns y (..., d_out) and S (n_tokens, r) of each member."""
    results = [forward(x, w, bias, a, b, scaling, keep, rounded) for w, bias, a, b, scaling, keep in members]
    return [y for y, _ in results], [s for _, s in results]


def group_backward(
    dys: Sequence[Any], x: Tensor, ss: Sequence[Tensor], members: Sequence[tuple], rounded: bool,
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """Returns dx, and da and db of each member, None where ``needs`` (of x, of each a and of each b) is False. A member
    whose dy is None has no gradients."""
    dss, das, dbs = group_thin_gradients(dys, x, ss, members, rounded, needs)
    parts = [
        (dy, weight, ds, a, keep)
        for dy, ds, (weight, _, a, _, _, keep) in zip(dys, dss, members, strict=True)
        if needs[0] and dy is not None
    ]
    return group_grad_x(x, parts) if parts else None, das, dbs


def group_thin_gradients(
    dys: Sequence[Any], x: Tensor, ss: Sequence[Tensor], members: Sequence[tuple], rounded: bool,
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """Returns dS, da and db of each member, None where ``needs`` (of x, of each a and of each b) is False; dS where x
    or a needs it. A member whose dy is None has no gradients. The members' weights are not read."""
    need_x, *needs_of_factors = needs
    dss, das, dbs = [], [], []
    for dy, s, (_, _, a, b, scaling, keep), need_a, need_b in zip(dys, ss, members, *needs_of_factors, strict=True):
        needed = dy is not None and (need_x or need_a), dy is not None and need_a, dy is not None and need_b
        ds, da, db = thin_gradients(dy, x, s, a, b, scaling, keep, rounded, needed) if any(needed) else (None,) * 3
        dss.append(ds)
        das.append(da)
        dbs.append(db)
    return dss, das, dbs


def group_grad_x(x: Tensor, parts: Sequence[tuple]) -> Tensor:
    """Returns dx = Σ dy W + keep∘(dS a) in x's shape, the sum over parts (dy, weight, dS, lora_A, keep)."""
    dy, weight, *_ = parts[0]
    dx = torch.mm(_rows(dy), weight)
    for dy, weight, *_ in parts[1:]:
        dx = (dx.addmm_ if not sees_ops() else dx.addmm)(_rows(dy), weight)
    return _add_thin(dx, [part[2:] for part in parts]).view(x.shape)


# ---- The low-rank parts of layers whose weights other libraries multiply


def group_project(x: Tensor, lora_As: Sequence[Tensor], keeps: Sequence[Tensor | None]) -> list[Tensor]:
    """Returns S (n_tokens, r) of each member for x (..., d_in)."""
    rows = _rows(x)
    return [project(rows, a, keep) for a, keep in zip(lora_As, keeps, strict=True)]


def add_to_y(y: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Adds scaling · S bᵀ to y (..., d_out), which is contiguous."""
    rows = _rows(y)
    _put(rows, _add_product(rows, s, lora_B.t(), scaling))


def plus_product(y: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Returns y + scaling · S bᵀ (..., d_out), a new tensor while a mode of torch sees the products."""
    return _unflat(_add_product(_rows(y), s, lora_B.t(), scaling), y)


def add_to_dx(dx: Tensor, parts: Sequence[tuple]) -> None:
    """Adds Σ keep∘(dS a) to dx (..., d_in), which is contiguous; parts (dS, lora_A, keep)."""
    rows = _rows(dx)
    _put(rows, _add_thin(rows, parts))


def _put(rows: Tensor, total: Tensor) -> None:
    if total is not rows:
        rows.copy_(total)


def _add_thin(dx: Tensor, parts: Sequence[tuple]) -> Tensor:
    """Returns dx + Σ keep∘(dS a), in place where ``_add_product`` is; parts (dS, lora_A, keep)."""
    for alike in group_by(parts, lambda part: _kind(*part)).values():
        thin, factors, keeps = zip(*alike, strict=True)
        dx = _add_product(dx, _beside(thin), _stacked(factors), 1.0, keeps[0])
    return dx


def _kind(ds: Tensor, a: Tensor, keep: Tensor | None) -> tuple:
    """Returns what members must have in common for their thin products to be one."""
    return ds.dtype, a.dtype, id(keep)


def _stacked(factors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def _beside(thin: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return thin[0] if len(thin) == 1 else torch.cat(thin, 1)


def _kept(tensor: Tensor, keep: Tensor) -> Tensor:
    """Returns keep∘tensor. On a CPU, torch takes a third of the time to multiply by bytes than by bools."""
    return tensor * keep.view(torch.uint8)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _unflat(y: Tensor, x: Tensor) -> Tensor:
    """Returns y (n_tokens, d_out) with x's leading dimensions. A view could not be changed in place as nn.Linear's
    result can."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def _scaled_product(tall: Tensor, thin: Tensor, scaling: float) -> Tensor:
    """Returns scaling · tall thin, in the wider of both dtypes."""
    if tall.dtype is not thin.dtype:
        return _wide_product(tall, thin) * scaling
    result = tall.new_empty((len(tall), thin.shape[1]))
    # With beta = 0 the uninitialised result is not read. Modes of torch count and keep the products that are new.
    return (result.addmm_ if not sees_ops() else result.addmm)(tall, thin, beta=0, alpha=scaling)


def _wide_product(tall: Tensor, thin: Tensor) -> Tensor:
    """Returns tall @ thin in the wider dtype of both, with that dtype's precision. On a GPU, a float32 matrix beside a
    bfloat16 one is split into two bfloat16 halves for the tensor cores. The exponent range of float16 is too small for
    such a split."""
    wide = torch.promote_types(tall.dtype, thin.dtype)
    if tall.is_cuda and tall.dtype is torch.bfloat16 and wide is torch.float32:
        high = thin.to(tall.dtype)
        low = (thin - high).to(tall.dtype)
        high, low = torch.mm(tall, torch.cat((high, low), dim=1), out_dtype=wide).chunk(
            2, dim=1
        )  # one product, so that tall is read once
        return high + low
    return torch.mm(tall.to(wide), thin.to(wide))


def _add_product(base: Tensor, thin: Tensor, factor: Tensor, alpha: float, keep: Tensor | None = None) -> Tensor:
    """Returns base + keep∘(alpha · thin factor), in place where base's precision is enough for the product and no mode
    of torch sees the products: selective checkpointing keeps them and uses them again. The exponent range of float16
    is too small for S, dS and factors of all sizes."""
    dtype = base.dtype
    if dtype is torch.float16 and not (thin.dtype is factor.dtype is dtype):
        product = torch.mm(thin.float(), factor.float())
        return torch.add(base, product if keep is None else _kept(product, keep), alpha=alpha).to(dtype)
    thin = thin if thin.dtype is dtype else thin.to(dtype)
    factor = factor if factor.dtype is dtype else factor.to(dtype)
    in_place = not sees_ops()
    if keep is None:
        return (base.addmm_ if in_place else base.addmm)(thin, factor, alpha=alpha)
    product = torch.mm(thin, factor)
    if not in_place:
        return base.add(_kept(product, keep), alpha=alpha)
    return base.add_(product.mul_(keep.view(torch.uint8)), alpha=alpha)


def draw_mask(x: Tensor, dropout_p: float, seed: int | Tensor) -> Tensor:
    """Returns the torch backend's dropout mask of x (..., d_in), bool (n_tokens, d_in), a function of the seed. It
    comes from NumPy's SFC64, 15 times faster than torch's Bernoulli, so that backward can draw it again. In place of a
    seed there may be the keys of a ``hashed_mask``, as compiled layers draw it, or the mask itself, as on a GPU."""
    d_in = x.shape[-1]
    n_tokens = x.numel() // d_in
    if isinstance(seed, Tensor) and seed.dtype is not torch.int64:
        return seed if seed.dtype is torch.bool else hashed_mask(seed, n_tokens, d_in, drop_level(dropout_p))
    words = np.random.SFC64(int(seed)).random_raw(-(-n_tokens * d_in // 4))
    numbers = words.view(np.uint16)[: n_tokens * d_in].reshape(n_tokens, d_in)
    return torch.from_numpy(numbers >= drop_level(dropout_p))


def philox_mask(
    seed: int | Tensor, n_tokens: int, d_in: int, dropout_p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns the kernels' dropout mask, bit for bit. An element is kept when its 16-bit number of ``rounding.noise``
    with key = seed is at least ``drop_level``."""
    return noise(seed, n_tokens, d_in, device=device) >= drop_level(dropout_p)
