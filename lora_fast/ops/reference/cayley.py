"""Plain-torch twin of the Cayley transform behind NB-LoRA ("Norm-Bounded Low-Rank Adaptation"): the specification, the
oracle of the kernels' tests, and the backend on a CPU.

Math      With ã = [a1 | a2], a1 (r, r):
          M = (1 + τ) I + a1ᵀ − a1 + a2 a2ᵀ + b̃ᵀb̃        Wi = M⁻¹, which exists: M's symmetric part is at least I
          a = [2 Wiᵀ − I | −2 Wiᵀ a2]    b = −2 b̃ Wi        a aᵀ + bᵀb = I, where τ = 0
          b's columns are multiplied by ``scale``, where one is given.
          τ = ε ‖M‖_F, the size of M's rounding errors in float64: a aᵀ + bᵀb = I − 4 Wiᵀ (τ I + errors) Wi is then at
          most I, however large the parameters are. τ is 3e-8 where all entries of an ã (16, 1000) are 100.
Backward  from ga and gb (with respect to the scaled b), where C = b̃ᵀgb and D = diag(scale):
          T = ga1ᵀ − a2 ga2ᵀ − C D       S = 2 Wiᵀ T Wiᵀ       R = S + Sᵀ
          d a1 = S − Sᵀ      d a2 = −R a2 − 2 Wi ga2      d b̃ = −b̃ R − 2 gb D Wiᵀ
          d scale = diag(bᵀgb) = −2 · column sums of Wi∘C
Notation  the paper's (X, Y) are (ã, b̃ᵀ), its (A, B) are (a, bᵀ). Its printed backward (25) has a sign error.
Shapes    lists of pairs of any shapes and ranks: free_a (r, d_in) with r ≤ d_in, free_b (d_out, r), scale (r,),
          inverse Wi (r, r). a and b in float32, or float64 for float64 pairs; Wi in float64; each gradient in the dtype
          of its parameter. All arithmetic is float64. Where the parameters have a large part in common (a direction,
          equal rows, the skew part), it cancels out of every product with Wi, and float32 would lose the result with
          it.
Saved     Wi only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels.grouping import map_groups

__all__ = ["cayley", "cayley_backward"]

CACHED = 1 << 18  # elements of the factors in one part of a stack: in float64 about the size of a CPU's cache
CHUNK = 128  # products of a sum that are added in one go: sums in two levels are rounded less often
EPS = torch.finfo(torch.float64).eps


def cayley(
    free_a: Sequence[Tensor], free_b: Sequence[Tensor], scales: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns a, b · diag(scale) and Wi of every pair."""
    a, b, inverses = _over_stacks(_cayley, free_a, free_b, *([scales] if scales else []))
    return a, b, inverses


def _cayley(dtype, a, b, scale=None) -> tuple[Tensor, Tensor, Tensor]:
    """Computes ``cayley`` for stacked pairs of one shape."""
    rank, dtype = a.shape[1], _wide(dtype)
    a1, a2 = a[..., :rank], a[..., rank:]
    m = a1.mT - a1
    for columns in a2.split(CHUNK, -1):
        m.baddbmm_(columns, columns.mT)
    for rows in b.split(CHUNK, -2):
        m.baddbmm_(rows.mT, rows)
    m.diagonal(dim1=-2, dim2=-1).add_(1 + EPS * torch.linalg.matrix_norm(m)[:, None])
    inverse = torch.linalg.inv_ex(m)[0].contiguous()  # inv would wait for the device to check for singular matrices
    result_a = torch.bmm(-2 * inverse.mT, a).to(dtype)
    result_a[..., :rank] = 2 * inverse.mT - torch.eye(rank, dtype=m.dtype, device=m.device)
    right = -2 * inverse if scale is None else -2 * inverse * scale[:, None]
    return result_a, torch.bmm(b, right).to(dtype), inverse


