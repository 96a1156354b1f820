import errno
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imgcls import storage
from imgcls.disk import local_path
from imgcls.errors import StorageError
from tests.conftest import ROOT
from tests.processes import until


def test_what_is_written_is_read_whole_and_no_temporary_file_stays(tmp_path: Path):
    url = storage.join(str(tmp_path), "a", "b.bin")
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    assert os.listdir(tmp_path / "a") == ["b.bin"]


def test_other_filesystems_serve_as_well(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "SCHEMES", {"memory"})
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


def test_a_fault_in_code_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fault(*arguments: object, **options: object) -> None:
        raise TypeError("fault")

    monkeypatch.setattr(LocalFileSystem, "cat_file", fault)
    monkeypatch.setattr(os, "replace", fault)
    for operation in (storage.read_bytes, lambda url: storage.write_bytes(url, b"1")):
        with pytest.raises(TypeError, match="fault"):
            operation(str(tmp_path / "one"))


def test_the_working_directory_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for url in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/x/.."):
        with pytest.raises(StorageError, match="cannot be deleted: it is the working directory"):
            storage.delete(url)
    assert tmp_path.is_dir()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="cannot be written: Not a directory\n  do: name a place"):
            storage.check_places(writes=[str(place)])
    storage.check_places(writes=[str(tmp_path), str(tmp_path / "not" / "yet")])
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "ftp://nowhere/x", "simplecache::s3://bucket/x", "memory://x"])
def test_a_scheme_that_is_not_ours_is_refused_before_any_network(url: str, monkeypatch: pytest.MonkeyPatch):
    def connected(*arguments: object, **options: object) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", connected)
    with pytest.raises(StorageError, match=r"not a place.*\n  do: name a folder, or s3://"):
        storage.read_bytes(url)


@settings(max_examples=40, deadline=None)
@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=40))
@example(name="a::b")
@example(name="zip::file:")
@example(name="x?versionId=1")
def test_a_folder_of_any_name_is_that_folder(name: str):
    if name in (".", "..") or "://" in name:
        return
    with tempfile.TemporaryDirectory() as root:
        storage.write_bytes(f"{root}/{name}/one", b"1")
        assert os.listdir(root) == [name]
        assert Path(root, name, "one").read_bytes() == b"1"
        assert storage.folders(root) == [name]


def test_where_only_a_folder_serves_a_url_is_not_told_to_be_one():
    with pytest.raises(StorageError, match="do: name a folder"):
        local_path("s3://bucket/photos")
    with pytest.raises(StorageError, match=r"do: s3://bucket/prefix with two slashes, or \./s3:/photos"):
        local_path("s3:/photos")


def test_a_file_url_is_the_path(tmp_path: Path):
    storage.write_bytes(f"file://{tmp_path}/one", b"1")
    assert storage.absolute(f"file://{tmp_path}/one") == str(tmp_path / "one")
    assert storage.absolute((tmp_path / "größe 1%").as_uri()) == str(tmp_path / "größe 1%")
    assert storage.read_bytes(str(tmp_path / "one")) == b"1"


def test_what_is_written_is_on_the_disk_before_its_name_and_its_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = list[str]()

    def recorded(name: str) -> None:
        kept = getattr(os, name)

        def call(first: int | str | Path, *rest: str | Path) -> None:
            on = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(rest[0])
            calls.append(f"{name} {re.sub(r'[.][0-9a-f]{8}$', '', os.path.relpath(on, tmp_path))}")
            kept(first, *rest)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "link"):
        recorded(name)
    storage.write_bytes(str(tmp_path / "a" / "b" / "one"), b"1")
    assert calls[:2] == ["fsync a/b/.one", "replace a/b/one"]
    assert sorted(calls[2:]) == ["fsync .", "fsync a", "fsync a/b"]
    calls.clear()
    assert storage.create_bytes(str(tmp_path / "a" / "new"), b"1")
    assert calls == ["fsync a/.new", "link a/new", "fsync a"]
    calls.clear()
    storage.write_bytes(str(tmp_path / "cheap"), b"1", durable=False)
    assert calls == ["replace cheap"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_rights_are_those_that_the_umask_leaves(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        storage.write_bytes(str(tmp_path / "one"), b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none, as SMB, virtiofs and some FUSE."""

    def link(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_of_several_that_create_a_file_one_succeeds_and_it_is_whole(tmp_path: Path):
    url, bodies = str(tmp_path / "one"), [bytes([i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda body: storage.create_bytes(url, body), bodies))
    assert sorted(made) == [False] * 7 + [True]
    assert storage.read_bytes(url) == bodies[made.index(True)]
    storage.check_places(writes=[str(tmp_path)])


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_who_is_killed_while_creating_blocks_nobody(tmp_path: Path):
    url = str(tmp_path / "one")
    code = f"""if True:
        import errno, os, signal
        from imgcls import storage
        def link(*arguments): raise PermissionError(errno.EPERM, "no")
        os.link, os.replace = link, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        storage.create_bytes({url!r}, b"killed")
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert storage.read_bytes_if_there(url) is None
    assert storage.create_bytes(url, b"mine")
    assert storage.files(url.rpartition("/")[0])[-1] == "one"


def test_a_temporary_folder_stays_while_its_process_lives_and_goes_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In another container process ids mean other processes: those that live are known by what they hold."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = f"""if True:
        import tempfile
        from imgcls import storage
        tempfile.tempdir = {str(tmp_path)!r}
        with storage.temporary_folder("test") as folder:
            print(folder, flush=True)
            input()
    """
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*container, "true"], check=False, capture_output=True).returncode:
        container = []  # this machine or user cannot make a namespace
    command = [*container, sys.executable, "-c", code]
    with storage.temporary_folder("test") as mine:
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            theirs = Path(process.stdout.readline().strip())
            assert theirs.is_dir()
            assert Path(mine).is_dir()
            process.kill()
            # Its input stays open meanwhile: at its end it would tidy up by itself.
            until(lambda: not _made(tmp_path, theirs), 60, "the folder of the process that was killed to go")
        assert Path(mine).is_dir()
    assert os.listdir(tmp_path) == []


def _made(tmp_path: Path, theirs: Path) -> bool:
    with storage.temporary_folder("test") as mine:
        assert len({mine, theirs}) == 2
        return theirs.exists()


@pytest.mark.parametrize("home", [None, "/somewhere"])
def test_a_home_is_expanded_or_its_lack_is_told(home: str | None, monkeypatch: pytest.MonkeyPatch):
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    if home:
        monkeypatch.setenv("HOME", home)
    for cache, says in (("~/c", "/somewhere/c"), ("", "/somewhere/.cache/imgcls"), ("~nobody-at-all/c", "")):
        monkeypatch.setenv("IMGCLS_CACHE", cache)
        if home and says:
            assert str(storage.cache_root()) == says
        else:
            with pytest.raises(StorageError, match=r"no such home folder here\n  do: set HOME, .*IMGCLS_CACHE"):
                storage.cache_root()
    monkeypatch.setenv("IMGCLS_CACHE", "/elsewhere")
    assert str(storage.cache_root()) == "/elsewhere"


def test_relative_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute("s3://bucket/runs") == "s3://bucket/runs"
