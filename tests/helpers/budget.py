"""The error budget: the error of an op is at most 1.05 times the error of PEFT's formula with the same tensors, plus
half a unit in the last place of a 16-bit result or 8 units of a float32 result (where only the order of summation
differs). Errors are relative L2 errors against float64 on the same inputs.

With float32 adapters and 16-bit activations PEFT computes S, dS and their gradients in float32 (under autocast in 16
bits). Our kernels split a float32 factor into two bfloat16 halves, so their error may in any case be 1e-5. With a
single token or rank the error is one rounding, which is a matter of luck. PEFT's error is therefore the largest of
``DRAWS`` runs of the case with x and dy scaled by 1 … 2, which differ only in their roundings (except for the smallest
shapes their errors hardly differ)."""

import torch
from torch.nn.functional import linear

EAGER = 1.05
DRAWS = 8
HALVES = 1e-5
ULPS = {torch.float16: 0.5, torch.bfloat16: 0.5, torch.float32: 8.0, torch.float64: 8.0}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns ‖got − exact‖ / ‖exact‖, or ‖got‖ if exact is zero."""
    norm = exact.norm().item()
    difference = (got.double() - exact).norm().item()
    return difference / norm if norm else difference


def check(
    name: str, got: torch.Tensor, exact: torch.Tensor, eager_error: float, computed_in: torch.dtype, least: float = 0.0
) -> None:
    """Raises AssertionError if the error of ``got`` exceeds the budget. An error of ``least`` plus the units in the
    last place is always allowed."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    allowed = max(EAGER * eager_error, least) + ULPS[computed_in] * torch.finfo(computed_in).eps
    got_error = error(got, exact)
    assert got_error <= allowed, f"{name}: relative L2 error {got_error:.3e}, allowed {allowed:.3e}"


def least_error(dtype: torch.dtype, factor: torch.dtype) -> float:
    """Returns the error that a gradient of a factor may always have."""
    return HALVES if dtype.itemsize == 2 and factor is torch.float32 else 0.0


def eager_lora_linear(x, weight, bias, lora_A, lora_B, scaling, keep=None, kept=1.0):
    """Returns the result of PEFT's formula (tuners/lora/layer.py, Linear.forward), which is differentiable. The adapter
    is computed in its own dtype, the sum in the wider dtype, and the result has the base layer's dtype. ``kept`` is the
    share of x that dropout keeps."""
    result = linear(x, weight, bias)
    dropped = x.to(lora_A.dtype)
    if keep is not None:
        dropped = dropped * keep / kept
    return (result + linear(linear(dropped, lora_A), lora_B) * scaling).to(result.dtype)
