"""Parameters that plain AdamW trains, by torch's fused kernel on lists of tensors."""

from __future__ import annotations

from itertools import compress
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..kernels.grouping import group_by
from ..ops.pairs import adamw_, with_strides_of
from .batch import MOMENTS, states_of


class UnpairedParameters:
    """Parameters of one device and dtype. State is per parameter as in torch; the step counts
    are slices of one tensor, so that one operation advances all of them.

    Attributes:
        parameters: the parameters. group: the index of their parameter group.
    """

    def __init__(self, parameters: list[Tensor], group: int, states: dict):
        self.parameters, self.group = parameters, group
        self._optimizer_states = states
        for p in parameters:
            for name in MOMENTS:
                moment = states[p][name].to(p.device, p.dtype) if name in states[p] else torch.zeros_like(p)
                states[p][name] = with_strides_of(moment, p)
        like: dict[str, Any] = {"dtype": torch.float32, "device": parameters[0].device}
        counts = [state.get("step", torch.zeros((), **like)) for state in states_of(parameters, states)]
        self._steps = torch.stack([count.to(**like) for count in counts])
        self._counts = list(self._steps)
        for p, count in zip(parameters, self._counts, strict=True):
            states[p]["step"] = count
        self._kinds, self._count_addresses = self._current_kinds(), self._addresses()
        self._moments = _moment_ids(states_of(parameters, states))
        self.find_resting()

    @classmethod
    def build(cls, parameters: list[Tensor], group: int, states: dict) -> list[UnpairedParameters]:
        """Returns one instance for each device and dtype among the parameters."""
        kinds = group_by(parameters, lambda p: (p.device, p.dtype))
        return [cls(members, group, states) for members in kinds.values()]

    def intact(self) -> bool:
        """Returns whether devices and dtypes are unchanged, the moments are the tensors that were cast to them, and the
        step counts are still the slices."""
        states = states_of(self.parameters, self._optimizer_states)
        counts = [state.get("step") for state in states]
        # ``is`` compares identity: == would compare the counts' values, which waits for the device.
        same_counts = all(map(is_, counts, self._counts)) and self._addresses() == self._count_addresses
        same_moments = _moment_ids(states) == self._moments
        return same_counts and same_moments and self._current_kinds() == self._kinds

    def _addresses(self) -> list[int]:
        """Returns the addresses of the step counts, which code may move inside their tensors."""
        return [count.data_ptr() for count in self._counts]

    def find_resting(self) -> None:
        """Finds the parameters without gradients, which a step does not change. Runs whenever their set has changed."""
        active = [p.grad is not None for p in self.parameters]
        self._active = None if all(active) else active

    def _current_kinds(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(p.device, p.dtype) for p in self.parameters]

    def step(self, settings: dict) -> None:
        parameters, counts = self.parameters, self._counts
        if self._active is None:
            self._steps += 1
        else:
            parameters, counts = (list(compress(x, self._active)) for x in (parameters, counts))
            if not parameters:
                return
            torch._foreach_add_(counts, 1)
        gradients = [p.grad for p in parameters]
        states = states_of(parameters, self._optimizer_states)
        m, v = ([state[name] for state in states] for name in MOMENTS)
        adamw_(parameters, gradients, m, v, counts, settings)


def _moment_ids(states: list[dict]) -> list[int]:
    """Returns the identities of the moments, or nothing if any is missing. The tensors are not held, so that a user who
    clears the state frees their memory."""
    try:
        return [id(state[name]) for name in MOMENTS for state in states]
    except KeyError:
        return []
