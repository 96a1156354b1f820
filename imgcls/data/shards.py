"""WebDataset tars and their manifest: written, read, verified.

Comes in: a `Source`. Goes out: `<url>/{manifest.json, pixels.u64, train-00000.tar, ...}`, from which `cache` is built.
Each shard waits with its own record until all are there, so that an interrupted pack goes on at the next shard and an
earlier set stays whole until it is replaced; the manifest is written last, so that a set without one is no set.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import TypeVar

import numpy as np
from PIL.Image import Image

from imgcls import records, storage
from imgcls.data.archives import printable
from imgcls.data.images import AT_A_TIME, DECODER, EXTENSIONS, decode, decoding_pool, in_order, pixels_digest
from imgcls.data.order import permutation
from imgcls.data.sources import Sample, Source
from imgcls.errors import DataError, MissingError, StorageError
from imgcls.recipe import digest_of
from imgcls.records import Manifest, Record, Shard

SHARD_SAMPLES, SHARD_BYTES = 2000, 32 << 20
PACK_SEED = 42
_UNDER_WAY = ".packing"
_PIXELS = "pixels.u64"

Progress = Callable[[int, int], None]
T = TypeVar("T")


class PackedFile(Record):
    """What became of one file of the source."""

    path: str
    sha256: str
    pixels: str = ""
    """`pixels_digest`, in hexadecimal."""
    animated: bool = False
    reason: str = ""
    """Why it is no image; empty where it is one."""


class PackedShard(Record):
    """A finished shard of a pack that is under way."""

    identity: str
    shard: Shard
    files: tuple[PackedFile, ...]
    """Those that are no images too."""


def manifest_url(set_url: str) -> str:
    return storage.join(set_url, "manifest.json")


def read_manifest(set_url: str) -> Manifest:
    """The manifest of a packed set. Raises DataError where there is none, or it was edited."""
    manifest = records.read_if_there(Manifest, manifest_url(set_url))
    if manifest is None:
        name = storage.name_of(set_url)
        raise DataError(
            f"{set_url} holds no packed set: no manifest.json\n"
            f"  do: python -m jobs.pack {name} --to {set_url.rpartition('/')[0] or '.'}, or name another place with --data"
        )
    if manifest.digest != manifest.expected_digest():
        raise DataError(f"{manifest_url(set_url)} was edited: its digest does not fit its content\n  do: pack again")
    return manifest


def pack(
    source: Source, set_url: str, *, name: str, max_bad: int = 0, progress: Progress = lambda done, total: None
) -> Manifest:
    """All samples of `source` lie in shards, each was decoded once, and the manifest says so.

    Raises DataError where more than `max_bad` files are no images, naming them; what was packed stays and is used
    when the same source is packed again.
    """
    identity = digest_of([source.identity, name, SHARD_SAMPLES, SHARD_BYTES, PACK_SEED])
    packed, done, total = list[PackedShard](), 0, len(source.samples)
    with decoding_pool() as pool:
        for shard_name, samples in _plan(source):
            shard = _packed_before(set_url, shard_name, identity)
            if shard is None:
                files = _counted(in_order(pool, _read_and_decode, samples), done, total, progress)
                shard = _pack_shard(set_url, shard_name, samples, files, identity)
            packed.append(shard)
            done += len(samples)
            progress(done, total)
    manifest, pixels = _seal(source, name, packed, max_bad)
    _put_in_place(set_url, manifest, pixels)
    return manifest


def _plan(source: Source) -> list[tuple[str, list[Sample]]]:
    """Names and samples of shards of mixed classes, by a seeded permutation of each split."""
    plan = []
    for split in ("train", "val", "test"):
        members = sorted((sample for sample in source.samples if sample.split == split), key=lambda sample: sample.path)
        shards, num_bytes = list[list[Sample]](), 0
        for i in permutation(PACK_SEED, 0, len(members)):
            size = members[i].content.size
            if not shards or len(shards[-1]) == SHARD_SAMPLES or num_bytes + size > SHARD_BYTES:
                shards.append([])
                num_bytes = 0
            shards[-1].append(members[i])
            num_bytes += size
        plan += [(f"{split}-{number:05d}.tar", samples) for number, samples in enumerate(shards)]
    return plan


def _packed_before(set_url: str, shard_name: str, identity: str) -> PackedShard | None:
    with suppress(DataError, StorageError):
        url = storage.join(set_url, _UNDER_WAY, shard_name)
        packed = records.read_if_there(PackedShard, f"{url}.json")
        if packed is not None and packed.identity == identity:
            storage.read_checked(url, num_bytes=packed.shard.num_bytes, digest=packed.shard.sha256)
            return packed
    return None


def _read_and_decode(sample: Sample) -> tuple[PackedFile, bytes]:
    """Runs in a pool process. Raises DataError where a file cannot be read as things are."""
    sha256 = ""
    try:
        data = sample.content.read()
        sha256 = storage.sha256(data)
        image = decode(data)
        pixels = pixels_digest(image).hex()
    except Exception as error:  # Pillow raises many kinds on what is no image
        if isinstance(error, MemoryError) or getattr(error, "errno", None):  # the machine's fault, not the image's
            why = printable(error) or "no memory is left"
            remedy = "mend rights, disk or memory; run it again"
            raise DataError(f"{sample.path} cannot be read: {why}\n  do: {remedy}") from None
        return PackedFile(path=sample.path, sha256=sha256, reason=printable(error) or type(error).__name__), b""
    return PackedFile(path=sample.path, sha256=sha256, pixels=pixels, animated=image.info["frames"] > 1), data


def _counted(items: Iterable[T], done: int, total: int, progress: Progress) -> Iterator[T]:
    """The items; `progress` hears of each when the next one is taken. done: how many came before the first."""
    for number, item in enumerate(items, done + 1):
        yield item
        progress(number, total)


def _pack_shard(
    set_url: str, shard_name: str, samples: list[Sample], reads: Iterable[tuple[PackedFile, bytes]], identity: str
) -> PackedShard:
    from webdataset.writer import TarWriter  # 2 s, most of it torch: only where a shard is written

    files, images = list[PackedFile](), list[Sample]()
    tar_bytes = io.BytesIO()
    with TarWriter(tar_bytes, mtime=0, user="", group="") as tar:
        for sample, (file, image) in zip(samples, reads, strict=True):
            files.append(file)
            if not file.reason:
                key = f"{PurePosixPath(shard_name).stem}-{len(images):06d}"
                extension = EXTENSIONS[PurePosixPath(sample.path).suffix.lower()]
                tar.write({"__key__": key, extension: image, "cls": sample.label})
                images.append(sample)
    data = tar_bytes.getvalue()
    shard = Shard(
        name=shard_name,
        split=samples[0].split,
        num_bytes=len(data),
        sha256=storage.sha256(data),
        labels=tuple(sample.label for sample in images),
        paths=tuple(sample.path for sample in images),
    )
    packed = PackedShard(identity=identity, shard=shard, files=tuple(files))
    storage.write_bytes(storage.join(set_url, _UNDER_WAY, shard_name), data)
    records.write(packed, storage.join(set_url, _UNDER_WAY, f"{shard_name}.json"))
    return packed


def _seal(source: Source, name: str, packed: list[PackedShard], max_bad: int) -> tuple[Manifest, bytes]:
    """The manifest, and the content of `pixels.u64`."""
    files = [file for shard in packed for file in shard.files]
    bad = [file for file in files if file.reason]
    if len(bad) > max_bad:
        listed = "".join(f"\n  {file.path}: {file.reason}" for file in bad[:20])
        more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise DataError(
            f"{source.name}: {len(bad)} files are no images, --max-bad is {max_bad}{listed}{more}\n"
            f"  do: mend or remove them, or leave them out with --max-bad {len(bad)}"
        )
    notes = [*source.notes, *_duplicates(packed)]
    if animated := [file.path for file in files if file.animated]:
        notes.append(f"{len(animated)} animated images: the first frame of each is taken: {'; '.join(animated[:20])}")
    notes += [f"left out, no image: {file.path}" for file in bad]
    pixels = bytes.fromhex("".join(file.pixels for file in files))
    manifest = Manifest.sealed(
        name=name,
        class_names=source.class_names,
        shards=tuple(shard.shard for shard in packed),
        pixels_sha256=storage.sha256(pixels),
        source=source.name,
        source_sha256=digest_of(sorted((file.path, file.sha256) for file in files)),
        synthetic=source.synthetic,
        notes=tuple(notes),
    )
    _check_splits(manifest)
    return manifest, pixels


def _put_in_place(set_url: str, manifest: Manifest, pixels: bytes) -> None:
    """The set takes the place of what was there; without a manifest for as long as it is not whole."""
    under_way, shards = storage.join(set_url, _UNDER_WAY), {shard.name for shard in manifest.shards}
    storage.delete(manifest_url(set_url))
    for waiting in sorted(shards.intersection(storage.files(under_way))):
        storage.move(storage.join(under_way, waiting), storage.join(set_url, waiting))
    storage.write_bytes(storage.join(set_url, _PIXELS), pixels)
    for file in storage.files(set_url):
        if re.fullmatch(r"(train|val|test)-\d{5,}\.tar", file) and file not in shards:  # no other tar is ours
            storage.delete(storage.join(set_url, file))
    records.write(manifest, manifest_url(set_url))
    storage.delete(under_way)


def _check_splits(manifest: Manifest) -> None:
    if not manifest.labels("test"):
        raise DataError(f"{manifest.name}: no image of the split test could be read")
    if missing := set(range(len(manifest.class_names))) - set(manifest.labels("train")):
        raise DataError(f"{manifest.name}: no training image of class {manifest.class_names[min(missing)]} could be read")


def _duplicates(packed: list[PackedShard]) -> list[str]:
    """What stands in two splits, and how often an image stands twice in one."""
    seen: dict[str, tuple[str, str]] = {}
    across, within = list[str](), 0
    for split, file in ((shard.shard.split, file) for shard in packed for file in shard.files if not file.reason):
        first_split, first_path = seen.setdefault(file.pixels, (split, file.path))
        if first_split != split:
            across.append(f"{first_path} = {file.path}")
        elif first_path != file.path:
            within += 1
    leak = f"LEAK: {len(across)} images stand in two splits, as {'; '.join(across[:3])}"
    return [leak] * bool(across) + [f"{within} images stand twice in the same split"] * bool(within)


def fetch_shard(set_url: str, shard: Shard) -> bytes:
    """The shard's checked bytes. Raises DataError where it is missing or altered."""
    return _fetch(set_url, shard.name, num_bytes=shard.num_bytes, digest=shard.sha256)


