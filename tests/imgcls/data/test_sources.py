import io
import os
import resource
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from imgcls.data.archives import members
from imgcls.data.sources import find_source, images_below, open_source
from imgcls.errors import DataError, StorageError
from tests.conftest import image, image_folder


@contextmanager
def as_another_user() -> Iterator[None]:
    """Root may read everything; what others may not is tried as one of them."""
    root = os.getuid() == 0
    if root:
        os.seteuid(12345)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def splits_of(source) -> dict[str, int]:
    found: dict[str, int] = {}
    for sample in source.samples:
        found[sample.split] = found.get(sample.split, 0) + 1
    return found


def tar_of(folder: Path, path: Path) -> Path:
    compression = {".tgz": "gz", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, f"w:{compression}") as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        tar.add(folder, arcname=folder.name)
    return path


def contents(source) -> list[tuple[str, str, bytes]]:
    return sorted((source.class_names[s.label], s.split, s.content.read()) for s in source.samples)


def test_a_folder_of_classes_has_a_test_set_cut_and_says_so(tmp_path: Path):
    source = open_source(image_folder(tmp_path / "pets", count=10))
    assert splits_of(source) == {"train": 16, "test": 4}
    assert any("cut as the test set" in note for note in source.notes)


def test_val_without_test_is_the_test_set(tmp_path: Path):
    source = open_source(image_folder(tmp_path / "pets", splits=("train", "val")))
    assert splits_of(source) == {"train": 12, "test": 12}
    assert any("val is the test set" in note for note in source.notes)


def test_val_beside_test_stays_val(tmp_path: Path):
    source = open_source(image_folder(tmp_path / "pets", splits=("train", "val", "test")))
    assert splits_of(source) == {"train": 12, "val": 12, "test": 12}
    assert any("replaces the recipe's cut" in note for note in source.notes)


def test_a_tar_and_its_folder_hold_the_same_samples(tmp_path: Path):
    folder = image_folder(tmp_path / "pets", splits=("train", "test"))
    expected = sorted((s.label, s.split, s.content.read()) for s in open_source(folder).samples)
    for name in ("pets.tar", "pets.tgz", "pets.tar.bz2", "pets.tar.xz"):
        path = tar_of(folder, tmp_path / name)
        assert sorted((s.label, s.split, s.content.read()) for s in open_source(path).samples) == expected


def test_odd_file_names_and_mixed_formats_are_read(tmp_path: Path):
    for class_name in ("Käse brot", "a.b.c", "日本"):
        folder = tmp_path / "odd" / class_name
        folder.mkdir(parents=True)
        for i, name in enumerate(("one two.JPG", "x.y.z.png", "ü.webp", "B.Bmp", "photo.jpeg", "last.PNG")):
            kind = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "bmp": "BMP"}.get(name.rsplit(".", 1)[1].lower(), "PNG")
            image(i).save(folder / name, kind)
        (folder / ".DS_Store").write_bytes(b"junk")
        (folder / "notes.txt").write_text("none")
    source = open_source(tmp_path / "odd")
    assert source.class_names == ("Käse brot", "a.b.c", "日本")
    assert len(source.samples) == 18
    assert any("6 files that are not images" in note for note in source.notes)


def test_wordnet_ids_are_shown_as_names(tmp_path: Path):
    source = open_source(image_folder(tmp_path / "imagenette", ("n01440764", "n03888257")))
    assert source.class_names == ("tench", "parachute")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: image_folder(root, ("cat",)), "has one class, cat"),
        (lambda root: root.mkdir(), "holds no images"),
        (lambda root: (image_folder(root, splits=("train",)), (root / "test").mkdir()), "the split test is empty"),
        (lambda root: image_folder(root, splits=("train", "other")), "mixes splits and other folders"),
        (lambda root: image_folder(root, splits=("val", "test")), "has no train/ beside test, val"),
        (lambda root: image_folder(root, ("cat/deep", "dog/deep"), splits=("train", "test")), "does not lie in"),
    ],
)
def test_a_folder_that_cannot_be_packed_is_refused_with_the_remedy(tmp_path: Path, make, message: str):
    make(tmp_path / "pets")
    with pytest.raises(DataError, match=message) as error:
        open_source(tmp_path / "pets")
    assert "do:" in str(error.value)


