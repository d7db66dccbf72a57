"""Groups items by a key, such as shape, dtype or device, and computes results group by group."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def group_by(items: Iterable[Item], key: Callable[[Item], Hashable]) -> dict[Hashable, list[Item]]:
    """Returns the items of each key in their original order. The keys are in the order of their first item."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def map_groups(compute: Callable, key: Callable[..., Hashable], *lists: Sequence) -> list[tuple]:
    """Calls ``compute`` once for each group of positions with the same key and returns the results in list order.

    Args:
        compute: takes one list for each of ``lists``, restricted to the group's positions. Returns one or more lists
            of results with one entry for each position.
        key: takes the items at one position, one from each of ``lists``.

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
