"""Parameters that plain AdamW trains, by torch's fused kernel on lists of tensors."""

from __future__ import annotations

from itertools import compress
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..kernels.device import to_device
from ..kernels.grouping import group_by
from ..ops.pairs import adamw_, float32_copy, with_strides_of
from ..ops.reference.rounding import round_factors
from .batch import MOMENTS, noise_key, states_of


class UnpairedParameters:
    """Parameters of one device and dtype. State is per parameter as in torch; the step counts
    are slices of one tensor, so that one operation advances all of them.

    Attributes:
        parameters: the parameters. group: the index of their parameter group.
    """

    def __init__(
        self, parameters: list[Tensor], group: int, states: dict, state_dtype: torch.dtype, keys: list[int] | None
    ):
        """``state_dtype`` is the dtype of the moments. ``keys`` are those of stochastic rounding; None rounds to
        nearest."""
        self.parameters, self.group = parameters, group
        self._optimizer_states, self._keys = states, keys
        self._state_dtype = state_dtype
        for p in parameters:
            for name in MOMENTS:
                moment = states[p][name] if name in states[p] else torch.zeros_like(p)
                states[p][name] = with_strides_of(moment.to(p.device, state_dtype), p)
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
    def build(
        cls,
        named: list[tuple[str, Tensor]],
        group: int,
        states: dict,
        state_dtype: torch.dtype | None,
        stochastic: bool,
    ) -> list[UnpairedParameters]:
        """Returns one instance for each device and dtype among the named parameters.

        Args:
            named: names and parameters.
            group: the index of their parameter group.
            states: the optimizer's state, by parameter.
            state_dtype: the least dtype of the moments; None is the parameters' own.
            stochastic: whether new parameters of 16 bits are rounded stochastically.
        """
        instances = []
        for (_, dtype), members in group_by(named, lambda entry: (entry[1].device, entry[1].dtype)).items():
            keys = [noise_key(name) for name, _ in members] if stochastic and dtype.itemsize == 2 else None
            moments_dtype = dtype if state_dtype is None else torch.promote_types(dtype, state_dtype)
            instances.append(cls([p for _, p in members], group, states, moments_dtype, keys))
        return instances

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
        parameters, counts, keys = self.parameters, self._counts, self._keys
        if self._active is None:
            self._steps += 1
        else:
            parameters, counts = (list(compress(x, self._active)) for x in (parameters, counts))
            keys = keys and list(compress(keys, self._active))
            if not parameters:
                return
            torch._foreach_add_(counts, 1)
        gradients: list = [p.grad for p in parameters]
        states = states_of(parameters, self._optimizer_states)
        m, v = ([state[name] for state in states] for name in MOMENTS)
        if keys is None and self._state_dtype == parameters[0].dtype:
            adamw_(parameters, gradients, m, v, counts, settings)
            return
        new_p, wide_g, new_m, new_v = ([float32_copy(x) for x in xs] for xs in (parameters, gradients, m, v))
        adamw_(new_p, wide_g, new_m, new_v, counts, settings)
        torch._foreach_copy_([*m, *v, *parameters], [*new_m, *new_v, *self._rounded(new_p, counts, keys)])

    def _rounded(self, values: list[Tensor], counts: list[Tensor], keys: list[int] | None) -> list[Tensor]:
        """Returns new parameters in float32, rounded to the parameters' dtype."""
        dtype = self.parameters[0].dtype
        if keys is None:
            return values
        on_device = to_device(keys, torch.int64, values[0].device)
        rows = zip(values, on_device.split(1), counts, strict=True)
        return [round_factors(x[None], dtype, key, count[None], None)[0] for x, key, count in rows]


def _moment_ids(states: list[dict]) -> list[int]:
    """Returns the identities of the moments, or nothing if any is missing. The tensors are not held, so that a user who
    clears the state frees their memory."""
    try:
        return [id(state[name]) for name in MOMENTS for state in states]
    except KeyError:
        return []
