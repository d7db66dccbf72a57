"""The tiny model and text on which the tests run the commands."""

from pathlib import Path

import pytest
import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the tiny model and its text."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_model.save(folder / "model")
    (folder / "text.txt").write_text(tiny_model.text())
    return folder


@pytest.fixture
def rendered():
    """For tests in a file that is ``unrendered``, and that read the drawings."""


@pytest.fixture
def unrendered(request, monkeypatch):
    """Makes an empty picture of every figure of a report, because drawing takes a third of a short run."""
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr("lora_fast.cli.output.plots._svg", lambda *arguments, **options: "<svg></svg>")
