"""The decoded images of one node: uint8, memory-mapped, built once, shared by all ranks and runs on the node.

Comes in: a packed set. Goes out: a `Cache`, whose rows are the samples in the order of the manifest. Built under a
lock into a temporary folder and renamed when whole: who comes second waits, and who comes after a kill builds again.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from imgcls import storage
from imgcls.data.images import DECODER, decode, decoding_pool, in_order, stored_pixels
from imgcls.data.shards import fetch_shard, read_samples
from imgcls.errors import DataError, StorageError
from imgcls.records import Manifest, Record

Progress = Callable[[int, int], None]


class CacheMeta(Record):
    """What lies in a cache folder; written last."""

    images_sha256: str
    labels_sha256: str


@dataclass(frozen=True, slots=True)
class Cache:
    images: NDArray[np.uint8]
    """(samples, px, px, channels), read from the disk as it is needed."""
    labels: NDArray[np.int64]


def open_cache(
    set_url: str, manifest: Manifest, *, px: int, channels: int, progress: Progress = lambda done, total: None
) -> Cache:
    """The set's decoded images; built where they are missing or damaged.

    Raises DataError where a shard or an image is not what the manifest says, StorageError where the disk is full.
    """
    root = storage.cache_root()
    folder = root / f"{manifest.digest[:16]}-{px}-{channels}-{DECODER}"
    shape = (sum(shard.num_samples for shard in manifest.shards), px, px, channels)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):
                for left in (folder, *root.glob(f".{folder.name}.*")):  # under the lock nobody else builds it
                    shutil.rmtree(left, ignore_errors=True)
                _build(set_url, manifest, folder, shape, progress)
    except OSError as error:
        raise StorageError(
            f"the cache {folder} cannot be built: {error.strerror or error}\n"
            f"  do: make room ({np.prod(shape) / 1e6:,.0f} MB), or name another place with IMGCLS_CACHE"
        ) from None
    images = np.memmap(folder / "images.u8", dtype=np.uint8, mode="r", shape=shape)
    return Cache(images, np.fromfile(folder / "labels.i64", dtype="<i8"))


def _is_whole(folder: Path) -> bool:
    try:
        meta = CacheMeta.from_bytes((folder / "meta.json").read_bytes(), where=str(folder))
    except (FileNotFoundError, DataError):
        return False
    return meta == _meta(folder)


def _meta(folder: Path) -> CacheMeta:
    digests = [storage.file_sha256(folder / name) for name in ("images.u8", "labels.i64")]
    return CacheMeta(images_sha256=digests[0], labels_sha256=digests[1])


def _build(set_url: str, manifest: Manifest, folder: Path, shape: tuple[int, ...], progress: Progress) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _, px, _, channels = shape
        row = 0
        with (temporary / "images.u8").open("wb") as file, decoding_pool() as pool:
            for shard in manifest.shards:
                data = fetch_shard(set_url, shard)
                where = storage.join(set_url, shard.name)
                work = ((image, px, channels) for image, _ in read_samples(shard, data, where=where))
                for pixels in in_order(pool, _decode_some, work, at_once=64):
                    file.write(pixels.data)
                    row += len(pixels)
                    progress(row, shape[0])
        labels = np.array([label for shard in manifest.shards for label in shard.labels], dtype="<i8")
        labels.tofile(temporary / "labels.i64")
        (temporary / "meta.json").write_bytes(_meta(temporary).to_bytes())
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _decode_some(work: list[tuple[bytes, int, int]]) -> NDArray[np.uint8]:
    """Runs in a pool process."""
    return np.stack([stored_pixels(decode(data), px=px, channels=channels) for data, px, channels in work])
