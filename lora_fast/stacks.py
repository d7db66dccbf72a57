"""Pairs of equal shape kept in one tensor: parameters and their state are views into stacks, so that a method's algebra
is one batched call. What the optimizer shows to the outside stays per parameter, as in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from .pairs import Pair

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def adamw_state(pair: Pair) -> tuple[Shapes, Shapes]:
    """Shapes and dtypes of the state of a and of b: AdamW's moments."""
    return tuple({"exp_avg": (p.shape, p.dtype), "exp_avg_sq": (p.shape, p.dtype)} for p in (pair.a, pair.b))


@dataclass(eq=False)
class Factor:
    """One factor of all pairs of a stack.

    Attributes:
        value: (L, …), whose slices are the parameters. grad: (L, …), stacked when a method asks; None before.
        state: name → (L, …); the parameters' own state holds the slices.
        steps: (L,) float32, on the parameters' device. group: the index of its parameter group.
    """

    parameters: list[Tensor]
    value: Tensor
    state: dict[str, Tensor]
    steps: Tensor
    group: int
    grad: Tensor | None = None
    settings: dict = field(default_factory=dict)
    _places: list[int] = field(default_factory=list)
    _slices: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, parameters: list[Tensor], shapes: Shapes, states: dict, group: int) -> Factor:
        """Stack parameters and state, and make both slices of the stacks. New state is zero."""
        value = torch.stack([p.data for p in parameters])
        counts = [states[p].get("step", torch.zeros(())) for p in parameters]
        steps = torch.stack([count.to(value.device, torch.float32) for count in counts])
        state = {}
        for name, (shape, dtype) in shapes.items():
            state[name] = torch.zeros(len(parameters), *shape, dtype=dtype, device=value.device)
            for i, p in enumerate(parameters):
                if name in states[p]:
                    state[name][i].copy_(states[p][name])
        for i, p in enumerate(parameters):
            p.data = value[i]
            states[p].update({"step": steps[i]} | {name: stack[i] for name, stack in state.items()})
        factor = cls(parameters, value, state, steps, group)
        factor._places = [p.data_ptr() for p in parameters]
        factor._slices = {"value": list(value), "step": list(steps)} | {k: list(stack) for k, stack in state.items()}
        return factor

    def intact(self) -> bool:
        """Whether every parameter is still a slice of the stack."""
        return all(p.data_ptr() == place for p, place in zip(self.parameters, self._places, strict=True))

    def operands(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """p, g, m, v, step for AdamW: whole stacks where the gradient is stacked, else slices."""
        if self.grad is not None:
            moments = [self.state["exp_avg"]], [self.state["exp_avg_sq"]]
            return [self.value], [self.grad], *moments, self._slices["step"][:1]
        slices = self._slices
        grads = [p.grad for p in self.parameters]
        return slices["value"], grads, slices["exp_avg"], slices["exp_avg_sq"], slices["step"]


@dataclass(eq=False)
class Stack:
    """Pairs of one shape, dtype, device, parameter group and number of steps; ``count`` has the step under way."""

    pairs: list[Pair]
    a: Factor
    b: Factor
    count: int

    def gradients(self) -> tuple[Tensor, Tensor]:
        """da (L, r, d_in) and db (L, d_out, r): copies, which a method may change, or replace (``a.grad``)."""
        if self.a.grad is None:
            self.a.grad = torch.stack([p.grad for p in self.a.parameters])
            self.b.grad = torch.stack([p.grad for p in self.b.parameters])
        return self.a.grad, self.b.grad

    def begin(self, groups: list[dict]) -> None:
        """A new step: count it, forget the gradients of the last, read the settings (learning rate, …)."""
        self.count += 1
        for factor in (self.a, self.b):
            factor.steps += 1
            factor.grad = None
            factor.settings = groups[factor.group]


def build(
    pairs: list[tuple[Pair, int, int]], states: dict, layout: Callable[[Pair], tuple[Shapes, Shapes]]
) -> list[Stack]:
    """Stacks of (pair, group of a, group of b). ``states`` is the optimizer's state; ``layout`` gives the state that a
    pair's factors have. Reads step counts, so a device is waited for; runs only when the set of pairs changes."""
    keyed = [(_key(pair, states) + (group_a, group_b), pair) for pair, group_a, group_b in pairs]
    order = sorted(range(len(keyed)), key=lambda i: str(keyed[i][0]))  # a stable sort: order within a stack is kept
    stacks = []
    for key, members in groupby(order, key=lambda i: keyed[i][0]):
        members = [keyed[i][1] for i in members]
        shapes_a, shapes_b = layout(members[0])
        a = Factor.of([pair.a for pair in members], shapes_a, states, key[-2])
        b = Factor.of([pair.b for pair in members], shapes_b, states, key[-1])
        stacks.append(Stack(members, a, b, key[-3]))
    return stacks


def _key(pair: Pair, states: dict) -> tuple:
    steps = [int(states[p]["step"]) if "step" in states[p] else 0 for p in (pair.a, pair.b)]
    weight = None if pair.weight is None else pair.weight.dtype
    return tuple(pair.a.shape), tuple(pair.b.shape), pair.a.dtype, pair.a.device, weight, steps[1], steps[0]
