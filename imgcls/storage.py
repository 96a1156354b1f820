"""URLs to bytes and files: a folder, or what fsspec reads at one of `SCHEMES`.

It reads and writes whole objects only. A write is whole or absent, after a power cut too: a file's bytes are on the disk
before a rename puts it in place, and the name is on the disk when the call returns. A request over a network that meets
an error of `TRANSIENT` is retried, with jitter, until its deadline; `traffic` counts all requests.

What a place answers is raised as StorageError. Any other exception is a fault of this program and is raised as it is.
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
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import fsspec
from filelock import FileLock, Timeout
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry, retry_if_exception_type, stop_after_attempt, stop_before_delay, wait_random_exponential

from imgcls.disk import local_path, nearest, write_file
from imgcls.errors import DataError, MissingError, StorageError
from imgcls.remedies import remedy_for

SCHEMES = {"s3", "s3a"}
for scheme in SCHEMES:
    fsspec.register_implementation(scheme, "imgcls.s3.S3", clobber=True)

DEADLINE_S = 60.0
"""For one operation over a network with all its requests, plus one second for each MiB that it carries."""
REQUEST_S = 20.0
"""A request that takes longer than this, plus one second for each MiB, is cancelled and retried."""
PREFLIGHT_S, PREFLIGHT_REQUEST_S = 10.0, 2.0
"""The same two limits for the check of all places before a command begins."""


class TransientError(OSError):
    """A request failed, and another one may succeed. A store's class raises it for each such error of its client."""


TRANSIENT = (TransientError, TimeoutError)


@dataclass
class Traffic:
    """The requests over a network in this process."""

    requests: int = 0
    retries: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    waited_s: float = 0.0
    """Time in requests and between retries, summed over all threads."""

    def add(self, **amounts: float) -> None:
        with _counting:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)


def deadline_s(num_bytes: int = 0) -> float:
    return DEADLINE_S + num_bytes / (1 << 20)


traffic, _counting = Traffic(), threading.Lock()
_limits: ContextVar[tuple[float, float]] = ContextVar("limits", default=(math.inf, REQUEST_S))
"""When all operations must have ended, by `time.monotonic`, and the seconds for one request."""


@contextmanager
def within(seconds: float, *, request_s: float = REQUEST_S) -> Iterator[None]:
    """All operations inside share this deadline, or the deadline of an outer `within` if that is earlier."""
    until = min(time.monotonic() + seconds, _limits.get()[0])
    token = _limits.set((until, request_s))
    try:
        yield
    finally:
        _limits.reset(token)


def _split(url: str) -> tuple[Any, str]:
    """The file system and the path in it. fsspec's own parser is not used: it gives `::`, `?` and others a meaning."""
    url = absolute(url)
    scheme, separator, _ = url.partition("://")
    if not separator:
        return LocalFileSystem(), url
    if scheme not in SCHEMES:
        raise StorageError(f"{url} is not a place that can be read or written\n  do: name a folder, or s3://bucket/prefix")
    fs = fsspec.filesystem(scheme)
    return fs, fs._strip_protocol(url)


@contextmanager
def _storage_errors(verb: str, url: str) -> Iterator[None]:
    """An OSError inside becomes a StorageError that names the place."""
    try:
        yield
    except OSError as error:
        if verb == "read" and isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            why = "is a folder" if isinstance(error, IsADirectoryError) else "does not exist"
            raise MissingError(f"{url} {why}") from None
        raise StorageError(f"{url} cannot be {verb}: {error.strerror or error}") from None


def _do(operation: str, url: str, *arguments: Any, num_bytes: int = 0, **options: Any) -> Any:
    """The result of this operation of fsspec."""
    fs, path = _split(url)
    if not fs.async_impl:
        return getattr(fs, operation)(path, *arguments, **options)
    result = _request(fs, operation, path, *arguments, num_bytes=num_bytes, **options)
    traffic.add(bytes_read=len(result) if operation == "cat_file" else 0)
    traffic.add(bytes_written=num_bytes if operation == "pipe_file" else 0)
    return result


