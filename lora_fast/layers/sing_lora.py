"""SingLoRALinear: a frozen linear layer whose adapter uses one trained matrix for both factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import checks
from .base import AdapterLinear


class SingLoRALinear(AdapterLinear):
    """Linear layer with SingLoRA's adapter, computed as one fused op.

    ``y = x Wᵀ + bias + (alpha / r) u dropout(x) aᵀ bᵀ`` with a = S[:d_in]ᵀ and b = S[:d_out] of one trained S, so that
    the factors cannot differ in scale. Neither factor is 0 at the start, so the warm-up u = min(steps / ramp_steps, 1)
    multiplies the adapter. ``count_steps_`` makes an optimizer count its steps; ``lf.optim.LoRAAdamW(model)`` calls it.

    Args:
        in_features, out_features, r, dropout, bias, device, dtype: as AdapterLinear.
        alpha: scale of the adapter.
        ramp_steps: optimizer steps of the warm-up. With 0 there is none, so the layer's output changes at once.

    Attributes:
        weight, bias, merged: as AdapterLinear.
        free_s: (max(d_in, d_out), r), trained.
        steps: optimizer steps counted so far, an int64 buffer in the ``state_dict``.

    Raises:
        ArgumentError: r, alpha, ramp_steps or dropout out of range.
    """

    TRAINABLE = ("free_s",)
    SAVED_STATE = ("free_s", "steps")
    INIT_ARGUMENTS = ("alpha", "ramp_steps")
    takes_siblings = False

    alpha: float

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
        super().__init__(in_features, out_features, r, dropout, bias, device, dtype)
        self.alpha = checks.positive(alpha, "alpha")
        self.ramp_steps = checks.count(ramp_steps, "ramp_steps", least=0)
        self.free_s = nn.Parameter(torch.empty(max(in_features, out_features), r, device=device, dtype=dtype))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.counted = False  # whether an optimizer counts the steps
        self.reset_parameters()

    def reset_adapter(self) -> None:
        """Initialises ``free_s`` by Kaiming and sets the count of steps to 0."""
        # S holds LoRA's a transposed, so a's fan-in is the fan-out of S.
        nn.init.kaiming_uniform_(self.free_s, a=math.sqrt(5), mode="fan_out")
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
        # Named, because the quotient of an integer tensor would have the process's default dtype.
        share = self.steps.to(torch.float32) / self.ramp_steps if self.ramp_steps else None
        return b if share is None else b * share.clamp(max=1).to(b.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns a (r, d_in) and b (d_out, r) for one forward, differentiable.

        Raises:
            RuntimeError: a training step of a layer with ramp_steps whose steps no optimizer counts, so that the
                adapter would stay 0.
        """
        if self.ramp_steps and self.training and not self.counted and torch.is_grad_enabled():
            raise RuntimeError("SingLoRALinear with ramp_steps: call lf.count_steps_(model, optimizer) before training")
        return self.lora_A, self.lora_B


def count_steps_(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer count its steps for the warm-up of the model's SingLoRALinear layers. A step that a GradScaler
    skips is not counted.

    Raises:
        ArgumentError: no module, or no optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise checks.ArgumentError("optimizer", "a torch.optim.Optimizer", type(optimizer).__name__)
    layers = [module for module in checks.module(model).modules() if isinstance(module, SingLoRALinear)]
    for layer in layers:
        layer.counted = True
    if layers:
        optimizer.register_step_post_hook(lambda *_: torch._foreach_add_([layer.steps for layer in layers], 1))
