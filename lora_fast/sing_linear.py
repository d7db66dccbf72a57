"""SingLoRALinear: a frozen linear layer whose adapter is one matrix, taken for both factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import checks, functional
from .linear import Mergeable, over_linear


class SingLoRALinear(Mergeable, nn.Module):
    """Linear layer with SingLoRA's adapter, computed as one fused op.

    ``y = x Wᵀ + bias + (alpha / r) u dropout(x) aᵀ bᵀ`` with a = S[:d_in]ᵀ and b = S[:d_out] of one trained S, so that
    the factors cannot differ in scale. Neither is 0 at the start: u = min(steps / ramp_steps, 1) leads the adapter in.
    ``count_steps_`` has an optimizer count its steps; ``lf.optim.LoRAAdamW(model)`` does so by itself.

    Args:
        in_features: d_in.
        out_features: d_out.
        r: rank, 1 to 256.
        alpha: scale of the adapter.
        ramp_steps: optimizer steps until the adapter counts in full; 0: from the start, which changes the layer.
        dropout: probability of dropping an element of x on the adapter's way, in training only.
        bias: whether the frozen layer has one.
        device: of all parameters.
        dtype: of all parameters (``from_linear`` gives the adapter float32 where the weight is 16-bit).

    Attributes:
        weight: (d_out, d_in), frozen. bias: (d_out,), frozen, or None.
        free_s: (max(d_in, d_out), r), trained.
        steps: counted so far: an int64 buffer, in the ``state_dict``.
        merged: True while ``weight`` contains the adapter.

    Raises:
        ArgumentError: r, alpha, ramp_steps or dropout out of range.
    """

    TRAINED = ("free_s",)  # parameters
    FREE = ("free_s", "steps")  # tensors that lora_A and lora_B do not tell
    SETTINGS = ("alpha", "ramp_steps")  # besides r and dropout
    use_rslora = False  # of the plain LoRA adapter that it equals, with lora_A, lora_B, alpha and scaling

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        alpha: float,
        ramp_steps: int = 0,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.r = checks.rank(r)
        self.alpha = checks.positive(alpha, "alpha")
        self.ramp_steps = checks.count(ramp_steps, "ramp_steps") if ramp_steps != 0 else 0
        self.dropout_p = checks.probability(dropout)
        place = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **place), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, **place), requires_grad=False) if bias else None
        self.free_s = nn.Parameter(torch.empty(max(in_features, out_features), r, **place))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self.counted = False
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, r: int, alpha: float, ramp_steps: int = 0, dropout: float = 0.0
    ) -> SingLoRALinear:
        """The layer over ``linear``'s own parameters (shared, not copied, and frozen from now on).

        The adapter is on the weight's device, in float32 where the weight is 16-bit, else in the weight's dtype.
        """
        return over_linear(cls, linear, r=r, alpha=alpha, ramp_steps=ramp_steps, dropout=dropout)

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation of weight and bias, and a fresh adapter."""
        nn.Linear.reset_parameters(self)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """A fresh adapter: ``free_s`` Kaiming, no step counted."""
        nn.init.kaiming_uniform_(self.free_s, a=math.sqrt(5))
        self.steps = torch.zeros((), dtype=torch.int64, device=self.free_s.device)

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    @property
    def lora_A(self) -> Tensor:
        return self.free_s[: self.in_features].t()

    @property
    def lora_B(self) -> Tensor:
        b = self.free_s[: self.out_features]
        return b if not self.ramp_steps else b * (self.steps / self.ramp_steps).clamp(max=1).to(b.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) → (..., d_out).

        Raises:
            RuntimeError: a training step with a ramp that no optimizer counts: the adapter would never come in.
        """
        if self._buffers["_unmerged_weight"] is not None:
            return nn.functional.linear(x, self.weight, self.bias)
        if self.ramp_steps and self.training and not self.counted and torch.is_grad_enabled():
            raise RuntimeError("SingLoRALinear with ramp_steps: call lf.count_steps_(model, optimizer) before training")
        dropout_p = self.dropout_p if self.training else 0.0
        return functional.lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, dropout_p)

    def projected(self, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> tuple[Tensor, ...]:
        """Always an ArgumentError: two factors are not one matrix, and do not tell how many steps were counted."""
        expected = "SingLoRA's own matrix and steps beside it (as lf.save_adapter writes them)"
        raise checks.ArgumentError("adapter", expected, "plain LoRA")

    @torch.no_grad()
    def assign_(self, *values: Tensor) -> None:
        """Copy values into the layer's own tensors, in ``FREE``'s order."""
        for name, value in zip(self.FREE, values, strict=True):
            getattr(self, name).copy_(value)

    def extra_repr(self) -> str:
        rows = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        adapter = f"r={self.r}, alpha={self.alpha:g}, ramp_steps={self.ramp_steps}, dropout={self.dropout_p:g}"
        return f"{rows}, {adapter}" + (", merged" * self.merged)


def count_steps_(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """From now on each step of the optimizer leads the model's SingLoRALinear adapters one step further in. (A step
    that a GradScaler skips does not count.)"""
    layers = [module for module in model.modules() if isinstance(module, SingLoRALinear)]
    for layer in layers:
        layer.counted = True
    if layers:
        optimizer.register_step_post_hook(lambda *_: torch._foreach_add_([layer.steps for layer in layers], 1))
