"""Whatever folders and archives hold is packed rightly, or refused in one message with the name."""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import tempfile
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imgcls.data import shards, sources
from imgcls.data.images import pixels_digest
from imgcls.errors import DataError, ImgclsError
from imgcls.records import Manifest
from tests.conftest import image, image_folder


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def exif(value: bytes) -> bytes:
    """EXIF of two tags: orientation 6, and a resolution whose signed rational is `value`."""
    tags = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00" + b"\x1a\x01\x0a\x00\x01\x00\x00\x00\x26\x00\x00\x00"
    return b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00" + tags + b"\x00\x00\x00\x00" + value


SMALL = (9, 7)
BLACK = Image.new("RGB", (60, 40))
ANIMATION = {"save_all": True, "append_images": [image(21, SMALL), image(22, SMALL)]}
GOOD = {
    "png": encoded(image(1, SMALL), "PNG"),
    "gray": encoded(image(2, SMALL, "L"), "PNG"),
    "palette": encoded(image(3, SMALL, "P"), "PNG"),
    "jpeg": encoded(image(4, SMALL), "JPEG"),
    "cmyk": encoded(image(5, SMALL, "CMYK"), "JPEG"),
    "webp": encoded(image(6, SMALL), "WEBP"),
    "bmp": encoded(image(7, SMALL), "BMP"),
    "black": encoded(BLACK, "BMP"),
    "no rational": encoded(image(8, SMALL), "JPEG", exif=exif(b"\xf9\xff\xff\xff\x01\x00\x00\x00")),
    "no exif": encoded(image(9, SMALL), "JPEG", exif=b"Exif\x00\x00nonsense"),
    "mpo": encoded(image(10, SMALL), "MPO", save_all=True, append_images=[image(11, SMALL)]),
    "apng": encoded(image(12, SMALL), "PNG", **ANIMATION),
    "animated webp": encoded(image(13, SMALL), "WEBP", **ANIMATION, lossless=True),
}
ANIMATED = {"apng", "animated webp"}
BAD = {
    "gif": encoded(image(14, SMALL), "GIF"),
    "postscript": encoded(image(15, SMALL), "EPS"),
    "tiff": encoded(image(16, SMALL), "TIFF"),
    "torn jpeg": encoded(image(17, (60, 60)), "JPEG")[:600],
    "torn png": encoded(image(18, (60, 60)), "PNG")[:600],
    "empty": b"",
    "text": b"<html>not found</html>",
    "bomb": b"BM" + (54).to_bytes(12, "little") + (40).to_bytes(4, "little") + (60000).to_bytes(4, "little") * 2
    + b"\x01\x00\x18\x00" + bytes(24),
}  # fmt: skip
CONTENT = GOOD | BAD


def pixels(name: str) -> str:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(GOOD[name])) as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_270) if name == "no rational" else picture
        return pixels_digest(turned.convert("RGB")).hex()


PIXELS = {name: pixels(name) for name in GOOD}
TARS = {f"{packing}{number}": (packing, number) for packing in ("tar", "tgz", "bz2", "xz") for number in (0, 1, 2)}
ZIPS = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2}
FORMS = ("folder", *TARS, *ZIPS)
ODD = {
    "folder": ("circle", "dangling", "pipe"),
    "tar": ("link", "hard link", "pipe", "device", "absolute", "outside", "twice", "long name"),
    "zip": ("link", "pipe", "absolute", "outside", "twice", "long name", "encrypted", "unknown method"),
}


@dataclass(frozen=True)
class Case:
    form: str
    files: tuple[tuple[tuple[str, ...], str], ...]
    """(path's parts, name in CONTENT): right by themselves, with those in BAD left out."""
    noise: tuple[tuple[tuple[str, ...], bytes], ...] = ()
    """Files that are to be left out and noted."""
    empty: tuple[str, ...] = ()
    """An empty folder."""
    odd: str = ""
    """One thing that is to be refused."""
    linked: str = ""
    """Folders only: the first class once more, under this name, as a link."""
    cut: float | None = None
    flip: float | None = None


def kind_of(form: str) -> str:
    return "folder" if form == "folder" else "zip" if form in ZIPS else "tar"


