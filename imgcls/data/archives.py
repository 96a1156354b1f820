"""The official archives: where they are, fetched with resume and a checksum, and CIFAR-10's pickles read safely."""

import hashlib
import io
import pickle
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from imgcls.errors import DataError, NoSourceError
from imgcls.records import Split

TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class Archive:
    url: str
    algorithm: str
    digest: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


OFFICIAL = {
    # Digest as torchvision 0.29 has it (torchvision/datasets/imagenette.py).
    "imagenette": Archive(
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz", "md5", "e793b78cc4c9e9a4ccc0c1155377a412"
    ),
    # Digest as Keras has it (keras/datasets/cifar10.py).
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "sha256",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
}


def official_name(dataset: str) -> str | None:
    return OFFICIAL[dataset].name if dataset in OFFICIAL else None


def download(archive: Archive, folder: Path, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """The whole, checked archive in `folder`; goes on where an earlier download stopped.

    Raises NoSourceError where it cannot be reached, DataError where its bytes are not the official ones or cannot be kept.
    """
    whole, part = folder / archive.name, folder / f"{archive.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not whole.exists():
            _fetch(archive.url, part, progress)
            _check(archive, part)
            part.replace(whole)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise NoSourceError(f"{archive.url} cannot be fetched: {reason}\n  where: {part} keeps what came") from None
    except OSError as error:
        raise DataError(f"{archive.url} cannot be kept in {folder}: {error.strerror or error}") from None
    return whole


def _fetch(url: str, part: Path, progress: Callable[[int, int], None]) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to fetch; the checksum decides
            return
        raise
    with answer:
        if have and answer.status != 206:  # the server sends it from its beginning again
            have = 0
        total = have + int(answer.headers.get("Content-Length", 0))
        with part.open("ab" if have else "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
                progress(file.tell(), total)
            if total and file.tell() < total:
                raise urllib.error.URLError(f"the connection ended at {file.tell():,} of {total:,} bytes; run it again")


def _check(archive: Archive, part: Path) -> None:
    with part.open("rb") as file:
        found = hashlib.file_digest(file, archive.algorithm).hexdigest()
    if found != archive.digest:
        part.unlink()
        raise DataError(
            f"{archive.url}: {archive.algorithm} is {found[:12]}.., the official one is {archive.digest[:12]}..\n"
            "  do: it was deleted; run the same command again"
        )


class _ArraysAndStrings(pickle.Unpickler):
    """Builds NumPy arrays, containers, numbers and strings; whatever else a pickle asks for is refused."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name.replace("numpy.core", "numpy._core"), global_name)


def _unpickled(name: str, data: bytes) -> dict[str, Any]:
    try:
        loaded = _ArraysAndStrings(io.BytesIO(data), encoding="bytes").load()
        return {(key.decode() if isinstance(key, bytes) else key): value for key, value in loaded.items()}
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{name} is not a part of CIFAR-10: {error}\n  do: fetch the official archive again") from None


def is_cifar_archive(names: Collection[str]) -> bool:
    return "batches.meta" in {PurePosixPath(name).name for name in names}


def cifar_rows(members: dict[str, bytes]) -> tuple[tuple[str, ...], Iterator[tuple[str, int, Split, np.ndarray]]]:
    """Class names, and (path, label, split, pixels) of every image; pixels are uint8, (32, 32, 3)."""
    by_name = {PurePosixPath(name).name: name for name in members}
    meta = _unpickled("batches.meta", members[by_name["batches.meta"]])
    class_names = tuple(_text(name) for name in meta["label_names"])
    parts: list[tuple[str, Split]] = [(f"data_batch_{i}", "train") for i in range(1, 6)]
    parts.append(("test_batch", "test"))

    def rows() -> Iterator[tuple[str, int, Split, np.ndarray]]:
        for part, split in parts:
            if part not in by_name:
                raise DataError(f"the CIFAR-10 archive lacks {part}\n  do: fetch the official archive again")
            batch = _unpickled(part, members[by_name[part]])
            images = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            for file, label, pixels in zip(batch["filenames"], batch["labels"], images, strict=True):
                yield f"{split}/{class_names[label]}/{_text(file)}", int(label), split, pixels

    return class_names, rows()


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
