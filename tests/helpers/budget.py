"""The error budget: an op may be at most 1.05 times as wrong as PEFT's own formula is with the same tensors, plus
half a unit in the last place of a 16-bit result or 8 of a float32 one (where only the order of summation decides).
Errors are relative L2 errors against float64 on the same inputs.

Where float32 adapters meet 16-bit activations PEFT computes S, dS and their gradients in float32 (under autocast in 16
bits); ours err by 1e-5 at most, if that is more: each float32 factor goes through the tensor cores as two bfloat16
halves. Of a single token or rank the error is one rounding and so a matter of luck: PEFT's error is the largest over
``DRAWS`` runs on the same case with x and dy scaled by 1 … 2, which differ in their roundings alone (for all but the
smallest shapes they hardly differ)."""

import torch
from torch.nn.functional import linear

EAGER = 1.05
DRAWS = 8
HALVES = 1e-5
ULPS = {torch.float16: 0.5, torch.bfloat16: 0.5, torch.float32: 8.0, torch.float64: 8.0}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.norm().item()
    difference = (got.double() - exact).norm().item()
    return difference / norm if norm else difference


def check(
    name: str, got: torch.Tensor, exact: torch.Tensor, eager_error: float, computed_in: torch.dtype, least: float = 0.0
) -> None:
    """``least``: what is allowed in any case, before the units in the last place."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    allowed = max(EAGER * eager_error, least) + ULPS[computed_in] * torch.finfo(computed_in).eps
    made = error(got, exact)
    assert made <= allowed, f"{name}: relative L2 error {made:.3e}, allowed {allowed:.3e}"


def least_error(dtype: torch.dtype, factor: torch.dtype) -> float:
    """What a gradient of a factor may err by in any case."""
    return HALVES if dtype.itemsize == 2 and factor is torch.float32 else 0.0


def eager_lora_linear(x, weight, bias, lora_A, lora_B, scaling, keep=None, kept=1.0):
    """PEFT's formula (tuners/lora/layer.py, Linear.forward), differentiable: the adapter in its own dtype, the sum in
    the wider, the result in the base layer's. ``kept``: share of x kept."""
    result = linear(x, weight, bias)
    dropped = x.to(lora_A.dtype)
    if keep is not None:
        dropped = dropped * keep / kept
    return (result + linear(linear(dropped, lora_A), lora_B) * scaling).to(result.dtype)
