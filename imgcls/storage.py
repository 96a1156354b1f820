"""URLs to bytes and files: a folder, or what fsspec reads at one of `SCHEMES`.

Whole objects only. A write is whole or absent, and after a power cut too: a file's bytes are on the disk before a rename
puts it in place, and the name is there when the call returns. What goes over a network is tried again, with jitter,
until its deadline, and counted in `traffic`.
"""

import errno
import hashlib
import math
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from imgcls.disk import local_path, nearest, write_file
from imgcls.errors import DataError, MissingError, StorageError
from imgcls.remedies import remedy_for

SCHEMES = {"s3", "s3a"}
for scheme in SCHEMES:
    fsspec.register_implementation(scheme, "imgcls.s3.S3", clobber=True)

DEADLINE_S = 60.0
"""For an operation over a network, all its requests together; and a second more for every MiB that it carries."""
REQUEST_S = 20.0
"""A request that takes longer, and a second more for every MiB, is cancelled and made again."""
PREFLIGHT_S, PREFLIGHT_REQUEST_S = 10.0, 2.0
"""The same for all places that a command looks at before it begins."""
DEFINITE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Errors that another try would not change; a store's `NotImplemented` beside them."""


@dataclass
class Traffic:
    """What went over a network in this process."""

    requests: int = 0
    retries: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    waited_s: float = 0.0
    """In requests and between them; of all threads together."""

    def add(self, **amounts: float) -> None:
        with _counting:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)


def deadline_s(num_bytes: int = 0) -> float:
    return DEADLINE_S + num_bytes / (1 << 20)


traffic, _counting = Traffic(), threading.Lock()
_until: ContextVar[float | None] = ContextVar("until", default=None)
_request_s: ContextVar[float] = ContextVar("request_s", default=REQUEST_S)


@contextmanager
def within(seconds: float, *, request_s: float = REQUEST_S) -> Iterator[None]:
    """All operations inside share this deadline, or that of a `within` around it where it comes first."""
    outer = _until.get()
    until = time.monotonic() + seconds
    tokens = _until.set(until if outer is None else min(until, outer)), _request_s.set(request_s)
    try:
        yield
    finally:
        _until.reset(tokens[0])
        _request_s.reset(tokens[1])


def _split(url: str) -> tuple[Any, str]:
    """The file system and the path in it. Never fsspec's own reading of a URL, in which `::`, `?` and others mean much."""
    scheme, named, _ = (url := absolute(url)).partition("://")
    if not named:
        return LocalFileSystem(), url
    if scheme not in SCHEMES:
        raise StorageError(f"{url} is not a place that can be read or written\n  do: name a folder, or s3://bucket/prefix")
    fs = fsspec.filesystem(scheme)
    return fs, fs._strip_protocol(url)