SPLITS = {"train": "train", "Train": "train", "training": "train", "val": "val", "valid": "val", "test": "test"}
RESERVED = {*map(str.lower, SPLITS), "validation", "testing", "__macosx", "lost+found", "linked"}


@st.composite
def names(draw: st.DrawFn, form: str) -> str:
    """Whatever a folder could be called, or a member of this archive."""
    characters = st.characters(exclude_categories=["Cs"], exclude_characters="/\0")
    odd = st.sampled_from(
        ["\n", "\x1b[31m", "\u202e", "\udce9", "\\", "e\u0301", "\u00e9", "$5_to_$10", "...", ".png", "~", " "]
    )
    name = "".join(draw(st.lists(st.one_of(characters, odd), min_size=1, max_size=12)))
    if kind_of(form) == "zip":
        name = name.replace("\udce9", "_").replace("\\", "_")
    hidden = name.startswith(".") or name.lower() in RESERVED
    return f"x{name}" if hidden else name


@st.composite
def cases(draw: st.DrawFn) -> Case:
    form = draw(st.sampled_from(FORMS))
    kind = kind_of(form)
    classes = draw(st.lists(names(form), min_size=2, max_size=3, unique_by=nfc))
    tops = draw(st.sampled_from([("",), ("train",), ("Train", "val"), ("training", "valid", "test"), ("train", "test")]))
    above = ("around",) if draw(st.booleans()) else ()
    ending = st.sampled_from([".jpg", ".JPG", ".jpeg", ".jfif", ".png", ".webp", ".Bmp"])
    trouble = draw(st.sampled_from(["", "", "", "", "bad", "odd", "odd"] + ["cut", "flip"] * (kind != "folder")))
    content = st.sampled_from([*GOOD, *BAD] if trouble == "bad" else [*GOOD])
    files = {}
    for top in tops:
        for class_name in classes:
            written = draw(st.sampled_from([class_name, unicodedata.normalize("NFD", class_name)]))
            folder = written if nfc(written) == nfc(class_name) else class_name
            for number in range(3):
                stem = draw(names(form)) if number == 0 else str(number)
                files[(*above, *filter(None, (top, folder)), f"{stem}{draw(ending)}")] = draw(content)
    noise = st.sampled_from(
        [
            ("._a.jpg", GOOD["jpeg"]),
            ("Thumbs.db", b"x"),
            ("__MACOSX/train/cat/._a.jpg", b"x"),
            ("README.txt", b"x"),
            (".git/a.png", GOOD["png"]),
        ]
    )
    added = {(*above, *name.split("/")): data for name, data in draw(st.lists(noise, max_size=2))}
    empty = draw(st.sampled_from([(), ("__MACOSX",), ("__MACOSX", "train"), (".cache", "test"), ("vide",)]))
    return Case(
        form,
        tuple(files.items()),
        tuple(added.items()),
        empty,
        odd=draw(st.sampled_from(ODD[kind])) if trouble == "odd" else "",
        linked="linked" if kind == "folder" and tops == ("",) and draw(st.booleans()) else "",
        cut=draw(st.floats(0, 0.999)) if trouble == "cut" else None,
        flip=draw(st.floats(0, 0.999)) if trouble == "flip" else None,
    )


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def make(case: Case, root: Path) -> Path:
    members = [("/".join(path), CONTENT[content]) for path, content in case.files]
    members += [("/".join(path), data) for path, data in case.noise]
    if case.form == "folder":
        return make_folder(case, members, root / "set")
    path = root / f"set.{'zip' if case.form in ZIPS else 'tar'}"
    data = make_zip(case, members) if case.form in ZIPS else make_tar(case, members)
    if case.cut is not None:
        data = data[: int(case.cut * len(data))]
    if case.flip is not None and data:
        at = int(case.flip * len(data))
        data = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
    path.write_bytes(data)
    return path


def make_folder(case: Case, members: list[tuple[str, bytes]], root: Path) -> Path:
    for name, data in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    Path(root, *case.empty).mkdir(parents=True, exist_ok=True)
    first = (root / members[0][0]).parent
    if case.linked:
        (first.parent / case.linked).symlink_to(first.name)
    odd: dict[str, Callable[[], object]] = {
        "": lambda: None,
        "circle": lambda: (first / "odd").symlink_to(".."),
        "dangling": lambda: (first / "odd.png").symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(first / "odd.png"),
    }
    odd[case.odd]()
    return root


