"""Parameters that plain AdamW trains: torch's fused kernel on lists of tensors, which are kept from step to step."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from . import step

NAMES = ("exp_avg", "exp_avg_sq", "step")


class Plain:
    """Parameters of one device and dtype, with a gradient each. State is per parameter as in torch; the step counts are
    slices of one tensor, so that counting is one operation.

    Attributes:
        group: the index of their parameter group.
    """

    def __init__(self, parameters: list[Tensor], group: int, states: dict):
        self.parameters, self.group = parameters, group
        self._states = [states[p] for p in parameters]
        for p, state in zip(parameters, self._states, strict=True):
            for name in NAMES[:2]:
                state[name] = _laid_out(state[name], p) if name in state else torch.zeros_like(p)
        counts = [state.get("step", torch.zeros(())) for state in self._states]
        self._steps = torch.stack([count.to(parameters[0].device, torch.float32) for count in counts])
        for state, count in zip(self._states, self._steps, strict=True):
            state["step"] = count
        self._lists = [[state[name] for state in self._states] for name in NAMES]
        self._kinds = self._kinds_now()

    @classmethod
    def of(cls, parameters: list[Tensor], group: int, states: dict) -> list[Plain]:
        """One for each device and dtype."""
        kind = lambda p: (str(p.device), str(p.dtype))
        return [cls(list(some), group, states) for _, some in groupby(sorted(parameters, key=kind), kind)]

    def intact(self) -> bool:
        """Whether parameters and state are still those that the lists were made of."""
        ids = [[id(state.get(name)) for state in self._states] for name in NAMES]
        return ids == [list(map(id, tensors)) for tensors in self._lists] and self._kinds_now() == self._kinds

    def _kinds_now(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(p.device, p.dtype) for p in self.parameters]

    def step(self, settings: dict) -> None:
        self._steps += 1
        gradients = [_laid_out(p.grad, p) for p in self.parameters]
        options = (settings[name] for name in ("lr", "betas", "eps", "weight_decay"))
        step.adamw(self.parameters, gradients, *self._lists, *options)


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor with the parameter's strides: on a CPU torch's kernel reads all in the order of memory."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
