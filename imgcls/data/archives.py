"""Members of tars and zips by name. Official archives: fetched with resume and a checksum, CIFAR-10's pickles read safely.

Names and sizes come from strangers: a name is escaped, checked and bounded here, before other code sees it.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import pickle
import shutil
import stat
import tarfile
import unicodedata
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from imgcls import storage
from imgcls.data.images import encode_png
from imgcls.errors import DataError, ImgclsError, NoSourceError
from imgcls.records import Split

TIMEOUT_S = 20
IMAGE_BYTES, NAME_BYTES = 1 << 30, 255
"""No image file is larger; no name in a folder is longer."""
COMPRESSIONS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""By the first bytes of a file."""
ZIP = (b"PK\x03\x04", b"PK\x05\x06")
"""The first bytes of a zip, and of an empty one."""
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
CIFAR_PARTS: dict[str, Split] = {**{f"data_batch_{i}": "train" for i in range(1, 6)}, "test_batch": "test"}
PICKLED = {"numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"}
"""What CIFAR-10's pickles ask for."""


def printable(name: object) -> str:
    """The name on one line, for terminals and JSON.

    Control and format characters and bytes that are not UTF-8 are escaped, but not the joiners that some scripts need.
    The backslash is escaped too, so that two different names stay different.
    """

    def shown(c: str) -> str:
        plain = c in "\u200c\u200d" or (c != "\\" and unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))
        return c if plain else c.encode("unicode_escape").decode()

    return "".join(map(shown, str(name)))


@dataclass(frozen=True, slots=True, eq=False)
class Bytes:
    """Bytes that are read later: a file's, those of a member of an archive, or of an image that is no file yet."""

    size: int
    file: str = ""
    """Where they lie, or their archive does."""
    changed_ns: int = 0
    """When the file, or the archive, was changed last."""
    member: Any = None
    """A TarInfo or ZipInfo; of an image that is no file yet its pixels: uint8, (h, w, 3)."""

    def read(self) -> bytes:
        """Raises DataError, or on damaged bytes whatever the libraries raise."""
        if self.size > IMAGE_BYTES:
            raise DataError(f"it has {self.size:,} bytes, more than an image file has")
        if isinstance(self.member, np.ndarray):
            return encode_png(self.member)
        if self.member is None:
            return Path(self.file).read_bytes()
        archive = _opened(self.file, self.changed_ns)
        open_member = archive.open if isinstance(self.member, zipfile.ZipInfo) else archive.extractfile
        with open_member(self.member) as file:
            return file.read()


_open: dict[tuple[str, int], Any] = {}
"""The archive that this process read last."""


def _opened(file: str, changed_ns: int) -> Any:
    if (file, changed_ns) not in _open:
        while _open:
            _open.popitem()[1].close()
        reader = zipfile.ZipFile if _head(file).startswith(ZIP) else partial(tarfile.open, mode="r:", encoding="utf-8")
        _open[file, changed_ns] = reader(file)
    return _open[file, changed_ns]


def _head(file: str | Path) -> bytes:
    with open(file, "rb") as archive:
        return archive.read(8)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except ImgclsError:
        raise
    except PermissionError as error:
        raise DataError(f"{printable(path)} may not be read: {error.strerror}\n  do: mend its rights (chmod)") from None
    except Exception as error:  # the libraries raise many kinds on damaged bytes
        raise DataError(
            f"{printable(path)} is damaged, or no archive that can be read: {printable(error) or type(error).__name__}\n"
            "  do: fetch it again; if it is another kind of archive, unpack it and give the folder by --source"
        ) from None


def members(path: Path) -> tuple[dict[str, Bytes], set[str]]:
    """Files of a tar or zip by their path in it, and its folders.

    Raises DataError on damage, and on links, devices, encrypted members, doubles and names that leave the folder.
    """
    files, folders = dict[str, Bytes](), set[str]()
    with damage_named(path):
        whole = _uncompressed(path)
        changed_ns = whole.stat().st_mtime_ns
        archive = _opened(str(whole), changed_ns)
        entries = _zip_members(archive) if isinstance(archive, zipfile.ZipFile) else _tar_members(archive)
        for name, kind, member, size in entries:
            place = PurePosixPath(name)
            why = None if kind in ("file", "folder") else f"is {kind}; only plain files are read"
            if place.is_absolute() or ".." in place.parts:
                why = "would leave the folder; no such archive is read"
            if any(len(part.encode(errors="surrogatepass")) > NAME_BYTES for part in place.parts):
                why = f"has a name of more than {NAME_BYTES} bytes; no folder could hold it"
            if kind == "file" and str(place) in files:
                why = "stands there twice; which one is meant?"
            if why:
                remedy = "unpack it, mend that file, and give the folder by --source"
                raise DataError(f"{printable(path)}: member {printable(name[:NAME_BYTES])} {why}\n  do: {remedy}")
            if kind == "folder":
                folders.add(str(place))
            else:
                files[str(place)] = Bytes(size, str(whole), changed_ns, member)
    return files, folders


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, Any, int]]:
    """(name, kind, member, size) of each. Raises where the archive does not end as a tar does."""
    for member in tar:
        if member.size < 0:
            raise tarfile.ReadError(f"a member has {member.size} bytes")
        other = "a link" if member.islnk() or member.issym() else "a device or pipe"
        yield member.name, "folder" if member.isdir() else "file" if member.isreg() else other, member, member.size
    # tarfile ends in silence at a broken header, and where the file was cut between two members.
    file: Any = tar.fileobj
    file.seek(tar.offset)
    blocks = iter(partial(file.read, 1 << 20), b"")
    if any(block.strip(b"\0") for block in blocks) or file.tell() < tar.offset + tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no member and no end at byte {tar.offset:,}")


