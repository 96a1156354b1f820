"""WebDataset tars and their manifest: written, read, verified.

Comes in: a `Source`. Goes out: `<url>/{manifest.json, pixels.u64, train-00000.tar, ...}`, from which `cache` is built.
Each shard waits with its own record until all are there, so that an interrupted pack goes on at the next shard and an
earlier set stays whole until it is replaced; the manifest is written last, so that a set without one is no set.
"""

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from imgcls import records, storage
from imgcls.data.archives import printable
from imgcls.data.images import EXTENSIONS, decode, decoding_pool, in_order, pixels_digest
from imgcls.data.order import permutation
from imgcls.data.sources import Sample, Source
from imgcls.errors import DataError, MissingError, StorageError
from imgcls.recipe import digest_of
from imgcls.records import Manifest, Record, Shard, Split

SHARD_SAMPLES, SHARD_BYTES = 2000, 32 << 20
PACK_SEED = 42
_UNDER_WAY = ".packing"

Progress = Callable[[int, int], None]


class BadImage(Record):
    path: str
    reason: str


class PackedShard(Record):
    """A finished shard of a pack that is under way."""

    identity: str
    shard: Shard
    sha256: tuple[str, ...]
    pixels: tuple[str, ...]
    bad: tuple[BadImage, ...]
    animated: tuple[str, ...]


class _Read(NamedTuple):
    data: bytes
    sha256: str
    pixels: str
    animated: bool
    reason: str


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
    plan = _plan(source)
    done, packed = 0, list[PackedShard]()
    with decoding_pool() as pool:
        for shard_name, split, samples in plan:

            def shard_progress(within: int, before: int = done) -> None:
                progress(before + within, len(source.samples))

            one = _packed_before(set_url, shard_name, identity)
            if one is None:
                reads = in_order(pool, _read_and_decode, samples, at_once=64)
                one = _pack_shard(set_url, shard_name, split, samples, reads, identity, shard_progress)
            packed.append(one)
            done += len(samples)
            shard_progress(0, done)
    paths = [sample.path for _, _, samples in plan for sample in samples]
    return _seal(source, paths, set_url, name, packed, max_bad)


def _plan(source: Source) -> list[tuple[str, Split, list[Sample]]]:
    """Shards of mixed classes, by a seeded permutation of each split."""
    plan: list[tuple[str, Split, list[Sample]]] = []
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        members = sorted((s for s in source.samples if s.split == split), key=lambda s: s.path)
        number, shard, size = 0, list[Sample](), 0
        for i in permutation(PACK_SEED, 0, len(members)):
            sample = members[i]
            if shard and (len(shard) == SHARD_SAMPLES or size + sample.content.size > SHARD_BYTES):
                plan.append((f"{split}-{number:05d}.tar", split, shard))
                number, shard, size = number + 1, [], 0
            shard.append(sample)
            size += sample.content.size
        if shard:
            plan.append((f"{split}-{number:05d}.tar", split, shard))
    return plan


def _packed_before(set_url: str, shard_name: str, identity: str) -> PackedShard | None:
    try:
        one = records.read_if_there(PackedShard, storage.join(set_url, _UNDER_WAY, f"{shard_name}.json"))
        if one is None or one.identity != identity:
            return None
        waits = storage.join(set_url, _UNDER_WAY, shard_name)  # or was moved already, by a pack that ended there
        place = waits if storage.exists(waits) else storage.join(set_url, shard_name)
        storage.read_checked(place, num_bytes=one.shard.num_bytes, digest=one.shard.sha256)
    except (DataError, StorageError):
        return None
    return one


def _read_and_decode(samples: list[Sample]) -> list[_Read]:
    """Runs in a pool process. What is no image has a reason. Raises DataError where a file cannot be read as things are."""
    found = []
    for sample in samples:
        sha256 = ""
        try:
            data = sample.content.read()
            sha256 = hashlib.sha256(data).hexdigest()
            image = decode(data)
            found.append(_Read(data, sha256, pixels_digest(image).hex(), image.info["frames"] > 1, ""))
        except Exception as error:  # Pillow raises many kinds on what is no image
            if isinstance(error, MemoryError) or getattr(error, "errno", None):  # the machine's fault, not the image's
                why = printable(error) or "no memory is left"
                raise DataError(
                    f"{sample.path} cannot be read: {why}\n  do: mend rights, disk or memory; run it again"
                ) from None
            found.append(_Read(b"", sha256, "", False, printable(error) or type(error).__name__))
    return found


