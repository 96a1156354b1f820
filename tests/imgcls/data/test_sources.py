import io
import os
import tarfile
from pathlib import Path

import pytest

from imgcls.data.sources import find_source, open_source
from imgcls.errors import DataError
from tests.conftest import image, image_folder


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
    with pytest.raises(DataError, match=name):
        open_source(path)


def test_sources_are_found_by_name_first_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sources" / "pets-v2").mkdir(parents=True)
    (tmp_path / "data" / "sources" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMGCLS_SOURCES", str(tmp_path / "sources"))
    assert find_source("pets") == tmp_path / "sources" / "pets-v2"
    monkeypatch.delenv("IMGCLS_SOURCES")
    assert find_source("pets") == Path("data/sources/pets")
    assert find_source("cars") is None


def test_two_sources_that_fit_alike_are_refused_and_an_exact_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMGCLS_SOURCES", str(tmp_path))
    for name in ("pets-a", "pets-b"):
        os.mkdir(tmp_path / name)
    with pytest.raises(DataError, match="several sources"):
        find_source("pets")
    os.mkdir(tmp_path / "pets")
    assert find_source("pets") == tmp_path / "pets"
