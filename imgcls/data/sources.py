"""Image folders, tars, zips and official archives -> samples, with their class and split.

Comes in: a DATASET's name and perhaps a path. Goes out: a `Source`, a plain list of samples whose bytes are read
later, by whichever process packs them. Called by `jobs.pack` and `jobs.suite --pack`.
"""

import os
import re
import stat
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from imgcls import storage
from imgcls.data.archives import OFFICIAL, Bytes, cifar_images, damage_named, members, printable
from imgcls.data.images import EXTENSIONS
from imgcls.data.order import stratified_cut
from imgcls.disk import local_path
from imgcls.errors import DataError
from imgcls.recipe import digest_of
from imgcls.records import Split

ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
SYNONYMS: dict[str, Split] = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
"""Taken for splits only where one of them is the training part: `valid` beside `invalid` are two classes."""
SYSTEM_FOLDERS = frozenset({"__MACOSX", "lost+found"})
"""Folders that systems add; they are left out, and so is every name that begins with a dot."""
NEEDED = "three are needed, one each to train, validate and test", "two are needed, one to validate", "one is needed"
"""Training images of a class, in a set that brings none, one, or both of test/ and val/."""
CUT_SEED, TEST_FRACTION = 42, 0.2
"""How a test set is cut from a folder that brings none."""
CUT_NOTE = f"no test set there: {TEST_FRACTION:.0%} of every class was cut as the test set, seed {CUT_SEED}"
"""Manifests hold it, word for word: a set of other images is cut elsewhere, and so has another test set."""

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
class Sample:
    path: str
    """In the source, with its extension."""
    label: int
    split: Split
    content: Bytes


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
    """A folder, tar or zip for DATASET: under `IMGCLS_SOURCES`, then under `data/sources/`; None if there is none.

    Raises DataError where several fit equally well, or `IMGCLS_SOURCES` names no folder that can be read.
    """
    roots = [Path("data/sources")] if os.path.isdir("data/sources") else []
    if folder := os.environ.get("IMGCLS_SOURCES"):
        roots.insert(0, local_path(folder))
    for root in roots:
        try:
            fitting = [path for path in sorted(root.iterdir()) if _fits(path, dataset)]
        except OSError as error:
            why = f"is no folder that can be read: {error.strerror}"
            raise DataError(f"{printable(root)} {why}\n  do: mend it, or name another by IMGCLS_SOURCES") from None
        best = [path for path in fitting if path.name.split(".")[0] == dataset] or fitting
        if len(best) > 1:
            names = ", ".join(printable(path.name) for path in best)
            raise DataError(f"{root} has several sources for {dataset}: {names}\n  do: choose one with --source PATH")
        if best:
            return best[0]
    return None


def _fits(path: Path, dataset: str) -> bool:
    names = (dataset, storage.name_of(OFFICIAL[dataset].url)) if dataset in OFFICIAL else (dataset,)
    # cifar100 is not of cifar10; imagenette2-160 is of imagenette
    named = re.match(rf"({'|'.join(map(re.escape, names))})(?!(?<=\d)\d)", path.name)
    return bool(named) and (os.path.isdir(path) or path.name.lower().endswith(ARCHIVES))


def open_source(path: Path) -> Source:
    """The samples of an image folder, a tar or zip of one, or CIFAR-10's own archive.

    Raises DataError on what is no source, StorageError where there is no room to unpack it.
    """
    if os.path.isdir(path):
        return _from_files(printable(path.absolute().name), *_folder_files(path))
    if not os.path.isfile(path):
        raise DataError(f"--source {printable(path)}: there is no such folder, tar or zip")
    files, folders = members(path)
    name, by_name = printable(path.name), {PurePosixPath(member).name: content for member, content in files.items()}
    if "batches.meta" not in by_name:
        return _from_files(name, files, folders)
    with damage_named(path):
        class_names, images = cifar_images(by_name)
    samples = tuple(Sample(*image) for image in images)
    return Source(name, class_names, samples, ("CIFAR-10's arrays are packed as PNG",), _identity(files))


