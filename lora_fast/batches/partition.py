"""Partitions pairs into batches and chooses the torch or the Triton implementation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from .. import backend
from .batch import Batch, PairInGroups, Shapes
from .pairs import Pair
from .stacked import StackedBatch


def runs_on_triton(pair: Pair) -> bool:
    """Returns whether the steps of this pair run on the Triton kernels. Another GPU may be too old for them.

    Raises:
        BackendError: under the conditions of ``backend.uses_triton``.
    """
    return backend.uses_triton(pair.a)


def build(
    members: list[PairInGroups], states: dict, layout: Callable[[Pair], tuple[Shapes, Shapes]], stacked: bool
) -> list[Batch]:
    """Returns batches of all members: a GroupedBatch each of those that run on Triton, a StackedBatch each of others.

    Reading the step counts waits for the device. This function runs only when the set of pairs changes.

    Args:
        members: the pairs, with the indices of their parameter groups.
        states: the optimizer's state, by parameter.
        layout: returns the shapes of the state of a pair's a and b.
        stacked: whether all of them need a StackedBatch.
    """
    keyed = [(_key(member, states, not stacked and runs_on_triton(member[0])), member) for member in members]
    keyed.sort(key=lambda item: str(item[0]))  # devices have no order, strings do; stable within a batch
    batches: list[Batch] = []
    for key, run in groupby(keyed, key=lambda item: item[0]):
        batches += _kind(key[2]).build([member for _, member in run], key[:2], states, layout)
    return batches


def _kind(triton: bool) -> type[Batch]:
    if triton:
        from .grouped import GroupedBatch  # imports Triton

        return GroupedBatch
    return StackedBatch


def _key(member: PairInGroups, states: dict, triton: bool) -> tuple:
    """Returns the properties that all pairs of a batch have in common: first the step counts of b and a, then
    whether they run on Triton."""
    pair, *groups = member
    steps = [int(states[p]["step"]) if "step" in states[p] else 0 for p in (pair.b, pair.a)]
    key = *steps, triton, *groups, pair.a.device, pair.rank
    weight_dtype = None if pair.weight is None else pair.weight.dtype
    return key if triton else (*key, tuple(pair.a.shape), tuple(pair.b.shape), pair.a.dtype, weight_dtype)
