"""LoRA+ (Hayou et al., arXiv 2402.12354): b has a larger learning rate than a."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from .method import Method


@dataclass(frozen=True)
class LoRAPlus(Method):
    """The learning rate of b is ``ratio`` times that of a. The method has no hooks: the optimizer puts b into a
    parameter group of its own."""

    ratio: float = 16.0

    uses_both_factors = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive(self.ratio, "ratio")
