"""Files of this machine: written so that they are whole or absent, after a kill and after a power cut."""

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
"""Answers of a file system that has no such operation: hard links, fsync of folders."""


def local_path(text: str) -> Path:
    """The path that a person means, by `~` too. Raises StorageError where there is no such home, or it is half a URL."""
    if re.match(r"\w\w+:/", text):
        raise StorageError(f"{text} is no folder's name\n  do: s3://bucket/prefix with two slashes, or ./{text}")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise StorageError(
            f"{text}: no such home folder here\n  do: set HOME, or name a full path, the cache's by IMGCLS_CACHE"
        )
    return Path(path)


def nearest(path: Path) -> Path:
    """The path itself, or the folder nearest to it that this user can see."""
    return next(one for one in (path, *path.parents) if os.path.exists(one))


def shared_lock(path: Path) -> FileLock:
    """For the processes of all users: who may only read what lies at `path` still waits until it is whole."""
    return FileLock(f"{path}.lock", mode=0o666)


def write_file(path: Path, data: bytes, *, new: bool = False, durable: bool = True) -> None:
    """The file holds `data`, under its name. Raises OSError; FileExistsError where it was to be new.

    durable: on the disk, the bytes before the name, and the folders that were made for it; else after a power cut it may
    be empty. Rights are those that the umask leaves.
    """
    folders = {path.parent, *(one.parent for one in takewhile(lambda one: not os.path.exists(one), path.parents))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # which says of `path` itself that it is there
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
    """The file is called `path` too. Raises FileExistsError.

    Without hard links (SMB, virtiofs, some FUSE) all who create take turns by a lock, which the kernel ends with its
    holder: a name taken for itself would stay after a kill, and its bytes could not come with it.
    """
    with _if_supported():
        os.link(temporary, path)
        return
    with FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.replace(temporary, path)


def _sync(folder: Path) -> None:
    """The names in the folder are on the disk, where the file system can promise that."""
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
