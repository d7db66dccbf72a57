"""Adapter pairs with gradients, as the optimizer's ops take them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from suite.cases import Case, Shape


@dataclass(frozen=True)
class Pairs:
    """One tensor a pair, float32: a (r, d_in), b (d_out, r), their gradients; the same values at every call."""

    a: list[Tensor]
    b: list[Tensor]
    da: list[Tensor]
    db: list[Tensor]

    @classmethod
    def of(cls, case: Case, device: torch.device) -> "Pairs":
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda m, n, scale: torch.randn(m, n, generator=generator, device=device) * scale
        lists = [], [], [], []
        for d_in, d_out in case.pairs:
            of_pair = draw(case.r, d_in, d_in**-0.5), draw(d_out, case.r, 0.01)
            of_pair += draw(case.r, d_in, 1e-3), draw(d_out, case.r, 1e-3)
            for one, tensor in zip(lists, of_pair, strict=True):
                one.append(tensor)
        return cls(*lists)

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        return self.a, self.b, self.da, self.db


def by_shape(shapes: tuple[Shape, ...]) -> dict[Shape, list[int]]:
    """Positions of the pairs of each shape."""
    found: dict[Shape, list[int]] = {}
    for i, shape in enumerate(shapes):
        found.setdefault(shape, []).append(i)
    return found
