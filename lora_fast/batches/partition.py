"""Which pairs make a batch, and of which kind."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from .. import backend
from .batch import Batch, PairInGroups, Shapes
from .pairs import Pair


def runs_on_triton(pairs: list[Pair]) -> bool:
    """Whether these pairs' steps go to the Triton kernels.

    Raises:
        BackendError: they should and cannot.
    """
    kinds = {(pair.a.device, pair.a.dtype): pair.a for pair in pairs}
    return any([backend.uses_triton(factor) for factor in kinds.values()])


def build(
    members: list[PairInGroups], states: dict, layout: Callable[[Pair], tuple[Shapes, Shapes]], triton: bool
) -> list[Batch]:
    """Batches of all members: groups for ``triton``, else stacks. ``states`` is the optimizer's state, ``layout`` gives
    the state that a pair's factors have. Reads step counts, so a device is waited for; runs only when the set of pairs
    changes."""
    if triton:
        from .grouped import GroupedBatch as kind
    else:
        from .stacked import StackedBatch as kind
    keyed = [(_key(member, states, triton), member) for member in members]
    keyed.sort(key=lambda item: str(item[0]))  # stable: order within a batch is kept
    batches = []
    for key, run in groupby(keyed, key=lambda item: item[0]):
        batches += kind.of([member for _, member in run], key[:2], states, layout)
    return batches


def _key(member: PairInGroups, states: dict, triton: bool) -> tuple:
    pair, *groups = member
    steps = [int(states[p]["step"]) if "step" in states[p] else 0 for p in (pair.a, pair.b)]
    key = steps[1], steps[0], *groups, pair.a.device, pair.rank
    weight = None if pair.weight is None else pair.weight.dtype
    return key if triton else (*key, tuple(pair.a.shape), tuple(pair.b.shape), pair.a.dtype, weight)
