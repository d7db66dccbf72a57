"""Adapter pairs with gradients, in the lists that the optimizer's ops take."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fast.kernels.grouping import group_by
from suite.cases import Case, Shape


@dataclass(frozen=True)
class Pairs:
    """Lists with one float32 tensor a pair: a (r, d_in), b (d_out, r) and their gradients."""

    a: list[Tensor]
    b: list[Tensor]
    da: list[Tensor]
    db: list[Tensor]

    @classmethod
    def of(cls, case: Case, device: torch.device) -> "Pairs":
        """Draws the pairs of a case. Every call draws the same values."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(m: int, n: int, scale: float) -> Tensor:
            return torch.randn(m, n, generator=generator, device=device) * scale

        lists = [], [], [], []
        for d_in, d_out in case.pairs:
            pair = draw(case.r, d_in, d_in**-0.5), draw(d_out, case.r, 0.01)
            gradients = draw(case.r, d_in, 1e-3), draw(d_out, case.r, 1e-3)
            for tensors, tensor in zip(lists, (*pair, *gradients), strict=True):
                tensors.append(tensor)
        return cls(*lists)

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        return self.a, self.b, self.da, self.db


def by_shape(shapes: tuple[Shape, ...]) -> dict[Shape, list[int]]:
    """Returns the positions of the pairs of each shape."""
    return group_by(range(len(shapes)), shapes.__getitem__)
