"""The tiny model and text that the commands are tried on."""

from pathlib import Path

import pytest
import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the model and the text."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_model.save(folder / "model")
    (folder / "text.txt").write_text(tiny_model.text())
    return folder