def test_a_class_that_is_only_tested_is_refused(tmp_path: Path):
    root = image_folder(tmp_path / "pets", splits=("train", "test"))
    (root / "test" / "fox").mkdir()
    image(99).save(root / "test" / "fox" / "a.png")
    with pytest.raises(DataError, match="class fox has no training image"):
        open_source(root)


@pytest.mark.parametrize("kind", ["outside", "absolute", "link", "hardlink", "device", "twice"])
def test_a_tar_member_that_is_no_plain_file_inside_is_refused(tmp_path: Path, kind: str):
    member = tarfile.TarInfo({"outside": "../evil.png", "absolute": "/evil.png"}.get(kind, "cat/a.png"))
    member.type = {"link": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
        kind, tarfile.REGTYPE
    )
    member.linkname = "/etc/passwd" if kind in ("link", "hardlink") else ""
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for _ in range(2 if kind == "twice" else 1):
            tar.addfile(member, io.BytesIO())
    with pytest.raises(DataError, match=r"evil\.tar: member"):
        open_source(tmp_path / "evil.tar")


@pytest.mark.parametrize("name", ["pets.tar", "pets.tgz", "pets.tar.xz"])
def test_a_cut_archive_is_named(tmp_path: Path, name: str):
    path = tar_of(image_folder(tmp_path / "pets"), tmp_path / name)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=rf"{name} is damaged, or no archive that can be read"):
        open_source(path)


