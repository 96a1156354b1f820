"""URLs to bytes and files, through fsspec: a folder, `s3://`, or whatever fsspec knows.

Whole objects only. A write is whole or absent; a file on a disk is put in place by a rename.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from imgcls.errors import StorageError


def _split(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise StorageError(f"{url} is not a place that can be read or written: {error}") from None


@contextmanager
def _told(verb: str, url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each of fsspec's stores raises kinds of its own beside OSError
        if isinstance(error, FileNotFoundError) and verb == "read":
            raise StorageError(f"{url} does not exist") from None
        raise StorageError(f"{url} cannot be {verb}: {getattr(error, 'strerror', None) or error}") from None


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def absolute(url: str) -> str:
    """The same place seen from any working directory; URLs with a scheme stay as they are."""
    return url if "://" in url else str(Path(url).expanduser().absolute())


def shown(url: str) -> str:
    """`url` for a person: relative to the working directory where it lies below it."""
    here = f"{Path.cwd()}/"
    return url.removeprefix(here)


def name_of(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def is_local(url: str) -> bool:
    return isinstance(_split(url)[0], LocalFileSystem)


def exists(url: str) -> bool:
    fs, path = _split(url)
    with _told("read", url):
        return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    fs, path = _split(url)
    with _told("read", url):
        return fs.cat_file(path)


def read_bytes_if_there(url: str) -> bytes | None:
    fs, path = _split(url)
    with _told("read", url):
        try:
            return fs.cat_file(path)
        except (FileNotFoundError, NotADirectoryError):
            return None


def write_bytes(url: str, data: bytes) -> None:
    """The object holds `data`, or what it held before; never a part."""
    fs, path = _split(url)
    with _told("written", url):
        if isinstance(fs, LocalFileSystem):
            _write_file(Path(path), data)
        else:
            fs.pipe_file(path, data)


def create_bytes(url: str, data: bytes) -> bool:
    """The object holds `data` and was not there before; False where it was. Of several that try, one succeeds."""
    fs, path = _split(url)
    with _told("written", url):
        try:
            if isinstance(fs, LocalFileSystem):
                _write_file(Path(path), data, new=True)
            else:
                fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
    return True


def _write_file(path: Path, data: bytes, *, new: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        (os.link if new else os.replace)(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def folders(url: str) -> list[str]:
    """Names of the folders directly in a place, sorted; none where the place does not exist."""
    return sorted(_names(url, "directory"))


def files(url: str) -> list[str]:
    """Names of the files directly in a place, sorted; none where the place does not exist."""
    return sorted(_names(url, "file"))


def _names(url: str, kind: str) -> list[str]:
    fs, path = _split(url)
    with _told("listed", url):
        try:
            found = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [name_of(entry["name"]) for entry in found if entry["type"] == kind]


def delete(url: str) -> None:
    """The file or folder is gone; it may have been gone before."""
    fs, path = _split(url)
    with _told("deleted", url), suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def move(url: str, to: str) -> None:
    """The object lies at `to`, in the same store, and no longer at `url`."""
    fs, path = _split(url)
    with _told("moved", url):
        fs.mv(path, _split(to)[1])


def clean_temporary(url: str) -> None:
    """Files that a kill left half-written below the folder are gone. Only for who alone writes there."""
    if is_local(url):
        with _told("deleted", url):
            for left in Path(_split(url)[1]).rglob(".*"):
                if left.is_file():
                    left.unlink(missing_ok=True)


def check_writable(url: str) -> None:
    """A small object can be written there and is gone again. Raises StorageError with the reason."""
    probe = join(url, f".writable-{os.getpid()}")
    try:
        write_bytes(probe, b"")
    except StorageError as error:
        told = str(error).replace(probe, url)
        raise StorageError(f"{told}\n  do: name a place that can be written") from None
    delete(probe)


@contextmanager
def temporary_folder(what: str) -> Iterator[str]:
    """A folder of this process on this machine's disk, gone at the end; those that killed processes left go first."""
    prefix = f"imgcls-{what}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        yield folder


def cache_root() -> Path:
    """Where this node keeps what it can make again: `IMGCLS_CACHE`, else `~/.cache/imgcls`."""
    return Path(os.environ.get("IMGCLS_CACHE") or Path.home() / ".cache" / "imgcls")


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
