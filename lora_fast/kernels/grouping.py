"""Groups items by a key, such as shape, dtype and device, and maps functions over the groups."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Returns the items of each key, in their order. The keys are in the order of their first item."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def sorted_places(adapters: Sequence[int], n_adapters: int, size: int) -> tuple[list[int], list[int]]:
    """Returns the numbers of a batch's rows, sorted by adapter, and the end of each adapter's range among them.

    Args:
        adapters: the adapter of each sample, below 0 for none, whose rows come last.
        size: the number of rows of a sample, which follow each other.
    """
    samples = group_by(range(len(adapters)), lambda i: adapters[i] if adapters[i] >= 0 else n_adapters)
    rows: list[int] = []
    ends = []
    for adapter in range(n_adapters + 1):
        for sample in samples.get(adapter, ()):
            rows += range(sample * size, (sample + 1) * size)
        ends.append(len(rows))
    return rows, ends[:-1]


def map_groups(compute: Callable, key: Callable[..., Hashable], *lists: Sequence) -> list[tuple]:
    """Calls ``compute`` once for all positions of the lists that have the same key, and restores the order of its
    results.

    Args:
        compute: takes one list for each of ``lists``, with the members of a group, and returns a tuple of lists of
            results, each with one result for each member.
        key: takes the members at one position, one of each list.

    Returns:
        a tuple of results for each position.
    """
    rows = list(zip(*lists, strict=True))
    results: list[tuple] = [()] * len(rows)
    for positions in group_by(range(len(rows)), lambda i: key(*rows[i])).values():
        computed = compute(*([members[i] for i in positions] for members in lists))
        for i, result in zip(positions, zip(*computed, strict=True), strict=True):
            results[i] = result
    return results