def _folder_files(root: Path) -> tuple[dict[str, Bytes], set[str]]:
    """Files, and folders, empty ones too, by their path below `root`. Links are followed, but not in circles.

    Files that are hidden, or no images by name, are not looked at; hidden folders that cannot be read are left out.
    Raises DataError where another folder or an image cannot be read, or an image is no plain file.
    """

    def fail(error: OSError) -> None:
        if not _hidden(os.path.relpath(error.filename, root)):
            raise error

    files, folders = dict[str, Bytes](), set[str]()
    try:
        for folder, below, names in os.walk(root, followlinks=True, onerror=fail):
            place = Path(folder).relative_to(root)
            if any(os.path.samefile(folder, root / outer) for outer in place.parents):
                if not _hidden(place.as_posix()):
                    raise DataError(f"{printable(folder)} is a link to a folder above it\n  do: remove the link")
                below.clear()
            folders.add(place.as_posix())
            for name in names:
                file, path = Path(folder, name), (place / name).as_posix()
                if not _is_image(path):
                    files[path] = Bytes(0)
                    continue
                info = file.stat()
                if not stat.S_ISREG(info.st_mode):
                    raise DataError(f"{printable(file)} is a device or pipe; only plain files are read\n  do: remove it")
                files[path] = Bytes(info.st_size, str(file), info.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{printable(error.filename)} cannot be read: {error.strerror}") from None
    return files, folders


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in PurePosixPath(path).parts)


def images_below(folder: Path) -> list[Path]:
    """The files in it, and below it, that `open_source` would take for images, by name. Raises as it does."""
    return sorted(folder / path for path in _folder_files(folder)[0] if _is_image(path))


def _is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in EXTENSIONS and not _hidden(path)


def _from_files(name: str, files: dict[str, Bytes], folders: set[str]) -> Source:
    images = {path: content for path, content in sorted(files.items()) if _is_image(path)}
    if not images:
        raise DataError(
            f"{name} holds no images ({', '.join(sorted(EXTENSIONS))}) among {len(files)} files\n"
            "  do: lay them out as split/class/image or class/image"
        )
    notes = list[str]()
    if others := sorted(files.keys() - images.keys()):
        shown = printable(others[0])
        notes.append(f"{len(others)} files that are not images by name, or hidden, were left out, such as {shown}")
    with_images = {str(parent) for path in images for parent in PurePosixPath(path).parents}
    empty = sorted(folder for folder in folders - with_images if not _hidden(folder))
    if empty:
        notes.append(f"{len(empty)} folders without an image were left out, such as {printable(empty[0])}")
    places = _places(name, [*images], empty, notes)
    class_dirs = sorted({class_dir for _, class_dir in places})
    labels = {class_dir: label for label, class_dir in enumerate(class_dirs)}
    samples = tuple(
        Sample(printable(path), labels[class_dir], split, content)
        for (path, content), (split, class_dir) in zip(images.items(), places, strict=True)
    )
    class_names = tuple(IMAGENETTE_CLASSES.get(class_dir, class_dir) for class_dir in class_dirs)
    _check_classes(name, class_names, samples)
    if not any(sample.split == "test" for sample in samples):
        samples = _cut_test(samples)
        notes.append(CUT_NOTE)
    return Source(name, class_names, samples, tuple(notes), _identity(files))