@pytest.mark.parametrize("name", ["pets.tar", "pets.tgz", "pets.tar.bz2", "pets.tar.xz", "pets.zip"])
def test_wherever_an_archive_was_cut_it_is_told_as_damage(tmp_path: Path, name: str):
    folder = image_folder(tmp_path / "pets", count=3)
    path = zip_of(folder, tmp_path / name) if name.endswith("zip") else tar_of(folder, tmp_path / name)
    whole = path.read_bytes()
    needed = len(whole.rstrip(b"\0")) if name == "pets.tar" else len(whole)  # a tar ends with zeros
    for size in [*range(5, 100, 5), *range(512, needed, max(512, needed // 20)), needed - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"{name} is damaged, or no archive that can be read: .*\n  do: fetch it again"):
            open_source(path)


def test_a_tar_with_a_broken_header_in_its_midst_is_told_as_damage(tmp_path: Path):
    path = tar_of(image_folder(tmp_path / "pets"), tmp_path / "pets.tar")
    with tarfile.open(path) as tar:
        at = tar.getmembers()[-3].offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"pets.tar is damaged, .* at byte {at:,}"):
        open_source(path)


def test_what_is_no_archive_is_told_as_such(tmp_path: Path):
    (tmp_path / "notes.tar").write_text("no tar at all")
    with pytest.raises(DataError, match=r"notes\.tar is damaged, or no archive that can be read"):
        open_source(tmp_path / "notes.tar")
    for nowhere in (tmp_path / ("x" * 300), tmp_path / "a\udce9\n", Path("~nobody/x")):
        with pytest.raises(DataError, match="there is no such folder, tar or zip") as error:
            open_source(nowhere)
        assert str(error.value).encode().count(b"\n") == 0


def test_a_disk_without_room_to_unpack_is_told_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tar_of(image_folder(tmp_path / "pets"), tmp_path / "pets.tgz")
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be unpacked to .*: File too large\n  do: make room there"):
            open_source(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [*(tmp_path / "cache" / "unpacked").iterdir()] == []
    assert len(open_source(path).samples) == 12


def zip_of(folder: Path, path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_and_its_folder_hold_the_same_samples(tmp_path: Path, method: int):
    folder = image_folder(tmp_path / "pets", ("Käse brot", "日本"), splits=("train", "test"))
    assert contents(open_source(zip_of(folder, tmp_path / "pets.zip", method))) == contents(open_source(folder))


def test_a_zip_as_macos_and_windows_write_it_is_read(tmp_path: Path):
    class NoSeek(io.RawIOBase):  # so that sizes follow the data
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            self.data += bytes(data)
            return len(data)

    for unsaid, separator in ((True, "/"), (False, "\\")):
        file = NoSeek()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for class_name in ("caf\u00e9", "dog"):
                for i in range(3):
                    info = zipfile.ZipInfo(f"train{separator}{class_name}{separator}{i}.png")
                    info.create_system = 3 if unsaid else 0
                    archive.writestr(info, (tmp_path / "one.png").read_bytes() if i else png(tmp_path / "one.png"))
                    archive.writestr(f"__MACOSX/train/{class_name}/._{i}.png", b"resource fork")
        data = file.data
        if unsaid:  # UTF-8 that is not said to be UTF-8
            data = b"".join(part[:4] + part[4:].replace(b"\x08\x08", b"\x08\0", 1) for part in _parts(data))
        (tmp_path / "pets.zip").write_bytes(data)
        assert open_source(tmp_path / "pets.zip").class_names == ("caf\u00e9", "dog")


def _parts(data: bytes) -> list[bytes]:
    """A zip cut before each of its headers."""
    marks = [i for i in range(len(data)) if data[i : i + 4] in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06")]
    return [data[i:j] for i, j in zip(marks, [*marks[1:], len(data)], strict=True)]


def png(path: Path) -> bytes:
    image(1).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("../evil.png", {}, "would leave the folder"),
        ("/evil.png", {}, "would leave the folder"),
        ("cat/a.png", {"external_attr": 0o120777 << 16}, "is a link"),
        ("cat/a.png", {"external_attr": 0o010644 << 16}, "is a device or pipe"),
        ("cat/a.png", {"flag_bits": 1}, "is encrypted"),
        ("cat/a.png", {"compress_type": 99}, "is packed by method 99"),
        ("./dog/0.png", {}, "stands there twice"),
        (f"cat/{'x' * 300}.png", {}, "has a name of more than 255 bytes"),
    ],
)
def test_a_zip_member_that_is_no_plain_file_inside_is_refused(tmp_path: Path, name: str, fields: dict, message: str):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("dog/0.png", png(tmp_path / "one.png"))
        info = zipfile.ZipInfo(name)
        archive.writestr(info, b"x")
        for field, value in fields.items():  # written to the list at the end, where the archive is closed
            setattr(info, field, value)
    with pytest.raises(DataError, match=rf"evil\.zip: member .*{message}.*\n  do: unpack it"):
        open_source(tmp_path / "evil.zip")


@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
def test_a_sparse_tar_and_its_folder_hold_the_same_samples(tmp_path: Path, version: str):
    folder = image_folder(tmp_path / "pets")
    for class_name in ("cat", "dog"):
        file = folder / class_name / "1.bmp"
        Image.new("RGB", (200, 200)).save(file)
        subprocess.run(["cp", "--sparse=always", file, file.with_name("2.bmp")], check=True)
    kind = ["--format=gnu"] if version == "gnu" else ["--format=posix", f"--sparse-version={version}"]
    subprocess.run(["tar", "-S", *kind, "-cf", tmp_path / "pets.tar", "-C", tmp_path, "pets"], check=True)
    source = open_source(tmp_path / "pets.tar")
    assert any(b"GNUSparse" in block for block in [(tmp_path / "pets.tar").read_bytes()]) or version in ("gnu", "0.0")
    assert contents(source) == contents(open_source(folder))


def test_sources_are_found_by_name_first_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sources" / "pets-v2").mkdir(parents=True)
    (tmp_path / "data" / "sources" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMGCLS_SOURCES", str(tmp_path / "sources"))
    assert find_source("pets") == tmp_path / "sources" / "pets-v2"
    monkeypatch.delenv("IMGCLS_SOURCES")
    assert find_source("pets") == Path("data/sources/pets")
    assert find_source("cars") is None


def test_a_set_whose_name_goes_on_with_digits_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMGCLS_SOURCES", str(tmp_path))
    for name in ("cifar100", "imagenette2-160", "cifar-100-python"):
        os.mkdir(tmp_path / name)
    assert find_source("cifar10") is None
    assert find_source("imagenette") == tmp_path / "imagenette2-160"
    os.mkdir(tmp_path / "cifar10-32px")
    assert find_source("cifar10") == tmp_path / "cifar10-32px"


def test_the_images_of_a_folder_to_predict_are_those_that_would_be_packed(tmp_path: Path):
    pets = image_folder(tmp_path / "pets")
    (tmp_path / "f").mkdir()
    image(1).save(tmp_path / "f" / "one.png")
    (tmp_path / "f" / "cat").symlink_to(pets / "cat")
    assert {file.parent.name for file in images_below(tmp_path / "f")} == {"f", "cat"}
    assert len(images_below(pets)) == len(open_source(pets).samples)
    (pets / "dog" / "lost.png").symlink_to("nowhere")
    for read in (open_source, images_below):
        with pytest.raises(DataError, match=r"dog/lost\.png cannot be read: No such file"):
            read(pets)


def test_two_sources_that_fit_alike_are_refused_and_an_exact_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMGCLS_SOURCES", str(tmp_path))
    for name in ("pets-a", "pets-b"):
        os.mkdir(tmp_path / name)
    with pytest.raises(DataError, match="several sources"):
        find_source("pets")
    os.mkdir(tmp_path / "pets")
    assert find_source("pets") == tmp_path / "pets"


def test_what_systems_add_beside_the_images_is_no_part_of_a_set(tmp_path: Path):
    folder = image_folder(tmp_path / "pets", splits=("train", "test"))
    for left in ("__MACOSX/train/cat/._0.png", "__MACOSX/test/._0.png", ".cache/val/0.png", "train/cat/Thumbs.db"):
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / left).write_bytes(b"no image")
    (folder / "__MACOSX" / "val").mkdir()
    source = open_source(folder)
    assert splits_of(source) == {"train": 12, "test": 12}
    assert any("4 files that are not images by name, or hidden, were left out" in note for note in source.notes)


@pytest.mark.parametrize("ending", [".jfif", ".JPE"])
def test_a_jpeg_by_another_name_is_read(tmp_path: Path, ending: str):
    folder = image_folder(tmp_path / "pets")
    for file in (folder / "cat").iterdir():
        image(1).save(file.with_suffix(ending), "JPEG")
        file.unlink()
    assert open_source(folder).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "valid", "test"), {"train": 12, "val": 12, "test": 12}),
        (("Training", "Testing"), {"train": 12, "test": 12}),
        (("training", "validation"), {"train": 12, "test": 12}),
    ],
)
def test_splits_are_known_by_their_other_names_and_it_is_said(tmp_path: Path, names: tuple[str, ...], splits: dict):
    source = open_source(image_folder(tmp_path / "pets", splits=names))
    assert splits_of(source) == splits
    assert any("/ is taken as " in note for note in source.notes)
    (tmp_path / "pets" / ("validation" if "valid" in names else "valid")).mkdir()
    with pytest.raises(DataError, match=r"the split valid(ation)? is empty"):
        open_source(tmp_path / "pets")


