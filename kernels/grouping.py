"""Work on items that belong together by a key: shapes, dtypes, devices."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def group_by(items: Iterable[Item], key: Callable[[Item], Hashable]) -> dict[Hashable, list[Item]]:
    """Returns the items of each key in their order; the keys are in the order of their first item."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def map_groups(compute: Callable, key: Callable[..., Hashable], *lists: Sequence) -> list[tuple]:
    """Calls ``compute`` once for all positions of the lists that have one key, and puts its results back in order.

    Args:
        compute: takes the lists of a group's members, and returns as many results a position, each as a list.
        key: takes a position's members.

    Returns:
        One tuple of results for each position.
    """
    rows = list(zip(*lists, strict=True))
    results: list[tuple] = [()] * len(rows)
    for positions in group_by(range(len(rows)), lambda i: key(*rows[i])).values():
        computed = compute(*([members[i] for i in positions] for members in lists))
        for i, result in zip(positions, zip(*computed, strict=True), strict=True):
            results[i] = result
    return results