def _request(fs: Any, operation: str, path: str, *arguments: Any, num_bytes: int = 0, **options: Any) -> Any:
    """The result of this operation over a network. Transient errors are retried until the deadline."""
    until, request_s = _limits.get()
    began = time.monotonic()
    limit = max(0.0, until - began) if until < math.inf else deadline_s(num_bytes)
    last_error: OSError = TimeoutError(f"no answer within {limit:.0f} s")
    wait, transient = wait_random_exponential(0.1, max=5), retry_if_exception_type(TRANSIENT)
    try:
        for attempt in Retrying(stop=stop_before_delay(limit), wait=wait, retry=transient, reraise=True):
            number = attempt.retry_state.attempt_number
            traffic.add(requests=1, retries=int(number > 1))
            timeout_s = max(0.1, began + limit - time.monotonic())
            if number <= 2:  # the third may take all the time that is left, so that a slow but sound request succeeds
                timeout_s = min(timeout_s, request_s + num_bytes / (1 << 20))
            with attempt:
                try:
                    return sync(fs.loop, fs.attempt, operation, path, *arguments, timeout=timeout_s, **options)
                except TransientError as error:
                    last_error = error
                    raise
    except TRANSIENT:  # the last attempt may have had no time for an answer
        raise last_error from None
    finally:
        traffic.add(waited_s=time.monotonic() - began)


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def absolute(url: str) -> str:
    """The same place from any working directory. A URL stays as it is, but `file://` becomes a path."""
    path = os.fsdecode(unquote_to_bytes(os.fsencode(url.removeprefix("file://")))) if url.startswith("file://") else url
    return path if "://" in path else str(local_path(path).absolute())


def shown(url: str) -> str:
    """`url` for a person: relative to the working directory if it lies below it."""
    return url.removeprefix(f"{Path.cwd()}/")


