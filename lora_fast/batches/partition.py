"""Partitions pairs into batches and chooses the torch or the Triton implementation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from .. import backend
from .batch import Batch, PairInGroups, Shapes
from .pairs import Pair
from .stacked import StackedBatch


def runs_on_triton(pair: Pair) -> bool:
    """Returns whether the steps of this pair run on the Triton kernels, which need contiguous factors. A factor that
    another parameter holds transposed (PEFT's ``ensure_weight_tying``) is none. Another GPU may be too old for them.

    Raises:
        BackendError: under the conditions of ``backend.uses_triton``.
    """
    return pair.a.is_contiguous() and pair.b.is_contiguous() and backend.uses_triton(pair.a)


def build(
    members: list[PairInGroups],
    states: dict,
    layout: Callable[[Pair], tuple[Shapes, Shapes]],
    stacked: bool,
    stochastic: bool,
) -> list[Batch]:
    """Returns batches of all members: a GroupedBatch each of those that run on Triton, a StackedBatch each of others.

    Args:
        members: the pairs, with the indices of their parameter groups.
        states: the optimizer's state, by parameter.
        layout: returns the shapes of the state of a pair's a and b.
        stacked: whether all of them need a StackedBatch.
        stochastic: whether new factors of 16 bits are rounded stochastically.
    """
    keyed = [(_key(member, not stacked and runs_on_triton(member[0])), member) for member in members]
    keyed.sort(key=lambda item: str(item[0]))  # devices have no order, strings do; stable within a batch
    batches: list[Batch] = []
    for (triton, *_), run in groupby(keyed, key=lambda item: item[0]):
        batches += _kind(triton).build([member for _, member in run], states, layout, stochastic)
    return batches


def _kind(triton: bool) -> type[Batch]:
    if triton:
        from .grouped import GroupedBatch  # imports Triton

        return GroupedBatch
    return StackedBatch


def _key(member: PairInGroups, triton: bool) -> tuple:
    """Returns the properties that all pairs of a batch have in common: first, whether they run on Triton."""
    pair, *groups = member
    key = triton, *groups, pair.a.device, pair.rank
    weight_dtype = None if pair.weight is None else pair.weight.dtype
    return key if triton else (*key, tuple(pair.a.shape), tuple(pair.b.shape), pair.a.dtype, weight_dtype)