def test_without_a_training_part_valid_is_a_class_and_two_names_of_one_split_are_refused(tmp_path: Path):
    assert open_source(image_folder(tmp_path / "checks", ("valid", "invalid"))).class_names == ("invalid", "valid")
    with pytest.raises(DataError, match="mixes splits and other folders"):
        open_source(image_folder(tmp_path / "pets", splits=("train", "val", "valid")))


def test_links_in_circles_are_refused_by_name_and_a_folder_may_be_linked_twice(tmp_path: Path):
    folder = image_folder(tmp_path / "pets")
    for name in ("fox", "owl"):
        (folder / name).symlink_to("dog")
    assert open_source(folder).class_names == ("cat", "dog", "fox", "owl")
    (folder / "cat" / "all").symlink_to("..")
    with pytest.raises(DataError, match=r"pets/cat/all is a link to a folder above it") as error:
        open_source(folder)
    assert len(str(error.value)) < 400


def test_class_names_that_differ_in_their_unicode_form_alone_are_one_class(tmp_path: Path):
    folder = image_folder(tmp_path / "food", ("cake", "caf\u00e9"), splits=("train", "test"))
    (folder / "test" / "caf\u00e9").rename(folder / "test" / unicodedata.normalize("NFD", "caf\u00e9"))
    shutil.copytree(folder / "train" / "cake", folder / "train" / unicodedata.normalize("NFD", "caf\u00e9"))
    source = open_source(folder)
    assert source.class_names == ("caf\u00e9", "cake")
    assert [sum(s.label == label for s in source.samples) for label in (0, 1)] == [18, 12]


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_names_reach_records_and_terminals_printable_and_stay_apart(tmp_path: Path, form: str):
    odd = {b"caf\xe9": "caf\\udce9", b"a\nb": "a\\nb", b"\x1b[31mred": "\\x1b[31mred", b"a\\nb": "a\\\\nb"}
    odd |= {"\u202eevil".encode(): "\\u202eevil", "می\u200cخ".encode(): "می\u200cخ"}
    for number, name in enumerate(odd):
        os.makedirs(os.fsencode(tmp_path / "odd") + b"/" + name)
        for i in range(3):
            with open(os.fsencode(tmp_path / "odd") + b"/" + name + b"/%d\xe9.png" % i, "wb") as file:
                image(number * 3 + i).save(file, "PNG")
    source = open_source(tmp_path / "odd" if form == "folder" else tar_of(tmp_path / "odd", tmp_path / "odd.tar"))
    assert sorted(source.class_names) == sorted(odd.values())
    assert all(sample.path.endswith("\\udce9.png") and sample.content.read() for sample in source.samples)


