"""Partitions pairs into batches and chooses the torch or the Triton implementation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from .. import backend
from .batch import Batch, PairInGroups, Shapes
from .pairs import Pair


def runs_on_triton(pairs: list[Pair]) -> bool:
    """Returns whether the steps of these pairs run on the Triton kernels.

    Raises:
        BackendError: the backend is "triton", or follows from a CUDA device, and cannot run these pairs.
    """
    factors = {(pair.a.device, pair.a.dtype): pair.a for pair in pairs}
    return any([backend.uses_triton(factor) for factor in factors.values()])  # a list: each factor may raise


def build(
    members: list[PairInGroups], states: dict, layout: Callable[[Pair], tuple[Shapes, Shapes]], triton: bool
) -> list[Batch]:
    """Returns batches of all members: a GroupedBatch each for ``triton``, else a StackedBatch each.

    Reading the step counts waits for the device. This function runs only when the set of pairs changes.

    Args:
        members: the pairs, with the indices of their parameter groups.
        states: the optimizer's state, by parameter.
        layout: returns the shapes of the state of a pair's a and b.
        triton: the choice of the implementation.
    """
    kind: type[Batch]
    if triton:
        from .grouped import GroupedBatch

        kind = GroupedBatch
    else:
        from .stacked import StackedBatch

        kind = StackedBatch
    keyed = [(_key(member, states, triton), member) for member in members]
    keyed.sort(key=lambda item: str(item[0]))  # devices have no order, strings do; stable within a batch
    batches: list[Batch] = []
    for key, run in groupby(keyed, key=lambda item: item[0]):
        batches += kind.build([member for _, member in run], key[:2], states, layout)
    return batches


def _key(member: PairInGroups, states: dict, triton: bool) -> tuple:
    """Returns the properties that all pairs of a batch have in common: first the step counts of b and a."""
    pair, *groups = member
    steps = [int(states[p]["step"]) if "step" in states[p] else 0 for p in (pair.b, pair.a)]
    key = *steps, *groups, pair.a.device, pair.rank
    weight_dtype = None if pair.weight is None else pair.weight.dtype
    return key if triton else (*key, tuple(pair.a.shape), tuple(pair.b.shape), pair.a.dtype, weight_dtype)
