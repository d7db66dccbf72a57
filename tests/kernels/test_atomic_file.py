"""Atomic writes: a failure leaves the old bytes and no temporary file."""

import os

import pytest

from lora_fast.kernels import atomic_file


def disk_full(path):
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_write_text_makes_the_folder_and_replaces_the_file(tmp_path):
    target = tmp_path / "a" / "b" / "notes.txt"
    for text in ("first", "zweite Fassung: σ"):
        atomic_file.write_text(target, text)
        assert target.read_text(encoding="utf-8") == text
    assert list(target.parent.iterdir()) == [target]


def test_write_all_changes_nothing_if_one_writer_fails(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        atomic_file.write_all({first: lambda path: path.write_text("new"), second: disk_full})
    assert first.read_text() == "old" and list(tmp_path.iterdir()) == [first]


def test_write_all_leaves_equal_files_and_removes_those_without_a_writer(tmp_path):
    same, gone = tmp_path / "same", tmp_path / "gone"
    for path in (same, gone):
        path.write_text("old")
    inode = same.stat().st_ino
    atomic_file.write_all({same: lambda path: path.write_text("old"), gone: None})
    assert same.stat().st_ino == inode and list(tmp_path.iterdir()) == [same]


def test_write_refuses_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(IsADirectoryError, match="target is a folder"):
        atomic_file.write_text(tmp_path / "target", "text")


def test_files_are_synced_before_and_their_folder_after_the_rename(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths))[1])
    atomic_file.write_text(tmp_path / "target", "text")
    assert calls == ["fsync", "replace", "fsync"]


def test_write_folder_keeps_the_folder_of_a_faster_process(tmp_path):
    target = tmp_path / "model"

    def write_late(temporary):
        (temporary / "config").write_text("late")
        target.mkdir()
        (target / "config").write_text("early")

    atomic_file.write_folder(target, write_late)
    assert (target / "config").read_text() == "early" and list(tmp_path.iterdir()) == [target]


def test_write_folder_removes_what_a_failed_writer_left(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        atomic_file.write_folder(tmp_path / "model", lambda folder: disk_full(folder / "config"))
    assert list(tmp_path.iterdir()) == []
