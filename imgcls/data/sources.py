"""Image folders, tars and official archives -> samples, with their class and split.

Comes in: a DATASET's name and perhaps a path. Goes out: a `Source`, a plain list of samples whose bytes are read
later, by whichever process packs them. Called by `jobs.pack` and `jobs.suite --pack`.
"""

import bz2
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from imgcls import storage
from imgcls.data import archives
from imgcls.data.images import EXTENSIONS, encode_png
from imgcls.data.order import stratified_cut
from imgcls.errors import DataError
from imgcls.recipe import digest_of
from imgcls.records import Split

ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
SPLITS = frozenset({"train", "val", "test"})
CUT_SEED, TEST_FRACTION = 42, 0.2
"""How a test set is cut from a folder that brings none."""

IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes that lie in a file, perhaps in the midst of it (a tar's member)."""

    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """An image that is no file yet: uint8, (h, w, 3)."""

    pixels: np.ndarray

    @property
    def size(self) -> int:
        return self.pixels.nbytes

    def read(self) -> bytes:
        return encode_png(self.pixels)


@dataclass(frozen=True, slots=True)
class Sample:
    path: str
    """In the source, with its extension."""
    label: int
    split: Split
    content: Bytes | Pixels


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    identity: str
    """Changes when the source seems to have changed; an interrupted pack goes on only under the same one."""
    synthetic: bool = False


def find_source(dataset: str) -> Path | None:
    """A folder or tar for DATASET: under `IMGCLS_SOURCES`, then under `data/sources/`; None where there is none.

    Raises DataError where several fit equally well, or `IMGCLS_SOURCES` names no folder.
    """
    roots = [Path("data/sources")]
    if named := os.environ.get("IMGCLS_SOURCES"):
        roots.insert(0, Path(named).expanduser())
        if not roots[0].is_dir():
            raise DataError(f"IMGCLS_SOURCES={named} is no folder\n  do: mend or unset it")
    for root in filter(Path.is_dir, roots):
        fitting = [p for p in sorted(root.iterdir()) if _fits(p, dataset)]
        exact = [p for p in fitting if p.name.split(".")[0] == dataset]
        if len(exact or fitting) > 1:
            names = ", ".join(p.name for p in exact or fitting)
            raise DataError(f"{root} has several sources for {dataset}: {names}\n  do: choose one with --source PATH")
        if fitting:
            return (exact or fitting)[0]
    return None


def _fits(path: Path, dataset: str) -> bool:
    named = path.name.startswith(dataset) or path.name == archives.official_name(dataset)
    return named and (path.is_dir() or path.name.endswith(ARCHIVES))


def open_source(path: Path) -> Source:
    """The samples of an image folder, a tar of one, or CIFAR-10's own archive. Raises DataError on what is no source."""
    if path.is_dir():
        return _from_files(path.name, *_folder_files(path))
    if not path.is_file():
        raise DataError(f"--source {path}: there is no such folder or tar")
    if not tarfile.is_tarfile(path):
        raise DataError(f"--source {path} is neither a folder nor a tar")
    files, folders = _tar_files(_uncompressed(path))
    if archives.is_cifar_archive(files):
        return _from_cifar(path, files)
    return _from_files(path.name, files, folders)


def _folder_files(root: Path) -> tuple[dict[str, Bytes], set[str]]:
    """Files, and folders, empty ones too, by their path below `root`."""
    found, folders = {}, set[str]()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None

    for folder, _, names in os.walk(root, followlinks=True, onerror=refuse):
        folders.add(Path(folder).relative_to(root).as_posix())
        for name in names:
            file = Path(folder, name)
            relative = file.relative_to(root).as_posix()
            try:
                info = file.stat()
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}") from None
            if stat.S_ISREG(info.st_mode):
                found[relative] = Bytes(str(file), 0, info.st_size)
    return found, folders


