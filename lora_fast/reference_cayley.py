"""Plain-torch twin of the Cayley transform behind NB-LoRA ("Norm-Bounded Low-Rank Adaptation"): the specification, the
oracle of the kernels' tests, and the backend on a CPU.

Math      With ã = [a1 | a2], a1 (r, r):
          M = I + a1ᵀ − a1 + a2 a2ᵀ + b̃ᵀb̃        Wi = M⁻¹, which exists: M's symmetric part is at least I
          a = [2 Wiᵀ − I | −2 Wiᵀ a2]    b = −2 b̃ Wi        a aᵀ + bᵀb = I
          b's columns come multiplied by ``scale``, where one is given.
Backward  from ga and gb (with respect to the scaled b), where C = b̃ᵀgb and D = diag(scale):
          T = ga1ᵀ − a2 ga2ᵀ − C D       S = 2 Wiᵀ T Wiᵀ       R = S + Sᵀ
          d a1 = S − Sᵀ      d a2 = −R a2 − 2 Wi ga2      d b̃ = −b̃ R − 2 gb D Wiᵀ
          d scale = diag(bᵀgb) = −2 · column sums of Wi∘C
Notation  the paper's (X, Y) are (ã, b̃ᵀ), its (A, B) are (a, bᵀ). Its printed backward (25) has a sign error.
Shapes    lists of pairs of any shapes and ranks: free_a (r, d_in) with r ≤ d_in, free_b (d_out, r), scale (r,),
          inverse Wi (r, r). Results in float32, or float64 for float64 pairs; gradients in the dtype of what they
          belong to. M and Wi are computed in float64: in float32, a skew part a hundred times as large, or rows
          that point nearly the same way, cost M its smallest eigenvalues, and a aᵀ + bᵀb = I with them.
Saved     Wi only; all pairs of one rank are inverted in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CACHED = 1 << 19  # elements of the factors that are worked on at a time: what a CPU's cache holds


def cayley(
    free_a: Sequence[Tensor], free_b: Sequence[Tensor], scales: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """a, b · diag(scale) and Wi of every pair."""
    return _by_rank(_cayley, 3, free_a, free_b, *([scales] if scales else []))


def _cayley(free_a, free_b, scales=None) -> tuple:
    """The same of pairs of one rank: Grams part by part, all inverses at once, products part by part."""
    rank, dtype, parts = free_a[0].shape[0], _wide(free_a[0][:0]).dtype, _parts(free_a, free_b)
    stacks = [(_stack(free_a, part), _stack(free_b, part)) for part in parts]
    grams, a1 = zip(*(_gram(a, b) for a, b in stacks), strict=True)
    a1, grams = torch.cat(a1), torch.cat(grams)
    eye = torch.eye(rank, dtype=torch.float64, device=a1.device)
    inverses = torch.linalg.inv_ex(eye + grams + (a1.mT - a1))[0]
    first = (2 * inverses.mT - eye).to(dtype)
    inverses = inverses.to(dtype).contiguous()
    right = -2 * inverses
    if scales is not None:
        right = right * _stack(scales, [i for part in parts for i in part])[:, None]
    made, sizes = [], [len(part) for part in parts]
    matrices = (x.split(sizes) for x in (-2 * inverses.mT, right, first))
    for (a, b), one, other, block in zip(stacks, *matrices, strict=True):
        made.append((one @ a, b @ other))
        made[-1][0][..., :rank] = block
    made_a, made_b = zip(*made, strict=True)
    return tuple(_in_order(parts, stacked) for stacked in (made_a, made_b, inverses.split(sizes)))


def _gram(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a2 a2ᵀ + b̃ᵀb̃ and a1, both in float64."""
    rank = a.shape[1]
    a2, rows = a[..., rank:].double(), b.mT.contiguous().double()  # a CPU multiplies rows faster than columns
    return torch.bmm(a2, a2.mT).baddbmm_(rows, rows.mT), a[..., :rank].double()


