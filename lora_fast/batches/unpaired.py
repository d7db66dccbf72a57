"""Parameters that plain AdamW trains: torch's fused kernel on lists of tensors."""

from __future__ import annotations

from itertools import groupby
from operator import is_

import torch
from torch import Tensor

from ..ops.pairs import adamw_, with_strides_of
from .batch import MOMENTS


class UnpairedParameters:
    """Parameters of one device and dtype, with a gradient each. State is per parameter as in torch; the step counts are
    slices of one tensor, so that counting is one operation.

    Attributes:
        group: the index of their parameter group.
    """

    def __init__(self, parameters: list[Tensor], group: int, states: dict):
        self.parameters, self.group = parameters, group
        self._states = [states[p] for p in parameters]
        for p, state in zip(parameters, self._states, strict=True):
            for name in MOMENTS:
                there = state[name].to(p.device, p.dtype) if name in state else torch.zeros_like(p)
                state[name] = with_strides_of(there, p)
        counts = [state.get("step", torch.zeros(())) for state in self._states]
        self._steps = torch.stack([count.to(parameters[0].device, torch.float32) for count in counts])
        self._counts = list(self._steps)
        for state, count in zip(self._states, self._counts, strict=True):
            state["step"] = count
        self._kinds = self._kinds_now()

    @classmethod
    def of(cls, parameters: list[Tensor], group: int, states: dict) -> list[UnpairedParameters]:
        """One for each device and dtype."""
        kind = lambda p: (str(p.device), str(p.dtype))
        return [cls(list(members), group, states) for _, members in groupby(sorted(parameters, key=kind), kind)]

    def intact(self) -> bool:
        """Whether the parameters are where and what they were, none of their state is missing, and the counts are ours.
        Moments may be others: they are not held."""
        counts = [state.get("step") for state in self._states]
        there = [name in state for name in MOMENTS for state in self._states]
        return all(map(is_, counts, self._counts)) and all(there) and self._kinds_now() == self._kinds

    def _kinds_now(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(p.device, p.dtype) for p in self.parameters]

    def step(self, settings: dict) -> None:
        self._steps += 1
        gradients = [p.grad for p in self.parameters]
        moments = ([state[name] for state in self._states] for name in MOMENTS)
        adamw_(self.parameters, gradients, *moments, self._counts, settings)