def name_of(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def is_local(url: str) -> bool:
    return isinstance(_split(url)[0], LocalFileSystem)


def exists(url: str) -> bool:
    with _storage_errors("read", url):
        return bool(_do("exists", url))


def read_bytes(url: str, *, num_bytes: int = 0) -> bytes:
    """num_bytes: the expected size; a larger object has more time."""
    with _storage_errors("read", url):
        return _do("cat_file", url, num_bytes=num_bytes)


def read_bytes_if_there(url: str) -> bytes | None:
    with suppress(MissingError):
        return read_bytes(url)
    return None


def fetched_again(damaged: type[Exception]):  # the type that it returns is tenacity's own, and has no public name
    """The function is called twice where it raises this of what it fetched."""
    return retry(retry=retry_if_exception_type(damaged), stop=stop_after_attempt(2), reraise=True)


@fetched_again(DataError)
def read_checked(url: str, *, num_bytes: int, digest: str) -> bytes:
    """The object's bytes, compared with their digest. num_bytes: so many were written. Raises DataError."""
    data = read_bytes(url, num_bytes=num_bytes)
    if (actual := sha256(data)) != digest:
        found, written = f"{actual[:12]}.. ({len(data):,} bytes)", f"{digest[:12]}.. ({num_bytes:,} bytes)"
        raise DataError(f"{url}: SHA-256 is {found}, {written} was written; read twice")
    return data


def num_bytes_of(url: str) -> int:
    with _storage_errors("read", url):
        return int(_do("info", url)["size"])


def write_bytes(url: str, data: bytes, *, durable: bool = True) -> None:
    """The object holds `data`, or what it held before; never a part.

    durable: also after a power cut, which costs some milliseconds for a file on a disk.
    """
    with _storage_errors("written", url):
        _put(url, data, new=False, durable=durable)


def extend(url: str, data: bytes) -> None:
    """The object holds `data`, which begins with what it held before. On a disk it stays the same file for its readers."""
    if not is_local(url):
        write_bytes(url, data)
        return
    with _storage_errors("written", url), open(absolute(url), "ab") as file:
        file.write(data[file.tell() :])


def create_bytes(url: str, data: bytes) -> bool:
    """The object holds `data` and is new; False if there was one before. If several callers try, one succeeds.

    No other caller writes the same `data`: if a bucket holds them already, an earlier attempt wrote them and its answer
    was lost.
    """
    with _storage_errors("written", url):
        try:
            _put(url, data, new=True, durable=True)
        except FileExistsError:
            return not is_local(url) and read_bytes_if_there(url) == data
    return True


def _put(url: str, data: bytes, *, new: bool, durable: bool) -> None:
    if is_local(url):
        write_file(Path(absolute(url)), data, new=new, durable=durable)
    else:
        _do("pipe_file", url, data, num_bytes=len(data), mode="create" if new else "overwrite")


def folders(url: str) -> list[str]:
    """Names of the folders directly in a place, sorted; none if the place does not exist."""
    return _names(url, "directory")


def files(url: str) -> list[str]:
    """Names of the files directly in a place, sorted; none if the place does not exist."""
    return _names(url, "file")


def _names(url: str, kind: str) -> list[str]:
    """Without the place itself, which a store lists too if an object marks it as a folder."""
    with _storage_errors("listed", url):
        try:
            entries = _listing("ls", url, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            if error.__cause__ is not None:  # the store's own answer: there is no such bucket
                raise
            return []
    # A link's own type is "other". Linked folders are nobody's run and no checkpoint: they may be of another suite.
    kinds = ["file" if entry.get("islink") and os.path.isfile(entry["name"]) else entry["type"] for entry in entries]
    paths = {entry["name"].rstrip("/") for entry, found in zip(entries, kinds, strict=True) if found == kind}
    return sorted(map(name_of, paths - {_split(url)[1].rstrip("/")}))


def _listing(operation: str, url: str, **options: Any) -> Any:
    """Over a network a listing has no checksum: it is correct if the next one is the same."""
    listing = _do(operation, url, **options)
    while not is_local(url) and (again := _do(operation, url, **options)) != listing:
        listing = again
    return listing


def delete(url: str) -> None:
    """The file or folder does not exist; it may have been deleted before."""
    fs, _ = _split(url)
    with _storage_errors("deleted", url), suppress(FileNotFoundError):
        if fs.async_impl:
            # One by one: s3fs reads a `[` as a pattern, and reports no error of a request that deletes many objects.
            for path in _listing("find", url):
                _request(fs, "rm_file", path)
        elif os.path.abspath(absolute(url)) == os.getcwd():
            raise OSError(errno.EBUSY, "it is the working directory")
        else:
            _do("rm", url, recursive=True)


def move(url: str, to: str) -> None:
    """The object lies at `to`, in the same store, and no longer at `url`."""
    with _storage_errors("moved", url):
        if is_local(url):
            _do("mv", url, absolute(to))
        else:
            _do("cp_file", url, _split(to)[1])
            _do("rm_file", url)


def clean_temporary(url: str) -> None:
    """The folder holds no half-written files of a killed process. Only for the one command that writes there."""
    if is_local(url):
        with _storage_errors("deleted", url):
            for file in Path(absolute(url)).rglob(".*"):
                if file.is_file():
                    file.unlink(missing_ok=True)


def check_places(*, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
    """Each place can be listed; in `writes` a small object can be written, cannot be created again, can be deleted.

    Raises StorageError within `PREFLIGHT_S`, whatever is wrong.
    """
    with within(PREFLIGHT_S, request_s=PREFLIGHT_REQUEST_S):
        for url in dict.fromkeys((*reads, *writes)):
            _check_place(url, writes=url in writes)


def _check_place(url: str, *, writes: bool) -> None:
    place = str(nearest(Path(absolute(url)))) if is_local(url) else url  # the check makes no folders
    probe = join(place, f".probe-{secrets.token_hex(8)}")
    try:
        files(url)
        if writes:
            _check_writes(probe)
    except StorageError as error:
        message = str(error).replace(probe, url)
        remedy = f"name a place that can be {'written' if writes else 'read'}"
        remedy = remedy if is_local(url) else remedy_for(message.replace(url, ""), remedy)
        raise StorageError(f"{message}\n  do: {remedy}") from None


def _check_writes(probe: str) -> None:
    """The unconditional write comes first: if it fails, the fault is not the store's lack of conditional writes."""
    write_bytes(probe, b"one")
    try:
        if create_bytes(probe, b"two"):
            lack = "the store replaces an object although told not to"
            raise StorageError(f"{probe}: {lack}: two commands could work on one run at once")
    except StorageError:
        with suppress(OSError):
            _do("rm_file", probe)
        raise
    with _storage_errors("deleted", probe):
        _do("rm_file", probe)


@contextmanager
def temporary_folder(what: str, *, parent: str | None = None) -> Iterator[str]:
    """A folder of this process on this machine's disk, deleted at the end; folders of killed processes are deleted first.

    parent: where it lies; None is the system's place. Each folder has a locked file beside it: so the kernel knows which
    processes are alive, also in other containers that share the disk.
    """
    root = Path(parent or tempfile.gettempdir())
    for abandoned in root.glob(f"imgcls-{what}.*.lock"):
        with suppress(Timeout, OSError), FileLock(abandoned, timeout=0):
            _remove(abandoned)
    lock = root / f"imgcls-{what}.{secrets.token_hex(4)}.lock"
    with FileLock(lock):
        try:
            lock.with_suffix("").mkdir(mode=0o700)
            yield str(lock.with_suffix(""))
        finally:
            _remove(lock)


def _remove(lock: Path) -> None:
    """Delete the folder of this lock, then the lock."""
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)


def cache_root() -> Path:
    """The folder of data that this node can rebuild: `IMGCLS_CACHE`, else `~/.cache/imgcls`."""
    return local_path(os.environ.get("IMGCLS_CACHE") or "~/.cache/imgcls")


def cache_error(what: str, remedy: str = "make room") -> StorageError:
    return StorageError(f"{what}\n  do: {remedy}, or name another place with IMGCLS_CACHE")


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