def _pack_shard(
    set_url: str,
    shard_name: str,
    split: Split,
    samples: list[Sample],
    reads: Iterator[list[_Read]],
    identity: str,
    progress: Callable[[int], None],
) -> PackedShard:
    from webdataset.writer import TarWriter  # 2 s, most of it torch: only where a shard is written

    labels, paths, sha256, pixels, bad, animated = [], [], [], [], [], []
    position = 0
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, shard_name)
        with TarWriter(str(local), mtime=0, user="", group="") as tar:
            for some in reads:
                for read in some:
                    sample = samples[position]
                    position += 1
                    sha256.append(read.sha256)
                    if read.reason:
                        bad.append(BadImage(path=sample.path, reason=read.reason))
                        continue
                    if read.animated:
                        animated.append(sample.path)
                    extension = EXTENSIONS[PurePosixPath(sample.path).suffix.lower()]
                    key = f"{shard_name.removesuffix('.tar')}-{len(labels):06d}"
                    tar.write({"__key__": key, extension: read.data, "cls": sample.label})
                    labels.append(sample.label)
                    paths.append(sample.path)
                    pixels.append(read.pixels)
                progress(position)
        data = local.read_bytes()
    shard = Shard(
        name=shard_name,
        split=split,
        num_bytes=len(data),
        sha256=storage.sha256(data),
        labels=tuple(labels),
        paths=tuple(paths),
    )
    one = PackedShard(
        identity=identity, shard=shard, sha256=tuple(sha256), pixels=tuple(pixels), bad=tuple(bad), animated=tuple(animated)
    )
    storage.write_bytes(storage.join(set_url, _UNDER_WAY, shard_name), data)
    records.write(one, storage.join(set_url, _UNDER_WAY, f"{shard_name}.json"))
    return one


def _seal(source: Source, paths: list[str], set_url: str, name: str, packed: list[PackedShard], max_bad: int) -> Manifest:
    """paths: of all files in the order of the shards, those that are no images too."""
    bad = [one for shard in packed for one in shard.bad]
    if len(bad) > max_bad:
        listed = "".join(f"\n  {one.path}: {one.reason}" for one in bad[:20])
        more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise DataError(
            f"{source.name}: {len(bad)} files are no images, --max-bad is {max_bad}{listed}{more}\n"
            f"  do: mend or remove them, or leave them out with --max-bad {len(bad)}"
        )
    notes = [*source.notes, *_duplicates(packed)]
    if animated := [path for one in packed for path in one.animated]:
        notes.append(f"{len(animated)} animated images: the first frame of each is taken: {'; '.join(animated[:20])}")
    notes += [f"left out, no image: {one.path}" for one in bad]
    pixels = bytes.fromhex("".join("".join(one.pixels) for one in packed))
    shards = tuple(one.shard for one in packed)
    _check_splits(name, source.class_names, shards)
    hashes = sorted(zip(paths, (sha256 for one in packed for sha256 in one.sha256), strict=True))
    manifest = Manifest.sealed(
        name=name,
        class_names=source.class_names,
        shards=shards,
        pixels_sha256=storage.sha256(pixels),
        source=source.name,
        source_sha256=digest_of(hashes),
        synthetic=source.synthetic,
        notes=tuple(notes),
    )
    storage.delete(manifest_url(set_url))
    for waiting in storage.files(storage.join(set_url, _UNDER_WAY)):
        if waiting.endswith(".tar"):
            storage.move(storage.join(set_url, _UNDER_WAY, waiting), storage.join(set_url, waiting))
    storage.write_bytes(storage.join(set_url, "pixels.u64"), pixels)
    planned = {shard.name for shard in shards}
    for left in storage.files(set_url):
        if left.endswith(".tar") and left not in planned:
            storage.delete(storage.join(set_url, left))
    records.write(manifest, manifest_url(set_url))
    storage.delete(storage.join(set_url, _UNDER_WAY))
    return manifest


def _check_splits(name: str, class_names: tuple[str, ...], shards: tuple[Shard, ...]) -> None:
    for split in ("train", "test"):
        labels = {label for shard in shards if shard.split == split for label in shard.labels}
        if not labels:
            raise DataError(f"{name}: no image of the split {split} could be read")
        missing = set(range(len(class_names))) - labels if split == "train" else set()
        if missing:
            raise DataError(f"{name}: no training image of class {class_names[min(missing)]} could be read")