def cayley_backward(
    free_a: Sequence[Tensor],
    free_b: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    inverses: Sequence[Tensor],
    grad_a: Sequence[Tensor],
    grad_b: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """The gradients of free_a, free_b and scales (None without scales), from those of a and of the scaled b."""
    lists = free_a, free_b, inverses, grad_a, grad_b, *([scales] if scales else [])
    da, db, dscales = _by_rank(_cayley_backward, 3, *lists)
    return da, db, dscales if scales else None


def _cayley_backward(free_a, free_b, *others) -> tuple:
    """The same of pairs of one rank, part by part."""
    parts = _parts(free_a, free_b)
    lists = free_a, free_b, *others
    made = [_backward_part(*(_stack(tensors, part) for tensors in lists)) for part in parts]
    da, db, dscales = (_in_order(parts, stacked) for stacked in zip(*made, strict=True))
    cast = lambda made, like: [x.to(p.dtype) for x, p in zip(made, like, strict=True)]
    return cast(da, free_a), cast(db, free_b), dscales


def _backward_part(a, b, inverse, grad_a, grad_b, scale=None) -> tuple[Tensor, Tensor, Tensor]:
    """The same of stacked pairs of one shape."""
    rank = a.shape[1]
    c, right = b.mT @ grad_b, -2 * inverse.mT
    dscale = -2 * (inverse * c).sum(-2)
    if scale is not None:
        c, right = c * scale[:, None], right * scale[:, :, None]
    t = grad_a[..., :rank].mT - a[..., rank:] @ grad_a[..., rank:].mT - c
    s = 2 * inverse.mT @ t @ inverse.mT
    minus_r = -(s + s.mT)
    da = torch.bmm(minus_r, a).baddbmm_(-2 * inverse, grad_a)
    da[..., :rank] = s - s.mT
    return da, torch.bmm(b, minus_r).baddbmm_(grad_b, right), dscale


def bounded_scales(free_scales: Sequence[Tensor], bounds: Sequence[float], powers: Sequence[float]) -> list[Tensor]:
    """2 sv with sv = bound · q^power, q = softmax(free_scale / √r): sv's norm is the bound in the Schatten norm of
    exponent 1 / power (0: the spectral norm, sv = bound everywhere)."""
    shares = _by_rank(lambda some: (_shares(some).unbind(),), 1, free_scales)[0]
    scales = torch._foreach_pow(shares, list(powers))
    torch._foreach_mul_(scales, [2 * bound for bound in bounds])
    return list(scales)


def bounded_scales_backward(
    free_scales: Sequence[Tensor], powers: Sequence[float], scales: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of free_scales from those of scales: power/√r (u − q Σu), u = grad ∘ scale."""

    def of_rank(free_scales, scales, grads):
        u = torch.stack(grads) * torch.stack(scales)
        u = u - _shares(free_scales) * u.sum(-1, keepdim=True)
        return ((u / u.shape[-1] ** 0.5).unbind(),)

    found = torch._foreach_mul(_by_rank(of_rank, 1, free_scales, scales, grads)[0], list(powers))
    return [grad.to(x.dtype) for grad, x in zip(found, free_scales, strict=True)]


def _shares(free_scales: Sequence[Tensor]) -> Tensor:
    return torch.softmax(_wide(torch.stack(free_scales)) / free_scales[0].shape[0] ** 0.5, -1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _by_rank(compute: Callable, width: int, *lists: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    """compute's ``width`` result lists, called once for all positions whose first tensor has one rank, dtype and
    device."""
    places: dict[tuple, list[int]] = {}
    for i, x in enumerate(lists[0]):
        places.setdefault((x.shape[0], x.dtype, x.device), []).append(i)
    made = [compute(*([x[i] for i in indices] for x in lists)) for indices in places.values()]
    return tuple(_in_order(list(places.values()), [results[k] for results in made]) for k in range(width))


def _parts(free_a: Sequence[Tensor], free_b: Sequence[Tensor]) -> list[list[int]]:
    """Positions of pairs of one shape; on a CPU no more in a part than its cache holds."""
    places: dict[tuple, list[int]] = {}
    for i, (a, b) in enumerate(zip(free_a, free_b, strict=True)):
        places.setdefault((a.shape, b.shape), []).append(i)
    parts = []
    for (a, b), indices in places.items():
        size = max(1, CACHED // (a.numel() + b.numel())) if free_a[0].device.type == "cpu" else len(indices)
        parts += [indices[first : first + size] for first in range(0, len(indices), size)]
    return parts


def _stack(tensors: Sequence[Tensor], part: list[int]) -> Tensor:
    return _wide(torch.stack([tensors[i] for i in part]))


def _in_order(parts: Sequence[list[int]], stacks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The tensors of each part, back in the order of positions."""
    placed = {i: x for part, stack in zip(parts, stacks, strict=True) for i, x in zip(part, stack, strict=True)}
    return [placed[i] for i in range(len(placed))]