def odd_name(case: Case, members: list[tuple[str, bytes]]) -> str:
    """Of the member that is to be refused."""
    first, at = members[0][0], members[0][0].rsplit("/", 1)[0]
    return {"twice": first, "absolute": "/odd.png", "outside": "../odd.png", "long name": f"{at}/odd{'x' * 253}.png"}.get(
        case.odd, f"{at}/odd.png"
    )


def make_tar(case: Case, members: list[tuple[str, bytes]]) -> bytes:
    packing, number = TARS[case.form]
    format_ = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)[number]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_, encoding="utf-8") as tar:
        if case.empty:
            folder = tarfile.TarInfo("/".join(case.empty))
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name, data in members:
            if number == 0 and data == CONTENT["black"]:
                add_sparse(tar, name, data)
            else:
                add(tar, tarfile.TarInfo(name), data)
        if case.odd:
            member = tarfile.TarInfo(odd_name(case, members))
            types = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE}
            member.type = (types | {"device": tarfile.BLKTYPE}).get(case.odd, tarfile.REGTYPE)
            member.linkname = "/etc/passwd" if "link" in case.odd else ""
            add(tar, member, b"x" if member.isreg() else b"")
    compress = {"tar": bytes, "tgz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packing]
    return compress(file.getvalue())


def add(tar: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    member.size = len(data)
    try:
        tar.addfile(member, io.BytesIO(data))
    except ValueError:  # USTAR has no room for the name
        tar.format = tarfile.PAX_FORMAT
        tar.addfile(member, io.BytesIO(data))


def add_sparse(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """As `tar -S` in the format 1.0: of the file's middle, which is zero, only the place is kept."""
    assert not data[512:-512].strip(b"\0")
    where = f"2\n0\n512\n{len(data) - 512}\n512\n".encode().ljust(512, b"\0")
    member = tarfile.TarInfo("GNUSparseFile.0/x")
    fields = {"major": "1", "minor": "0", "name": name, "realsize": str(len(data))}
    member.pax_headers = {f"GNU.sparse.{key}": value for key, value in fields.items()}
    add(tar, member, where + data[:512] + data[-512:])


def make_zip(case: Case, members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w", ZIPS[case.form]) as archive:
        if case.empty:
            archive.writestr("/".join(case.empty) + "/", b"")
        for name, data in members:
            archive.writestr(name, data)
        if case.odd:
            member = zipfile.ZipInfo(odd_name(case, members))
            mode = {"link": stat.S_IFLNK, "pipe": stat.S_IFIFO}.get(case.odd, 0)
            member.external_attr, member.create_system = (mode | 0o644) << 16, 3
            archive.writestr(member, b"x")
            # What `zipfile` cannot write: only the list at the end says so, which is written when it is closed.
            if case.odd == "encrypted":
                member.flag_bits |= 1
            if case.odd == "unknown method":
                member.compress_type = 99
    return file.getvalue()


class Inline(Executor):
    """A pool's shape without its processes."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def inline():
    yield Inline()


def raw(name: str) -> str:
    """What was escaped; none of it has two meanings, and none reaches a terminal as more than a sign on the same line."""
    assert not {unicodedata.category(c) for c in name} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(name) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    return name.encode("latin-1", "backslashreplace").decode("unicode_escape")


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make(case, Path(folder))
        os.environ["IMGCLS_CACHE"] = f"{folder}/cache"
        try:
            manifest = shards.pack(sources.open_source(path), f"{folder}/packed", name="set")
        except ImgclsError as error:
            for line in str(error).splitlines():
                raw(line)
            refused_rightly(case, str(error))
            return
        if case.flip is not None and case.form.startswith("tar"):
            return  # a plain tar has no checksum of its members
        if case.cut is not None:
            assert case.form.startswith("tar"), "only the zeros at a tar's end may be missing"
        assert not case.odd
        packed_rightly(case, manifest, f"{folder}/packed")


def refused_rightly(case: Case, message: str) -> None:
    if case.cut is not None or case.flip is not None:
        assert "set." in message.splitlines()[0]
        return
    bad = [path for path, content in case.files if content in BAD]
    assert bad or case.odd, f"refused without a reason: {message}"
    if case.odd:
        assert "odd" in message or case.odd == "twice"
    else:
        assert any(raw(line).startswith(f"  {'/'.join(path)}: ") for path in bad for line in message.splitlines())


def packed_rightly(case: Case, manifest: Manifest, set_url: str) -> None:
    expected = {"/".join(path): content for path, content in case.files}
    splits = splits_in(part for path, _ in case.files for part in path[:-2])
    for name, content in [*expected.items()]:
        parts = name.split("/")
        if case.linked and parts[-2] == case.files[0][0][-2]:
            expected["/".join([*parts[:-2], case.linked, parts[-1]])] = content
    assert not set(expected.values()) & BAD.keys()
    found = {}
    digests = iter(shards.read_pixel_digests(set_url, manifest).tobytes().hex(" ", 8).split())
    for shard in manifest.shards:
        data = shards.fetch_shard(set_url, shard)
        for path, (content, label) in zip(shard.paths, shards.read_samples(shard, data), strict=True):
            name = raw(path)
            found[name] = content
            assert content == CONTENT[expected[name]]
            assert next(digests) == PIXELS[expected[name]]
            assert raw(manifest.class_names[label]) == nfc(name.split("/")[-2])
            if splits - {"train"}:
                (split,) = splits_in(name.split("/")[:-2])
                assert shard.split == ("test" if split == "val" and "test" not in splits else split)
    assert found.keys() == expected.keys()
    assert len(set(manifest.class_names)) == len(manifest.class_names)
    notes = "\n".join(manifest.notes)
    animated = [name for name, content in expected.items() if content in ANIMATED]
    assert (f"{len(animated)} animated images" in notes) == bool(animated)
    assert all(name in raw(notes.replace("\n", " ")) for name in animated)
    assert (f"{len(case.noise)} files that are not images" in notes) == bool(case.noise)


def splits_in(parts: Iterable[str]) -> set[str]:
    return {SPLITS[part] for part in parts if part in SPLITS}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "decoding_pool", inline)
    monkeypatch.setenv("IMGCLS_CACHE", "")  # restored at the end


def test_what_people_hand_over_is_packed_rightly_or_refused_by_name(in_this_process: None, request: pytest.FixtureRequest):
    full = request.config.getoption("--proof")
    tried = given(cases())(check)
    settings(
        max_examples=2000 if full else 60,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )(tried)()


def test_animated_images_are_counted_and_named(in_this_process: None, tmp_path: Path):
    pets = image_folder(tmp_path / "pets", splits=("train", "test"))
    for name, kind in (("a.png", "PNG"), ("b.webp", "WEBP")):
        image(1).save(pets / "train" / "cat" / name, kind, save_all=True, append_images=[image(2)])
    notes = shards.pack(sources.open_source(pets), str(tmp_path / "packed"), name="pets").notes
    (note,) = [note for note in notes if "animated" in note]
    assert note.startswith("2 animated images: the first frame of each is taken: ")
    assert sorted(note.rsplit(": ", 1)[1].split("; ")) == ["train/cat/a.png", "train/cat/b.webp"]


def test_a_member_larger_than_an_image_can_be_is_refused_by_name_and_never_unpacked(in_this_process: None, tmp_path: Path):
    with tarfile.open(tmp_path / "pets.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for path in image_folder(tmp_path / "pets").rglob("*.png"):
            tar.add(path, path.relative_to(tmp_path))
        bomb = tarfile.TarInfo("pets/cat/bomb.png")
        fields = {"major": "1", "minor": "0", "name": bomb.name, "realsize": str(8 << 40)}
        bomb.pax_headers = {f"GNU.sparse.{key}": value for key, value in fields.items()}
        bomb.size = 512
        tar.addfile(bomb, io.BytesIO(f"1\n{8 << 40}\n0\n".encode().ljust(512, b"\0")))
    with pytest.raises(DataError, match=r"pets/cat/bomb\.png: it has 8,796,093,022,208 bytes, more than an image file has"):
        shards.pack(sources.open_source(tmp_path / "pets.tar"), str(tmp_path / "packed"), name="pets")
