"""The decoded images of one node: uint8, memory-mapped, built once, shared by all ranks and runs on the node.

Comes in: a packed set. Goes out: a `Cache`, whose rows are the samples in the order of the manifest. Built under a
lock into a temporary folder and renamed when whole: a second process waits, and after a kill the next one builds again.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imgcls import records, storage
from imgcls.cpus import usable_cpus
from imgcls.data.images import DECODER, stored_pixels
from imgcls.data.shards import decoded_images, fetch_shard
from imgcls.disk import nearest, shared_lock
from imgcls.errors import DataError, StorageError, first_line
from imgcls.records import Manifest, Record, Shard

BLOCK_BYTES = 16 << 20

Say = Callable[[str], None]


class CacheMeta(Record):
    """What lies in a cache folder; written last."""

    images_sha256: tuple[str, ...]
    """Of each block of `BLOCK_BYTES`."""
    labels_sha256: str


@dataclass(frozen=True, slots=True)
class Cache:
    images: NDArray[np.uint8]
    """(samples, px, px, channels), read from the disk as it is needed."""
    labels: NDArray[np.int64]


def open_cache(
    set_url: str, manifest: Manifest, *, px: int, channels: int, command: str | None = None, say: Say = lambda text: None
) -> Cache:
    """The set's decoded images; built where they are missing or damaged.

    command: the command, whose runs check a cache once on each node; None checks it now.
    Raises DataError where a shard or an image is not what the manifest says, StorageError where the disk is full.
    """
    root, folder = storage.cache_root(), _folder(manifest, px, channels)
    shape = (manifest.num_samples, px, px, channels)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with shared_lock(folder):
            if not command or storage.read_bytes_if_there(str(folder / "checked")) != command.encode():
                if not _is_whole(folder, say):
                    for remains in (folder, *root.glob(f".{folder.name}.*")):  # under the lock nobody else builds it
                        shutil.rmtree(remains, ignore_errors=True)
                    _build(set_url, manifest, folder, px, channels)
                if command:
                    with suppress(PermissionError):  # of another user's cache: it is checked again by each run
                        (folder / "checked").write_text(command, encoding="utf-8")
    except OSError as error:
        remedy = f"make room ({np.prod(shape) / 1e6:,.0f} MB)"
        if isinstance(error, PermissionError):
            remedy = f"let both users write {root}: one group, chmod g+ws, umask 002 for both"
        raise storage.cache_error(f"the cache {folder} cannot be built: {error.strerror or error}", remedy) from None
    images = np.memmap(folder / "images.u8", dtype=np.uint8, mode="r", shape=shape)
    return Cache(images, np.fromfile(folder / "labels.i64", dtype="<i8"))


def is_cached(manifest: Manifest, px: int, channels: int) -> bool:
    """Whether the decoded images lie on this node, as far as can be seen without reading them."""
    return os.path.exists(_folder(manifest, px, channels))


def missing_shards(manifest: Manifest) -> list[Shard]:
    """Those that this node would have to fetch from a bucket."""
    return [shard for shard in manifest.shards if not os.path.exists(_shard_file(shard))]


def check_room(caches: Iterable[tuple[str, Manifest, int, int]]) -> None:
    """This node's cache can be written, and has room for what is missing of (set's URL, manifest, px, channels).

    Raises StorageError.
    """
    root, missing = storage.cache_root(), dict[Path, int]()
    for set_url, manifest, px, channels in caches:
        if os.path.exists(folder := _folder(manifest, px, channels)):
            continue
        missing[folder] = manifest.num_samples * px * px * channels
        if not storage.is_local(set_url):
            missing |= {_shard_file(shard): shard.num_bytes for shard in missing_shards(manifest)}
    if not missing:
        return
    storage.check_places(writes=[str(root)])
    free, needed = shutil.disk_usage(nearest(root)).free, sum(missing.values())
    if needed > free:
        has = f"the cache {root} has {free / 1e6:,.1f} MB of room"
        raise storage.cache_error(f"{has}, {needed / 1e6:,.1f} MB are needed")


def _folder(manifest: Manifest, px: int, channels: int) -> Path:
    return storage.cache_root() / f"{manifest.digest[:16]}-{px}-{channels}-{DECODER}"


def _shard_file(shard: Shard) -> Path:
    return storage.cache_root() / "shards" / shard.sha256


def _is_whole(folder: Path, say: Say) -> bool:
    try:
        meta = records.read_if_there(CacheMeta, str(folder / "meta.json"))
        if meta is None or meta == _meta(folder):
            return meta is not None
        damage = f"{folder}: bytes differ from meta.json"
    except (DataError, FileNotFoundError) as error:
        damage = first_line(error)
    say(f"{damage}; the cache is built again")
    return False


def _meta(folder: Path) -> CacheMeta:
    images = folder / "images.u8"

    def digest(begin: int) -> str:
        with images.open("rb") as file:
            file.seek(begin)
            return storage.sha256(file.read(BLOCK_BYTES))

    with ThreadPoolExecutor(usable_cpus()) as pool:  # hashing gives up the interpreter's lock
        blocks = tuple(pool.map(digest, range(0, images.stat().st_size, BLOCK_BYTES)))
    return CacheMeta(images_sha256=blocks, labels_sha256=storage.sha256((folder / "labels.i64").read_bytes()))


def _shard_of_node(set_url: str, shard: Shard) -> bytes:
    """The shard's checked bytes. From a bucket they come once to a node, whatever is made of them."""
    if storage.is_local(set_url):
        return fetch_shard(set_url, shard)
    file = _shard_file(shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    with shared_lock(file):
        with suppress(StorageError, DataError):
            return storage.read_checked(str(file), num_bytes=shard.num_bytes, digest=shard.sha256)
        for remains in file.parent.glob(f".{file.name}.*"):  # under the lock nobody else writes it
            remains.unlink()
        data = fetch_shard(set_url, shard)
        storage.write_bytes(str(file), data, durable=False)
    return data


def _build(set_url: str, manifest: Manifest, folder: Path, px: int, channels: int) -> None:
    """The folder holds the decoded images, each of which had the pixels that it had when it was packed."""
    stored = partial(stored_pixels, px=px, channels=channels)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary, folder.name)  # a folder of its own, with the rights that the umask leaves
        whole.mkdir()
        with (whole / "images.u8").open("wb") as file:
            for pixels in decoded_images(set_url, manifest, stored, fetch=_shard_of_node):
                file.write(pixels.data)
        labels = np.array([label for shard in manifest.shards for label in shard.labels], dtype="<i8")
        labels.tofile(whole / "labels.i64")
        records.write(_meta(whole), str(whole / "meta.json"))
        whole.rename(folder)