@pytest.mark.parametrize(("count", "images"), [(1, "1 image"), (2, "2 images")])
def test_a_class_too_small_for_its_three_parts_is_refused_by_name_however_large_the_others_are(
    tmp_path: Path, count: int, images: str
):
    image_folder(tmp_path / "pets", ("cat", "owl"), count=9)
    image_folder(tmp_path / "pets", ("dog",), count=count)
    message = f"pets: class dog has {images}; three are needed, one each to train, validate and test\n  do: add images"
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "pets")


def test_where_a_test_set_is_brought_two_training_images_a_class_are_needed_and_with_val_one(tmp_path: Path):
    image_folder(tmp_path / "pets", ("cat", "dog"), splits=("train", "test"), count=2)
    assert splits_of(open_source(tmp_path / "pets")) == {"train": 4, "test": 4}
    (tmp_path / "pets" / "train" / "dog" / "1.png").unlink()
    with pytest.raises(DataError, match="pets: class dog has 1 training image; two are needed, one to validate\n  do: "):
        open_source(tmp_path / "pets")
    image_folder(tmp_path / "pets", ("cat", "dog"), splits=("val",), count=1)
    assert splits_of(open_source(tmp_path / "pets")) == {"train": 3, "val": 2, "test": 4}


def test_two_folders_of_one_class_name_are_refused(tmp_path: Path):
    image_folder(tmp_path / "fish", ("n01440764", "tench", "trout"))
    with pytest.raises(DataError, match="fish: two folders are called tench as classes\n  do: "):
        open_source(tmp_path / "fish")


def test_what_is_no_part_of_a_set_may_be_unreadable_circular_or_dangling(tmp_path: Path):
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        pets = image_folder(Path(root, "pets"))
        (pets / "cat" / ".#notes.txt").symlink_to("me@here.1:2")
        (pets / "cat" / "notes.txt").symlink_to("nowhere")
        (pets / ".x").symlink_to(".")
        for name in (".Trash-0", "lost+found", "__MACOSX"):
            (pets / name).mkdir(mode=0)
        with as_another_user():
            assert len(open_source(pets).samples) == 12
        (pets / "dog" / "all").mkdir(mode=0)
        with as_another_user(), pytest.raises(DataError, match="dog/all cannot be read: Permission denied"):
            open_source(pets)


def test_a_place_of_sources_that_cannot_be_read_is_told_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed" / "inner").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "closed", tmp_path / "closed" / "inner", tmp_path / ("x" * 300), tmp_path / "file"):
        monkeypatch.setenv("IMGCLS_SOURCES", str(place))
        with as_another_user(), pytest.raises(DataError, match=f"{place} is no folder that can be read: .*\n  do: "):
            find_source("pets")


def test_an_archive_that_may_not_be_read_is_not_told_as_damage(tmp_path: Path):
    path = tar_of(image_folder(tmp_path / "pets"), tmp_path / "pets.tar")
    path.chmod(0)
    with as_another_user(), pytest.raises(DataError, match=r"pets\.tar may not be read: Permission denied\n  do: "):
        members(path)


def test_an_empty_zip_is_told_as_empty(tmp_path: Path):
    zipfile.ZipFile(tmp_path / "pets.zip", "w").close()
    with pytest.raises(DataError, match=r"pets\.zip holds no images"):
        open_source(tmp_path / "pets.zip")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_with_a_huge_header_is_told_as_damage(tmp_path: Path, kind: bytes):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 1 << 40
    (tmp_path / "pets.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match=r"pets\.tar is damaged, or no archive that can be read: MemoryError\n  do: "):
        open_source(tmp_path / "pets.tar")
