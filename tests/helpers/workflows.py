"""The tests of tests/works_with: each runs one workflow of another library with PEFT's layers and with fused ones.

``docs/works_with.md`` lists them; ``tests/works_with/test_page.py`` reads the decorators below from the sources and
holds the page to them.
"""

from __future__ import annotations

from collections.abc import Callable


def workflow(title: str, compared: str) -> Callable[[Callable], Callable]:
    """Marks a test as a row of the page.

    Args:
        title: what a user of the library does.
        compared: what was compared between PEFT's layers and fused ones, with the tolerance.
    """

    def mark(test: Callable) -> Callable:
        return test

    return mark
