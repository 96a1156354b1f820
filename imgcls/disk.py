"""Files of this machine, written so that they are whole or absent, also after a kill or a power cut."""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path

from filelock import FileLock

from imgcls.errors import StorageError

UNSUPPORTED = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of a file system without this operation: hard links, fsync of folders."""


def local_path(text: str) -> Path:
    """The path that a person typed, perhaps with `~`. Raises StorageError if there is no such home, or it is half a URL."""
    if re.match(r"\w\w+:/", text):
        remedy = f"s3://bucket/prefix with two slashes, or ./{text}"
        raise StorageError(f"{text} is no folder's name\n  do: {'name a folder' if '://' in text else remedy}")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise StorageError(
            f"{text}: no such home folder here\n  do: set HOME, or name a full path, the cache's by IMGCLS_CACHE"
        )
    return Path(path)


def nearest(path: Path) -> Path:
    """The path itself if this user can see it, else the nearest folder above it that this user can see."""
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def shared_lock(path: Path) -> FileLock:
    """A lock for the processes of all users: one that may only read the file at `path` can wait too until it is whole."""
    return FileLock(f"{path}.lock", mode=0o666)


def write_file(path: Path, data: bytes, *, new: bool = False, durable: bool = True) -> None:
    """The file holds `data`. Raises OSError; FileExistsError if it should be new and there is one.

    durable: the bytes are on the disk before the name, and so are new folders above it; otherwise the file may be empty
    after a power cut. The umask decides its rights.
    """
    missing = takewhile(lambda folder: not os.path.exists(folder), path.parents)
    folders = {path.parent, *(folder.parent for folder in missing)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file lies where a folder should; FileExistsError would say it of `path` itself
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from None
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        (_link if new else os.replace)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for folder in folders if durable else ():
        _sync(folder)


def _link(temporary: Path, path: Path) -> None:
    """The file has the name `path` too. Raises FileExistsError.

    Without hard links (SMB, virtiofs, some FUSE) the processes that create files take turns by a lock, which the kernel
    releases when its holder dies. An empty file as a lock would stay after a kill, and could not get its bytes at once.
    """
    with _if_supported():
        os.link(temporary, path)
        return
    with FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.replace(temporary, path)


def _sync(folder: Path) -> None:
    """The names in the folder are on the disk, if the file system can promise that."""
    with _if_supported(), ExitStack() as stack:
        handle = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, handle)
        os.fsync(handle)


@contextmanager
def _if_supported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
