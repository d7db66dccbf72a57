"""Node ids that pytest collects, without a process that imports everything again."""

from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class _Collected:
    def pytest_collection_finish(self, session):
        self.nodes = [item.nodeid for item in session.items]


def collected_here(files: Iterable[str], *options: str) -> list[str]:
    """Returns the node ids that ``pytest`` with these options collects of some files of the repository. Those that this
    process has imported are not imported again."""
    plugin = _Collected()
    quiet = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-p", "no:faulthandler", "-s", "-qq"]
    places = [str(ROOT / file) for file in files]
    status = pytest.main([*quiet, "--collect-only", *options, *places], plugins=[plugin])
    assert status == pytest.ExitCode.OK
    return plugin.nodes
