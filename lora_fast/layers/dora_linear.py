"""DoRALinear: a frozen linear layer with a DoRA adapter."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from ..functional.linear import reason_against_op
from ..ops import composite
from .dora import dora, group_arguments, kept_norms, row_norms, scale_of
from .lora import LoRALinear
from .terms import Term

_traced = torch.compiler.is_compiling


class DoRALinear(LoRALinear):
    """Linear layer with a low-rank adapter and a trained norm of each row (Liu et al., arXiv 2402.09353):

    ``y = c∘(x (W + scaling · b a)ᵀ) + bias``, c = magnitude / ‖W + scaling · b a‖, where the norms get no gradient.
    Dropout also acts on the frozen weight's part of what is scaled, as in PEFT.

    Args:
        in_features, out_features: sizes. settings: the other arguments of LoRALinear.

    Attributes:
        weight, bias, merged, lora_A, lora_B: as LoRALinear.
        lora_magnitude_vector: (d_out,), trained. It starts as the norms of the rows.

    Raises:
        ArgumentError: as LoRALinear.
    """

    TRAINABLE = ("lora_A", "lora_B", "lora_magnitude_vector")
    scales_weight = True

    lora_magnitude_vector: Tensor

    def __init__(self, in_features: int, out_features: int, **settings):
        super().__init__(in_features, out_features, **settings)
        self.lora_magnitude_vector = nn.Parameter(self.lora_B.new_empty(out_features))
        self.reset_magnitude()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings) -> Self:
        layer = super().from_linear(linear, **settings)
        layer.reset_magnitude()  # by the weight, which it has now
        return layer

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lora_magnitude_vector" in self._parameters:  # LoRALinear's constructor has none yet
            self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Sets the magnitudes to the norms of the rows, so that the adapter does not scale the weight."""
        weight, _ = self.frozen_parameters()
        self.lora_magnitude_vector.copy_(row_norms(weight, self.lora_A, self.lora_B, self.scaling))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) → (..., d_out)."""
        if self.is_plain:
            return self.plain_forward(x)
        call = weight, _, a, b, *_ = self.arguments()
        reason = None if self.base is not None else reason_against_op(x, weight, a, b)
        if reason is not self.fallback_reason:  # nn.Module.__setattr__ is slow, so it runs only for a change
            self._note(reason)
        return dora(x, call, self.lora_magnitude_vector, kept_norms(self), self._linear)

    @property
    def has_own_op(self) -> bool:  # type: ignore[override]
        return self.base is None

    def _linear(self, x: Tensor, call: tuple) -> Tensor:
        """Computes the op from x and its arguments, alone or with the layer's group."""
        if self.base is not None and _traced():  # the library's own ops are in the graph
            _, _, a, b, scaling, dropout_p = call
            return composite.add_adapter(self.base(x), x, a, b, scaling, dropout_p)
        return self._call(x, *call)

    def call_arguments(self, x: Tensor) -> tuple | None:
        call = super().call_arguments(x)
        return None if call is None else group_arguments(call)

    def merge_term(self) -> Term:
        term = super().merge_term()
        if self.merged:  # which keeps the scale of its merge
            return term
        weight, _ = self.frozen_parameters()
        scale = scale_of(self.lora_magnitude_vector, row_norms(weight, self.lora_A, self.lora_B, self.scaling))
        return term._replace(scale=scale[None] if self.fan_in_fan_out else scale[:, None])

    def train(self, mode: bool = True) -> Self:
        self.__dict__.pop("_norms", None)
        return super().train(mode)
