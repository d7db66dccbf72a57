"""Reads the files of versions, of which constraints.txt is the development environment's."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pinned(file: str) -> dict[str, str]:
    """Returns package → version of one of the constraints*.txt."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))