@contextmanager
def _told(verb: str, url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each of fsspec's stores raises kinds of its own beside OSError
        if isinstance(error, FileNotFoundError) and verb == "read":
            raise MissingError(f"{url} does not exist") from None
        if isinstance(error, IsADirectoryError) and verb == "read":
            raise MissingError(f"{url} is a folder") from None
        raise StorageError(f"{url} cannot be {verb}: {getattr(error, 'strerror', None) or error}") from None


def _do(fs: Any, operation: str, path: str, *arguments: Any, num_bytes: int = 0, **options: Any) -> Any:
    """fs.operation(path, ...); over a network until it succeeds, cannot succeed, or its time is over."""
    if not isinstance(fs, AsyncFileSystem):
        return getattr(fs, operation)(path, *arguments, **options)
    began, until = time.monotonic(), _until.get()
    limit = max(0.0, until - began) if until is not None else deadline_s(num_bytes)
    # The third try may take all the time that is left, so that a request that is slow but sound succeeds.
    limits_s = chain([_request_s.get() + num_bytes / (1 << 20)] * 2, repeat(math.inf))
    tries, answer = count(), None

    def once() -> Any:
        traffic.add(requests=1, retries=min(1, next(tries)))
        timeout_s = min(max(0.1, began + limit - time.monotonic()), next(limits_s))
        return sync(fs.loop, getattr(fs, f"_{operation}"), path, *arguments, timeout=timeout_s, **options)

    def may_pass(error: BaseException) -> bool:
        nonlocal answer
        if "Timeout" not in type(error).__name__:  # fsspec's, or one of several of the store's client
            answer = error
        return not isinstance(error, DEFINITE) and getattr(error, "errno", None) != errno.ENOSYS

    wait = wait_random_exponential(0.1, max=5)
    trying = Retrying(stop=stop_before_delay(limit), wait=wait, retry=retry_if_exception(may_pass), reraise=True)
    try:
        found = trying(once)
    except Exception:  # the last try may have had no time for an answer
        raise answer or TimeoutError(f"no answer within {limit:.0f} s") from None
    finally:
        traffic.add(waited_s=time.monotonic() - began)
    sent = num_bytes if operation == "pipe_file" else 0
    traffic.add(bytes_read=len(found) if operation == "cat_file" else 0, bytes_written=sent)
    return found


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def absolute(url: str) -> str:
    """The same place seen from any working directory; URLs stay as they are, but that `file://` is a path."""
    path = url.removeprefix("file://")
    return path if "://" in path else str(local_path(path).absolute())


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
        return bool(_do(fs, "exists", path))


def read_bytes(url: str, *, num_bytes: int = 0) -> bytes:
    """num_bytes: as many as are expected; a large object has more time."""
    fs, path = _split(url)
    with _told("read", url):
        return _do(fs, "cat_file", path, num_bytes=num_bytes)


def read_bytes_if_there(url: str) -> bytes | None:
    fs, path = _split(url)
    with _told("read", url):
        try:
            return _do(fs, "cat_file", path)
        except (FileNotFoundError, NotADirectoryError):
            return None


def read_checked(url: str, *, num_bytes: int, digest: str) -> bytes:
    """The object's bytes, compared; fetched once more where they are others. Raises DataError, naming it."""
    found = (0, "")
    for _ in range(2):
        data = read_bytes(url, num_bytes=num_bytes)
        found = (len(data), sha256(data))
        if found == (num_bytes, digest):
            return data
    if found[0] != num_bytes:
        raise DataError(f"{url} has {found[0]:,} bytes, {num_bytes:,} were written; read twice")
    raise DataError(f"{url}: SHA-256 is {found[1][:12]}.., {digest[:12]}.. was written; read twice")


def num_bytes_of(url: str) -> int:
    fs, path = _split(url)
    with _told("read", url):
        return int(_do(fs, "info", path)["size"])


def write_bytes(url: str, data: bytes, *, durable: bool = True) -> None:
    """The object holds `data`, or what it held before; never a part.

    durable: after a power cut too, which costs a file on a disk some milliseconds.
    """
    with _told("written", url):
        _put(url, data, new=False, durable=durable)


def extend(url: str, data: bytes) -> None:
    """The object holds `data`, whose beginning it held before. On a disk it stays the same file, for who reads along."""
    if not is_local(url):
        write_bytes(url, data)
        return
    with _told("written", url), open(_split(url)[1], "ab") as file:
        file.write(data[file.tell() :])


def create_bytes(url: str, data: bytes) -> bool:
    """The object holds `data` and was not there before; False where it was. Of several that try, one succeeds.

    `data` are this caller's alone: where they lie there already, they are of an attempt whose answer was lost.
    """
    with _told("written", url):
        try:
            _put(url, data, new=True, durable=True)
        except FileExistsError:
            return not is_local(url) and read_bytes_if_there(url) == data
    return True


def _put(url: str, data: bytes, *, new: bool, durable: bool) -> None:
    fs, path = _split(url)
    if isinstance(fs, LocalFileSystem):
        write_file(Path(path), data, new=new, durable=durable)
    else:
        _do(fs, "pipe_file", path, data, num_bytes=len(data), mode="create" if new else "overwrite")


def folders(url: str) -> list[str]:
    """Names of the folders directly in a place, sorted; none where the place does not exist."""
    return sorted(_names(url, "directory"))


def files(url: str) -> list[str]:
    """Names of the files directly in a place, sorted; none where the place does not exist."""
    return sorted(_names(url, "file"))


def _names(url: str, kind: str) -> list[str]:
    fs, path = _split(url)
    with _told("listed", url):
        found = _listed(fs, path)
    return [name for name, its_kind in found if its_kind == kind]


def _listed(fs: Any, path: str) -> list[tuple[str, str]]:
    """(name, type) of each entry but the place itself, which a store may list where an object marks a folder."""
    itself = path.rstrip("/")
    try:
        entries = [(entry["name"].rstrip("/"), entry["type"]) for entry in _agreed(fs, "ls", path, detail=True)]
    except (FileNotFoundError, NotADirectoryError) as error:
        if error.__cause__ is not None:  # the store's own answer: there is no such bucket
            raise
        return []
    return sorted((name_of(name), kind) for name, kind in entries if name != itself)


def _agreed(fs: Any, operation: str, path: str, **options: Any) -> Any:
    """A listing that came over a network has no checksum: two that follow each other and agree are believed."""
    found = _do(fs, operation, path, **options)
    while isinstance(fs, AsyncFileSystem) and (again := _do(fs, operation, path, **options)) != found:
        found = again
    return found


def delete(url: str) -> None:
    """The file or folder is gone; it may have been gone before."""
    fs, path = _split(url)
    with _told("deleted", url), suppress(FileNotFoundError):
        if not isinstance(fs, AsyncFileSystem):
            fs.rm(path, recursive=True)
            return
        # One by one: s3fs would read a `[` as a pattern, and not hear what a deletion of many at once could not delete.
        for name in _agreed(fs, "find", path):
            _do(fs, "rm_file", name)


def move(url: str, to: str) -> None:
    """The object lies at `to`, in the same store, and no longer at `url`."""
    fs, path = _split(url)
    with _told("moved", url):
        if isinstance(fs, LocalFileSystem):
            fs.mv(path, _split(to)[1])
        else:
            _do(fs, "cp_file", path, _split(to)[1])
            _do(fs, "rm_file", path)


def clean_temporary(url: str) -> None:
    """Files that a kill left half-written below the folder are gone. Only for who alone writes there."""
    if is_local(url):
        with _told("deleted", url):
            for left in Path(_split(url)[1]).rglob(".*"):
                if left.is_file():
                    left.unlink(missing_ok=True)


def check_places(*, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
    """Each can be listed; where a command writes, a small object can be written, not created again, and removed.

    Raises StorageError within `PREFLIGHT_S`, whatever is wrong.
    """
    with within(PREFLIGHT_S, request_s=PREFLIGHT_REQUEST_S):
        for url in reads:
            _check_place(url, writes=False)
        for url in writes:
            _check_place(url, writes=True)


def _check_place(url: str, *, writes: bool) -> None:
    fs, path = _split(url)
    local = is_local(url)
    place = str(nearest(Path(path))) if local else url  # a look makes no folders
    probe = join(place, f".probe-{secrets.token_hex(8)}")
    try:
        with _told("listed", url):
            _listed(fs, path)
        if writes:
            _check_writes(probe)
    except StorageError as error:
        told, remedy = str(error).replace(probe, url), f"name a place that can be {'written' if writes else 'read'}"
        remedy = remedy if local else remedy_for(told.replace(url, ""), remedy)
        raise StorageError(f"{told}\n  do: {remedy}") from None


def _check_writes(probe: str) -> None:
    """A plain write comes first, so that a failure of the second is one of the conditional write."""
    fs, path = _split(probe)
    write_bytes(probe, b"one")
    try:
        told = f"{probe}: the store replaces an object although told not to" if create_bytes(probe, b"two") else ""
    except StorageError as error:
        told = str(error)
    with suppress(Exception) if told else _told("deleted", probe):
        _do(fs, "rm_file", path)
    if told:
        raise StorageError(f"{told}: two commands could work on one run at once")


@contextmanager
def temporary_folder(what: str, *, parent: str | None = None) -> Iterator[str]:
    """A folder of this process on this machine's disk, gone at the end; those that killed processes left go first.

    parent: where it lies; None is the system's place. Each has a locked file beside it: the kernel knows which processes
    live, in other containers on the same disk too.
    """
    root = Path(parent or tempfile.gettempdir())
    for left in root.glob(f"imgcls-{what}.*.lock"):
        with suppress(Timeout, OSError), FileLock(left, timeout=0):
            _remove(left)
    lock = root / f"imgcls-{what}.{secrets.token_hex(4)}.lock"
    with FileLock(lock):
        try:
            lock.with_suffix("").mkdir(mode=0o700)
            yield str(lock.with_suffix(""))
        finally:
            _remove(lock)


def _remove(lock: Path) -> None:
    """The folder of this lock is gone, and the lock itself."""
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)


def cache_root() -> Path:
    """Where this node keeps what it can make again: `IMGCLS_CACHE`, else `~/.cache/imgcls`."""
    return local_path(os.environ.get("IMGCLS_CACHE") or "~/.cache/imgcls")


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