def read_pixel_digests(set_url: str, manifest: Manifest) -> np.ndarray:
    """8 bytes of each image's pixel SHA-256: uint64, (all samples,), in the order of the shards."""
    data = _fetch(set_url, _PIXELS, num_bytes=8 * manifest.num_samples, digest=manifest.pixels_sha256)
    return np.frombuffer(data, dtype="<u8")


def _fetch(set_url: str, name: str, *, num_bytes: int, digest: str) -> bytes:
    try:
        return storage.read_checked(storage.join(set_url, name), num_bytes=num_bytes, digest=digest)
    except (MissingError, DataError) as error:
        remedy = f"pack again, or look with python -m jobs.pack --verify {set_url}"
        raise DataError(f"{error}; the manifest of {set_url} names it\n  do: {remedy}") from None


def read_samples(shard: Shard, data: bytes) -> Iterator[tuple[bytes, int]]:
    """(image bytes, label) in the shard's order. data: its checked bytes, so that they hold what the manifest says."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    samples = group_by_keys(tar_file_expander([{"url": shard.name, "stream": io.BytesIO(data)}]))
    for sample, label in zip(samples, shard.labels, strict=True):
        (image,) = (content for name, content in sample.items() if not name.startswith("__") and name != "cls")
        assert int(sample["cls"]) == label
        yield image, label


def check_shards(set_url: str, manifest: Manifest) -> None:
    """Every shard is there; on a disk its bytes are compared too. In a bucket that happens when a node fetches it."""
    missing = sorted({shard.name for shard in manifest.shards} - set(storage.files(set_url)))
    if missing:
        raise DataError(f"{set_url} lacks {', '.join(missing[:5])}, which its manifest names\n  do: pack again")
    if storage.is_local(set_url):
        for shard in manifest.shards:
            fetch_shard(set_url, shard)


def decoded_images(
    set_url: str, manifest: Manifest, convert: Callable[[Image], T], *, fetch: Callable[[str, Shard], bytes] = fetch_shard
) -> Iterator[T]:
    """`convert` of each image, computed in the pool's processes; in the order of the manifest.

    Raises DataError where a shard is not what the manifest says, or an image has other pixels than when it was packed;
    StorageError where a process of the pool was killed.
    """
    packed = read_pixel_digests(set_url, manifest).tobytes()
    named = [(storage.join(set_url, shard.name), path) for shard in manifest.shards for path in shard.paths]
    images = (image for shard in manifest.shards for image, _ in read_samples(shard, fetch(set_url, shard)))
    # 4 MiB at most, by their mean size: those that wait are in memory.
    at_a_time = max(1, min(AT_A_TIME, (manifest.num_samples << 22) // sum(shard.num_bytes for shard in manifest.shards)))
    with decoding_pool() as pool:
        decoded = in_order(pool, partial(_decoded, convert), images, at_a_time)
        for row, ((where, path), (digest, converted)) in enumerate(zip(named, decoded, strict=True)):
            if digest != packed[8 * row : 8 * row + 8]:
                raise DataError(
                    f"{where}: {path} was decoded to other pixels than when it was packed, by {DECODER} here\n"
                    "  do: pack again here, or install the Pillow that it was packed with"
                )
            yield converted


def _decoded(convert: Callable[[Image], T], data: bytes) -> tuple[bytes, T]:
    image = decode(data)
    return pixels_digest(image), convert(image)


def verify(set_url: str, *, progress: Progress = lambda done, total: None) -> Manifest:
    """Every byte and every image of a set is what its manifest says; raises DataError where one is not."""
    manifest = read_manifest(set_url)
    for done, _ in enumerate(decoded_images(set_url, manifest, Image.close), 1):
        progress(done, manifest.num_samples)
    return manifest
