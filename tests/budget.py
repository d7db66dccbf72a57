"""The error budget: an op may be at most 1.05 times as wrong as eager torch is in the same dtype, plus half a unit in
the last place of a 16-bit result or 8 of a float32 one (where only the order of summation decides). Errors are relative
L2 errors against float64 on the same low-precision inputs.

Where float32 adapters meet 16-bit activations, eager computes their gradients in 16 bits and widens them: the unit is
that of the 16-bit dtype. Of a single token or rank the error is one rounding and so a matter of luck: eager's error is
the largest over ``DRAWS`` runs on the same case with x and dy scaled by 1 … 2, which differ in their roundings alone
(for all but the smallest shapes they hardly differ)."""

import torch

EAGER = 1.05
DRAWS = 8
ULPS = {torch.float16: 0.5, torch.bfloat16: 0.5, torch.float32: 8.0, torch.float64: 8.0}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.norm().item()
    difference = (got.double() - exact).norm().item()
    return difference / norm if norm else difference


def check(name: str, got: torch.Tensor, exact: torch.Tensor, eager_error: float, computed_in: torch.dtype) -> None:
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    allowed = EAGER * eager_error + ULPS[computed_in] * torch.finfo(computed_in).eps
    made = error(got, exact)
    assert made <= allowed, f"{name}: relative L2 error {made:.3e}, allowed {allowed:.3e}"


def eager_lora_linear(x, weight, bias, lora_A, lora_B, scaling, keep=None, kept=1.0):
    """PEFT's formula in x's dtype, differentiable: what the budget measures against. ``kept``: share of x kept."""
    dropped = x if keep is None else x * keep / kept
    down = torch.nn.functional.linear(dropped, lora_A.to(x.dtype))
    up = torch.nn.functional.linear(down, lora_B.to(x.dtype))
    return torch.nn.functional.linear(x, weight, bias) + up * scaling
