"""Progress of work on a model's layers that may take long."""

from __future__ import annotations

from collections.abc import Collection, Iterator


def bar(items: Collection[str], doing: str) -> Iterator[str]:
    """The items, under a tqdm bar on stderr that appears after two seconds and goes at the end; without one where tqdm
    is not installed (transformers brings it)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, desc=doing, unit="layer", delay=2, mininterval=1, leave=False))
