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
    keyed = [(_key(member, triton), member) for member in members]
    keyed.sort(key=lambda item: str(item[0]))  # devices have no order, strings do; stable within a batch
    batches: list[Batch] = []
    for _, run in groupby(keyed, key=lambda item: item[0]):
        batches += kind.build([member for _, member in run], states, layout)
    return batches


def _key(member: PairInGroups, triton: bool) -> tuple:
    """Returns the properties that all pairs of a batch have in common."""
    pair, *groups = member
    key = *groups, pair.a.device, pair.rank
    weight_dtype = None if pair.weight is None else pair.weight.dtype
    return key if triton else (*key, tuple(pair.a.shape), tuple(pair.b.shape), pair.a.dtype, weight_dtype)