def _tar_files(path: Path) -> tuple[dict[str, Bytes], set[str]]:
    """Members by name, and folders. Raises DataError on links, devices, doubles and names that leave the folder."""
    found: dict[str, Bytes] = {}
    folders = set[str]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise DataError(f"{path}: member {member.name} would leave the folder; no such tar is read")
                if member.isdir():
                    folders.add(str(name))
                    continue
                if not member.isreg():
                    kind = "a link" if member.islnk() or member.issym() else "a device or pipe"
                    raise DataError(f"{path}: member {member.name} is {kind}; only plain files are read")
                if str(name) in found:
                    raise DataError(f"{path}: member {member.name} stands there twice; which one is meant?")
                found[str(name)] = Bytes(str(path), member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DataError(f"{path} is a damaged tar: {error}\n  do: fetch it again") from None
    return found, folders


COMPRESSIONS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""By the first bytes of a file."""


def _uncompressed(path: Path) -> Path:
    """A tar whose members can be read at their offsets; a compressed one is unpacked once, under the cache."""
    with path.open("rb") as file:
        head = file.read(8)
    opened = next((open_ for magic, open_ in COMPRESSIONS.items() if head.startswith(magic)), None)
    if opened is None:
        return path
    info, folder = path.stat(), storage.cache_root() / "unpacked"
    whole = folder / f"{path.name.split('.')[0]}-{info.st_size}-{info.st_mtime_ns}.tar"
    if not whole.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as target, opened(path) as packed:
            try:
                shutil.copyfileobj(packed, target, 1 << 20)
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                os.unlink(target.name)
                raise DataError(
                    f"{path} cannot be unpacked to {folder}: {error}\n  do: fetch it again, or make room"
                ) from None
        os.replace(target.name, whole)
    return whole


def _from_files(name: str, files: dict[str, Bytes], folders: set[str]) -> Source:
    notes: list[str] = []
    images, ignored = {}, []
    for path, content in sorted(files.items()):
        shown = PurePosixPath(path)
        hidden = any(part.startswith(".") for part in shown.parts)
        if shown.suffix.lower() in EXTENSIONS and not hidden:
            images[path] = content
        else:
            ignored.append(path)
    if not images:
        raise DataError(
            f"{name} holds no images ({', '.join(sorted(EXTENSIONS))}) among {len(files)} files\n"
            "  do: lay them out as split/class/image or class/image"
        )
    if ignored:
        notes.append(f"{len(ignored)} files that are not images by name were left out, such as {ignored[0]}")
    empty = sorted(folders - {str(parent) for path in images for parent in PurePosixPath(path).parents})
    _refuse_empty_splits(name, empty)
    if empty:
        notes.append(f"{len(empty)} folders without an image were left out, such as {empty[0]}")
    placed = _place(name, images, notes)
    class_dirs = sorted({class_dir for _, class_dir, _ in placed.values()})
    labels = {class_dir: label for label, class_dir in enumerate(class_dirs)}
    samples = tuple(Sample(path, labels[class_dir], split, content) for path, (split, class_dir, content) in placed.items())
    class_names = tuple(IMAGENETTE_CLASSES.get(class_dir, class_dir) for class_dir in class_dirs)
    _check_classes(name, class_names, samples)
    if not any(sample.split == "test" for sample in samples):
        samples = _cut_test(samples)
        notes.append(f"no test set there: {TEST_FRACTION:.0%} of every class was cut as the test set, seed {CUT_SEED}")
    if not any(sample.split == "test" for sample in samples):
        raise DataError(f"{name} has one image a class: no test set can be cut\n  do: add images")
    return Source(name, class_names, samples, tuple(notes), _identity(files))


def _refuse_empty_splits(name: str, empty: list[str]) -> None:
    """empty: folders without an image."""
    for folder in map(PurePosixPath, empty):
        if folder.name.lower() in SPLITS and len(folder.parts) <= 2:
            raise DataError(
                f"{name}: the split {folder} is empty\n  do: put images into {folder}/<class>/, or remove the folder"
            )


def _place(name: str, images: dict[str, Bytes], notes: list[str]) -> dict[str, tuple[Split, str, Bytes]]:
    """Split and class folder of every image, by its path below the folder that encloses all."""
    parts = {path: PurePosixPath(path).parts for path in images}
    depth = 0
    while len({p[depth] for p in parts.values()}) == 1 and all(len(p) > depth + 2 for p in parts.values()):
        if next(iter(parts.values()))[depth].lower() in SPLITS:
            break
        depth += 1
    tops = {p[depth].lower() for p in parts.values() if len(p) > depth + 1}
    has_splits = "train" in tops and tops <= SPLITS
    if tops & SPLITS and not has_splits:
        raise DataError(
            f"{name} mixes splits and other folders at its top: {', '.join(sorted(tops))}\n"
            "  do: keep train/ with test/ or val/, or classes alone"
        )
    val_is_test = has_splits and "val" in tops and "test" not in tops
    if val_is_test:
        notes.append("val/ without test/: val is the test set; validation is cut from train by the recipe")
    if {"val", "test"} <= tops and has_splits:
        notes.append("val/ beside test/: packed as the split val; it replaces the recipe's cut")
    placed = {}
    for path, content in images.items():
        below = parts[path][depth:]
        wanted = 3 if has_splits else 2
        if len(below) != wanted:
            layout = "split/class/image" if has_splits else "class/image"
            raise DataError(
                f"{name}: {path} does not lie in {layout}\n"
                "  do: move it into its class's folder; splits are called train, val, test"
            )
        split = below[0].lower() if has_splits else "train"
        placed[path] = ("test" if split == "val" and val_is_test else split, below[-2], content)
    return placed


def _cut_test(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    train = [i for i, sample in enumerate(samples) if sample.split == "train"]
    labels = np.array([samples[i].label for i in train])
    cut = {train[i] for i in stratified_cut(labels, fraction=TEST_FRACTION, seed=CUT_SEED)[1]}
    return tuple(Sample(s.path, s.label, "test", s.content) if i in cut else s for i, s in enumerate(samples))


def _check_classes(name: str, class_names: tuple[str, ...], samples: tuple[Sample, ...]) -> None:
    if len(class_names) < 2:
        raise DataError(
            f"{name} has one class, {', '.join(class_names)}: nothing to tell apart\n  do: give two class folders or more"
        )
    trained = {sample.label for sample in samples if sample.split == "train"}
    for label, class_name in enumerate(class_names):
        if label not in trained:
            raise DataError(
                f"{name}: class {class_name} has no training image\n"
                "  do: add some, or leave the class out of the other splits"
            )


def _identity(files: dict[str, Bytes]) -> str:
    stamps = {content.file: os.stat(content.file).st_mtime_ns for content in files.values()}
    return digest_of([[path, c.size, stamps[c.file]] for path, c in sorted(files.items())])


def _from_cifar(path: Path, files: dict[str, Bytes]) -> Source:
    class_names, rows = archives.cifar_rows({name: content.read() for name, content in files.items()})
    samples = tuple(Sample(name, label, split, Pixels(pixels)) for name, label, split, pixels in rows)
    return Source(path.name, class_names, samples, ("CIFAR-10's arrays are packed as PNG",), _identity(files))
