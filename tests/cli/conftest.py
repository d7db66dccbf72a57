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