def _places(name: str, images: list[str], empty: list[str], notes: list[str]) -> list[tuple[Split, str]]:
    """Split and class of every image, by its path below the folder that holds all. empty: folders without an image.

    A class is known by its printable name in Unicode's form NFC: macOS writes the same name in another.
    """
    paths = [PurePosixPath(image).parts for image in images]
    around = PurePosixPath(os.path.commonpath([PurePosixPath(image).parent.parent for image in images])).parts
    depth = next((depth for depth, folder in enumerate(around) if folder.lower() in SPLITS), len(around))
    splits = _splits_by_folder(name, {path[depth].lower() for path in paths if len(path) > depth + 1}, empty)
    notes += [f"{folder}/ is taken as {splits[folder]}/" for folder in sorted(splits.keys() - SPLITS.keys())]
    if {"val", "test"} <= set(splits.values()):
        notes.append("val/ beside test/: packed as the split val; it replaces the recipe's cut")
    elif "val" in splits.values():
        notes.append("val/ without test/: val is the test set; validation is cut from train by the recipe")
        splits |= {folder: "test" for folder, split in splits.items() if split == "val"}
    layout = "split/class/image" if splits else "class/image"
    places = list[tuple[Split, str]]()
    for image, path in zip(images, paths, strict=True):
        below = path[depth:]
        if len(below) != len(layout.split("/")):
            raise DataError(
                f"{name}: {printable(image)} does not lie in {layout}\n"
                "  do: move it into its class's folder; splits are called train, val, test"
            )
        split = splits[below[0].lower()] if splits else "train"
        places.append((split, printable(unicodedata.normalize("NFC", below[-2]))))
    return places


def _splits_by_folder(name: str, tops: set[str], empty: list[str]) -> dict[str, Split]:
    """Top folder, in lower case -> its split; empty if the top folders are classes."""
    names = SPLITS | SYNONYMS
    splits: dict[str, Split] = {top: names[top] for top in tops if top in names}
    has_splits = "train" in splits.values() and len(set(splits.values())) == len(tops)
    for folder in map(PurePosixPath, empty):
        if folder.name.lower() in (names if has_splits else SPLITS) and len(folder.parts) <= 2:
            shown = printable(folder)
            remedy = f"put images into {shown}/<class>/, or remove the folder"
            raise DataError(f"{name}: the split {shown} is empty\n  do: {remedy}")
    if has_splits:
        return splits
    if tops & SPLITS.keys():
        alone = "train" not in splits.values() and len(splits) == len(tops)
        wrong = "has no train/ beside" if alone else "mixes splits and other folders at its top:"
        raise DataError(
            f"{name} {wrong} {printable(', '.join(sorted(tops)))}\n  do: keep train/ with test/ or val/, or classes alone"
        )
    return {}


def _cut_test(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """All are of train: a set that brings no test/ has no split val either, since its val/ is the test set."""
    labels = np.array([sample.label for sample in samples])
    cut = {*stratified_cut(labels, fraction=TEST_FRACTION, seed=CUT_SEED)[1]}
    return tuple(replace(sample, split="test") if i in cut else sample for i, sample in enumerate(samples))


def _check_classes(name: str, class_names: tuple[str, ...], samples: tuple[Sample, ...]) -> None:
    if len(class_names) < 2:
        raise DataError(
            f"{name} has one class, {', '.join(class_names)}: nothing to tell apart\n  do: give two class folders or more"
        )
    if twice := sorted(class_name for class_name, times in Counter(class_names).items() if times > 1):
        raise DataError(f"{name}: two folders are called {twice[0]} as classes\n  do: put their images into one of them")
    splits = {sample.split for sample in samples}
    of_class = Counter(sample.label for sample in samples if sample.split == "train")
    count, label = min((of_class[label], label) for label in range(len(class_names)))
    needed = NEEDED[len(splits & {"val", "test"}) :]
    if count < len(needed):
        has = f"{count or 'no'} {'training ' * ('test' in splits)}image{'s' * (count != 1)}; {needed[0]}"
        raise DataError(f"{name}: class {class_names[label]} has {has}\n  do: add images, or leave the class out")


def _identity(files: dict[str, Bytes]) -> str:
    return digest_of([[printable(path), content.size, content.changed_ns] for path, content in sorted(files.items())])
