import os
from pathlib import Path

import pytest

from imgcls import storage
from imgcls.errors import StorageError


def test_what_is_written_is_read_whole_and_no_temporary_file_stays(tmp_path: Path):
    url = storage.join(str(tmp_path), "a", "b.bin")
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    assert os.listdir(tmp_path / "a") == ["b.bin"]


def test_other_filesystems_serve_as_well():
    storage.write_bytes("memory://bucket/x/one.bin", b"1")
    storage.write_bytes("memory://bucket/x/deep/two.bin", b"2")
    assert storage.files("memory://bucket/x") == ["one.bin"]
    assert storage.folders("memory://bucket/x") == ["deep"]
    storage.delete("memory://bucket/x")
    assert not storage.exists("memory://bucket/x/one.bin")


def test_what_is_missing_is_none_or_an_error_that_names_it(tmp_path: Path):
    url = str(tmp_path / "none")
    assert storage.read_bytes_if_there(url) is None
    assert storage.files(url) == storage.folders(url) == []
    storage.delete(url)
    with pytest.raises(StorageError, match="none does not exist"):
        storage.read_bytes(url)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url = str(tmp_path / "a.bin")
    storage.write_bytes(url, b"before")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="cannot be written: No space left"):
        storage.write_bytes(url, b"after")
    assert storage.read_bytes(url) == b"before"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="cannot be written: Not a directory\n  do: name a place"):
            storage.check_places(writes=[str(place)])
    storage.check_places(writes=[str(tmp_path), str(tmp_path / "not" / "yet")])
    assert os.listdir(tmp_path) == ["file"]


def test_an_unknown_scheme_is_refused():
    with pytest.raises(StorageError, match="not a place"):
        storage.read_bytes("nosuch://bucket/x")


def test_relative_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute("s3://bucket/runs") == "s3://bucket/runs"