def cayley_backward(
    free_a: Sequence[Tensor],
    free_b: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    inverses: Sequence[Tensor],
    grad_a: Sequence[Tensor],
    grad_b: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Returns the gradients of free_a, free_b and scales (None without scales) from those of a and of the scaled b."""
    lists = free_a, free_b, inverses, grad_a, grad_b, *([scales] if scales else [])
    da, db, dscales = _over_stacks(_cayley_backward, *lists)
    return da, db, dscales if scales else None


def _cayley_backward(dtype, a, b, inverse, grad_a, grad_b, scale=None) -> tuple[Tensor, Tensor, Tensor]:
    """Computes ``cayley_backward`` for stacked pairs of one shape."""
    rank = a.shape[1]
    c, right = b.mT @ grad_b, -2 * inverse.mT
    dscale = -2 * (inverse * c).sum(-2)
    if scale is not None:
        c, right = c * scale[:, None], right * scale[:, :, None]
    t = grad_a[..., :rank].mT - a[..., rank:] @ grad_a[..., rank:].mT - c
    s = 2 * inverse.mT @ t @ inverse.mT
    minus_r = -(s + s.mT)
    da = torch.bmm(minus_r, a).baddbmm_(-2 * inverse, grad_a).to(dtype)
    da[..., :rank] = s - s.mT
    db = torch.bmm(b, minus_r).baddbmm_(grad_b, right).to(dtype)
    return da, db, dscale.to(_wide(dtype))


def bounded_scales(free_scales: Sequence[Tensor], bounds: Sequence[float], powers: Sequence[float]) -> list[Tensor]:
    """Returns 2 sv with sv = bound · q^power, q = softmax(free_scale / √r). The Schatten norm of exponent 1 / power of
    sv is the bound (power 0: the spectral norm, sv = bound everywhere)."""
    (shares,) = _over_stacks(lambda dtype, free: (_shares(free).to(_wide(dtype)),), free_scales)
    scales = torch._foreach_pow(shares, list(powers))  # numbers become arguments of the launch, with no copy
    torch._foreach_mul_(scales, [2 * bound for bound in bounds])
    return list(scales)


def bounded_scales_backward(
    free_scales: Sequence[Tensor], powers: Sequence[float], scales: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Returns the gradients of free_scales from those of scales: power/√r (u − q Σu), u = grad ∘ scale."""

    def compute(dtype, free, scale, grad):
        u = grad * scale
        return ((u - _shares(free) * u.sum(-1, keepdim=True)) / u.shape[-1] ** 0.5,)

    (gradients,) = _over_stacks(compute, free_scales, scales, grads)
    return [x.to(p.dtype) for x, p in zip(torch._foreach_mul(gradients, list(powers)), free_scales, strict=True)]


def _shares(free_scale: Tensor) -> Tensor:
    return torch.softmax(free_scale / free_scale.shape[-1] ** 0.5, -1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _over_stacks(compute: Callable, *lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """Returns the results of ``compute`` for every position of the lists. It is called with the dtype of the first
    list's tensors and with stacks, in float64, of tensors that agree in shapes, dtype and device; on a CPU with parts
    that fit into its cache."""

    def in_parts(*members: list[Tensor]) -> list[list[Tensor]]:
        first, elements = members[0], sum(tensors[0].numel() for tensors in members[:2])
        size = max(1, CACHED // elements) if first[0].device.type == "cpu" else len(first)
        parts = []
        for start in range(0, len(first), size):
            stacks = (_stack(tensors[start : start + size]) for tensors in members)
            parts.append(compute(first[0].dtype, *stacks))
        return [[x for stack in stacks for x in stack.unbind()] for stacks in zip(*parts, strict=True)]

    kind = lambda *members: (members[0].dtype, members[0].device, *(x.shape for x in members[:2]))
    return [list(results) for results in zip(*map_groups(in_parts, kind, *lists), strict=True)]


def _stack(tensors: list[Tensor]) -> Tensor:
    """Returns the tensors as one in float64, converted while they are copied."""
    stack = tensors[0].new_empty((len(tensors), *tensors[0].shape), dtype=torch.float64)
    torch._foreach_copy_(stack.unbind(), tensors)
    return stack