def _zip_members(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, Any, int]]:
    """(name, kind, member, size) of each."""
    for member in archive.infolist():
        name, mode = member.filename, stat.S_IFMT(member.external_attr >> 16)
        with suppress(UnicodeError):  # macOS writes UTF-8 and does not say so
            name = name if member.flag_bits & 0x800 else name.encode("cp437").decode()
        name = name if member.create_system else name.replace("\\", "/")  # as some programs of Windows do
        kind = "folder" if name.endswith("/") else "file"
        if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = "a link" if mode == stat.S_IFLNK else "a device or pipe"
        elif member.flag_bits & 1 or member.compress_type not in ZIP_METHODS:
            kind = "encrypted" if member.flag_bits & 1 else f"packed by method {member.compress_type}"
        yield name, kind, member, member.file_size


def _uncompressed(path: Path) -> Path:
    """An archive whose members can be read one by one; a compressed tar is decompressed once, into the cache.

    Raises StorageError where there is no room for it.
    """
    head = _head(path)
    decompressed = next((reader for magic, reader in COMPRESSIONS.items() if head.startswith(magic)), None)
    if decompressed is None:
        return path
    info, folder = path.stat(), storage.cache_root() / "unpacked"
    whole = folder / f"{path.name.split('.')[0]}-{info.st_size}-{info.st_mtime_ns}.tar"
    if not whole.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with storage.temporary_folder("unpack", parent=str(folder)) as temporary, decompressed(path) as packed:
                with Path(temporary, whole.name).open("wb") as target:
                    shutil.copyfileobj(packed, target, 1 << 20)
                Path(target.name).replace(whole)
        except OSError as error:
            if error.errno is None:  # the packed bytes, not the disk
                raise
            what = f"{printable(path)} cannot be unpacked to {folder}: {error.strerror}"
            raise storage.cache_error(what, "make room there") from None
    return whole


@dataclass(frozen=True, slots=True)
class Archive:
    url: str
    algorithm: str
    digest: str


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


def download(archive: Archive, folder: Path, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """The whole, checked archive in `folder`; goes on where an earlier download stopped.

    Raises NoSourceError where it cannot be reached, DataError where its bytes came in part, are not the official ones, or
    cannot be kept.
    """
    whole = folder / storage.name_of(archive.url)
    part = Path(f"{whole}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not whole.exists():
            _fetch(archive.url, part, progress)
            _check(archive, part)
            part.replace(whole)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        what = f"{archive.url} cannot be fetched: {getattr(error, 'reason', error)}"
        # No other images take the place of those of which a part came.
        kind, do = (DataError, f"\n  do: run it again, or delete {part}") if part.exists() else (NoSourceError, "")
        raise kind(what + do) from None
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
                raise urllib.error.URLError(f"the connection ended at {file.tell():,} of {total:,} bytes")


def _check(archive: Archive, part: Path) -> None:
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, archive.algorithm).hexdigest()
    if digest != archive.digest:
        part.unlink()
        raise DataError(
            f"{archive.url}: {archive.algorithm} is {digest[:12]}.., the official one is {archive.digest[:12]}..\n"
            "  do: it was deleted; run the same command again"
        )


class _Array:
    """Stands for an array in a pickle, and for its type: NumPy's own ones crash on some damaged pickles."""

    def __init__(self, *how_it_is_built: object) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _ArraysAndStrings(pickle.Unpickler):
    """Builds arrays, containers, numbers and strings; whatever else a pickle asks for is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if f"{module_name}.{global_name}" not in PICKLED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return _Array


def cifar_images(by_name: dict[str, Bytes]) -> tuple[tuple[str, ...], list[tuple[str, int, Split, Bytes]]]:
    """Class names, and (path, label, split, content) of every image.

    by_name: the parts of CIFAR-10's own archive, `batches.meta` among them.
    """
    class_names = tuple(map(printable, _cifar_part(by_name, "batches.meta")["label_names"]))
    images = []
    for part, split in CIFAR_PARTS.items():
        batch = _cifar_part(by_name, part)
        _, shape, _, by_column, values = batch["data"].state
        rows = np.frombuffer(values.encode("latin1"), dtype=np.uint8).reshape(shape, order="F" if by_column else "C")
        arrays = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        for file, label, pixels in zip(batch["filenames"], batch["labels"], arrays, strict=True):
            content = Bytes(pixels.nbytes, member=pixels)
            images.append((f"{split}/{class_names[label]}/{printable(file)}", int(label), split, content))
    return class_names, images


def _cifar_part(by_name: dict[str, Bytes], name: str) -> dict[str, Any]:
    if name not in by_name:
        raise DataError(f"the CIFAR-10 archive lacks {name}\n  do: fetch the official archive again")
    return _ArraysAndStrings(io.BytesIO(by_name[name].read()), encoding="latin1").load()