def _duplicates(packed: list[PackedShard]) -> list[str]:
    """What stands in two splits, and how often an image stands twice in one."""
    seen: dict[str, tuple[Split, str]] = {}
    across, within = list[str](), 0
    for one in packed:
        for digest, path in zip(one.pixels, one.shard.paths, strict=True):
            first = seen.setdefault(digest, (one.shard.split, path))
            if first[1] == path:
                continue
            if first[0] == one.shard.split:
                within += 1
            else:
                across.append(f"{first[1]} = {path}")
    notes = []
    if across:
        notes.append(f"LEAK: {len(across)} images stand in two splits, as {'; '.join(across[:3])}")
    if within:
        notes.append(f"{within} images stand twice in the same split")
    return notes


def fetch_shard(set_url: str, shard: Shard) -> bytes:
    """The shard's checked bytes. Raises DataError where it is missing or altered."""
    url = storage.join(set_url, shard.name)
    try:
        return storage.read_checked(url, num_bytes=shard.num_bytes, digest=shard.sha256)
    except MissingError as error:
        raise DataError(f"{error}, though the manifest of {set_url} names it\n  do: pack again") from None
    except DataError as error:
        raise DataError(f"{error}\n  do: pack again, or look with python -m jobs.pack --verify URL") from None


def read_samples(shard: Shard, data: bytes, *, where: str) -> Iterator[tuple[bytes, int]]:
    """(image bytes, label) in the shard's order. Raises DataError where the tar does not hold what it should."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    count = 0
    for sample in group_by_keys(tar_file_expander([{"url": where, "stream": io.BytesIO(data)}])):
        names = [name for name in sample if not name.startswith("__") and name != "cls"]
        if len(names) != 1 or count >= shard.num_samples or int(sample["cls"]) != shard.labels[count]:
            raise DataError(f"{where}: sample {count} is not what the manifest says\n  do: pack again")
        count += 1
        yield sample[names[0]], int(sample["cls"])
    if count != shard.num_samples:
        raise DataError(f"{where} holds {count} samples, the manifest says {shard.num_samples}\n  do: pack again")


def read_pixel_digests(set_url: str, manifest: Manifest) -> np.ndarray:
    """8 bytes of each image's pixel SHA-256: uint64, (all samples,), in the order of the shards."""
    url = storage.join(set_url, "pixels.u64")
    num_bytes = 8 * sum(shard.num_samples for shard in manifest.shards)
    try:
        data = storage.read_checked(url, num_bytes=num_bytes, digest=manifest.pixels_sha256)
    except DataError as error:
        raise DataError(f"{error}\n  do: pack again") from None
    return np.frombuffer(data, dtype="<u8")


def check_shards(set_url: str, manifest: Manifest) -> None:
    """Every shard is there; on a disk its bytes are compared too. In a bucket that happens when a node fetches it."""
    missing = sorted({shard.name for shard in manifest.shards} - set(storage.files(set_url)))
    if missing:
        raise DataError(f"{set_url} lacks {', '.join(missing[:5])}, which its manifest names\n  do: pack again")
    if storage.is_local(set_url):
        for shard in manifest.shards:
            fetch_shard(set_url, shard)


def verify(set_url: str, *, progress: Progress = lambda done, total: None) -> Manifest:
    """Every byte and every image of a set is what its manifest says; raises DataError at the first that is not."""
    manifest = read_manifest(set_url)
    pixels = read_pixel_digests(set_url, manifest)
    done, total = 0, len(pixels)
    with decoding_pool() as pool:
        for shard in manifest.shards:
            data = fetch_shard(set_url, shard)
            images = (image for image, _ in read_samples(shard, data, where=storage.join(set_url, shard.name)))
            for digests in in_order(pool, _pixel_digests, images, at_once=64):
                expected = pixels[done : done + len(digests) // 8]
                if digests != expected.tobytes():
                    raise DataError(f"{set_url}/{shard.name}: decoded pixels differ from pixels.u64\n  do: pack again")
                done += len(expected)
                progress(done, total)
    return manifest


def _pixel_digests(images: list[bytes]) -> bytes:
    return b"".join(pixels_digest(decode(image)) for image in images)
