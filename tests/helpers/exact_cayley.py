"""NB-LoRA's Cayley transform by an orthogonal decomposition instead of Grams, in float64: the reference for parameters
whose Grams lose what counts. Its rounding errors are ε times the parameters' size, those of a Gram ε times its square.

Math      With X the rows [a2ᵀ; b̃] and K = a1ᵀ − a1: [I; X] = Q R, so I + XᵀX = RᵀR and X = Q₂ R. Then
          W = (RᵀR + K)⁻¹ = R⁻¹ (I + R⁻ᵀ K R⁻¹)⁻¹ R⁻ᵀ and X W = Q₂ (I + R⁻ᵀ K R⁻¹)⁻¹ R⁻ᵀ, without a large number.
"""

import torch

KINDS = ["one direction", "one direction of a", "equal rows", "skew", "all"]


def exact_cayley(free_a: torch.Tensor, free_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns a (r, d_in), b (d_out, r) and W (r, r), differentiable, of float64 parameters."""
    r, d_in = free_a.shape
    eye = torch.eye(r, dtype=torch.float64, device=free_a.device)
    q, upper = torch.linalg.qr(torch.cat([eye, free_a[:, r:].T, free_b]))
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
    skew = inverse.T @ (free_a[:, :r].T - free_a[:, :r]) @ inverse
    core = torch.linalg.solve(eye + (skew - skew.T) / 2, inverse.T)
    tall = q[r:] @ core
    w = inverse @ core
    return torch.cat([2 * w.T - eye, -2 * tall[: d_in - r].T], 1), -2 * tall[d_in - r :], w


def extreme_parameters(kind: str, size: float, r: int, d_in: int, d_out: int, seed: int = 0):
    """Returns float32 free_a and free_b with entries of about ``size`` in one way."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    free_a, free_b = draw(r, d_in) / d_in**0.5, draw(d_out, r) / d_out**0.5
    if kind == "one direction":
        free_a, free_b = size * draw(r, 1) * draw(1, d_in) + free_a, size * draw(d_out, 1) * draw(1, r) + free_b
    elif kind == "one direction of a":  # b stays where it is as large as the transform allows
        free_a += size * draw(r, 1) * draw(1, d_in)
    elif kind == "equal rows":
        free_a, free_b = size * draw(r, d_in), size * draw(d_out, r)
        free_a[1 : r // 2 + 1], free_b[:, 1 : r // 2 + 1] = free_a[:1], free_b[:, :1]
    elif kind == "skew":
        free_a[:, :r] = size * draw(r, r)
    else:
        free_a, free_b = size * draw(r, d_in), size * draw(d_out, r)
    return free_a, free_b
