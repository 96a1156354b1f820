import json
import shutil
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest

from imgcls.data import images, shards
from imgcls.data.images import decode, pixels_digest
from imgcls.data.sources import open_source
from imgcls.errors import DataError
from imgcls.records import Shard
from tests.conftest import image, image_folder


def pack(folder: Path, to: Path, max_bad: int = 0):
    return shards.pack(open_source(folder), str(to), name=to.name, max_bad=max_bad)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "pets", ("cat", "dog", "fox"), splits=("train", "test"))


def test_what_is_packed_is_read_back_byte_for_byte(pets: Path, tmp_path: Path):
    manifest = pack(pets, tmp_path / "packed")
    found = {}
    for shard in manifest.shards:
        data = shards.fetch_shard(str(tmp_path / "packed"), shard)
        for path, (content, label) in zip(shard.paths, shards.read_samples(shard, data), strict=True):
            found[path] = content
            assert manifest.class_names[label] == Path(path).parent.name
    assert found == {p.relative_to(pets).as_posix(): p.read_bytes() for p in pets.rglob("*.png")}


def test_packing_twice_gives_the_same_bytes(pets: Path, tmp_path: Path):
    pack(pets, tmp_path / "one" / "pets")
    pack(pets, tmp_path / "two" / "pets")
    assert files_of(tmp_path / "one" / "pets") == files_of(tmp_path / "two" / "pets")


def test_a_strangers_webdataset_pipeline_reads_the_shards(pets: Path, tmp_path: Path):
    import webdataset

    manifest = pack(pets, tmp_path / "packed")
    urls = [str(tmp_path / "packed" / shard.name) for shard in manifest.shards if shard.split == "train"]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    samples = list(pipeline.decode("pil").to_tuple("png", "cls"))
    assert len(samples) == 18
    assert [label for _, label in samples] == list(manifest.labels("train"))
    assert samples[0][0].size == (40, 30)


def test_an_interrupted_pack_goes_on_and_ends_with_the_same_bytes(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "SHARD_SAMPLES", 5)
    pack(pets, tmp_path / "whole" / "pets")
    packed_one, made = shards._pack_shard, []

    def stops_at_the_third(set_url: str, name: str, *rest: object):
        made.append(name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return packed_one(set_url, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "_pack_shard", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack(pets, tmp_path / "packed" / "pets")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        shards.read_manifest(str(tmp_path / "packed" / "pets"))
    made.append("resumed")
    pack(pets, tmp_path / "packed" / "pets")
    assert made[made.index("resumed") + 1] == made[2]
    assert files_of(tmp_path / "packed" / "pets") == files_of(tmp_path / "whole" / "pets")


def test_broken_images_are_refused_by_name_or_left_out_by_number(pets: Path, tmp_path: Path):
    (pets / "train" / "cat" / "torn.jpg").write_bytes(b"\xff\xd8\xff no more")
    with pytest.raises(DataError, match=r"train/cat/torn\.jpg") as error:
        pack(pets, tmp_path / "packed")
    assert "--max-bad 1" in str(error.value)
    manifest = pack(pets, tmp_path / "packed", max_bad=1)
    assert "left out, no image: train/cat/torn.jpg" in manifest.notes
    assert len(manifest.labels("train")) == 18


def test_a_set_stays_whole_until_another_can_take_its_place(pets: Path, tmp_path: Path):
    first = pack(pets, tmp_path / "packed")
    (pets / "train" / "cat" / "torn.jpg").write_bytes(b"torn")
    with pytest.raises(DataError, match="torn"):
        pack(pets, tmp_path / "packed")
    assert shards.verify(str(tmp_path / "packed")) == first
    second = pack(pets, tmp_path / "packed", max_bad=1)
    assert shards.verify(str(tmp_path / "packed")) == second != first
    assert not (tmp_path / "packed" / ".packing").exists()


def test_other_files_beside_a_set_stay_when_it_is_packed(pets: Path, tmp_path: Path):
    mine = tmp_path / "packed" / "pets.tar"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    (tmp_path / "packed" / "train-00007.tar").write_bytes(b"a shard of an earlier set")
    pack(pets, tmp_path / "packed")
    assert mine.read_bytes() == b"mine"
    assert not (tmp_path / "packed" / "train-00007.tar").exists()


def test_a_set_is_read_whose_files_are_links(pets: Path, tmp_path: Path):
    manifest = pack(pets, tmp_path / "packed")
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "packed").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    shards.check_shards(str(tmp_path / "linked"), manifest)


def test_of_large_photos_a_few_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in ("train/cat", "train/dog", "test/cat"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for number in range(16):
            image(number, (700, 500)).save(tmp_path / "photos" / folder / f"{number}.bmp")  # a megabyte
    manifest, ahead = pack(tmp_path / "photos", tmp_path / "packed"), list[int]()

    def counted(shard: Shard, data: bytes):
        for content, label in read_samples(shard, data):
            ahead.append(len(content))
            yield content, label

    read_samples = shards.read_samples
    monkeypatch.setattr(shards, "read_samples", counted)
    monkeypatch.setattr(images, "usable_cpus", lambda: 1)
    read = shards.decoded_images(str(tmp_path / "packed"), manifest, attrgetter("size"))
    assert next(read) == (700, 500)
    assert sum(ahead) <= (images.AHEAD + 1) * (4 << 20) < sum(shard.num_bytes for shard in manifest.shards)
    assert len([*read]) == 47


def test_the_same_image_in_two_splits_is_reported(pets: Path, tmp_path: Path):
    shutil.copy(pets / "train" / "cat" / "0.png", pets / "test" / "dog" / "leak.png")
    notes = pack(pets, tmp_path / "packed").notes
    assert any(note.startswith("LEAK: 1 images stand in two splits") and "leak.png" in note for note in notes)


def test_pixel_digests_are_those_of_the_decoded_images(pets: Path, tmp_path: Path):
    manifest = pack(pets, tmp_path / "packed")
    digests = shards.read_pixel_digests(str(tmp_path / "packed"), manifest)
    paths = [path for shard in manifest.shards for path in shard.paths]
    expected = [pixels_digest(decode((pets / path).read_bytes())) for path in paths]
    assert digests.tobytes() == b"".join(expected)


def test_a_changed_source_is_packed_anew(pets: Path, tmp_path: Path):
    before = pack(pets, tmp_path / "packed")
    image(777).save(pets / "train" / "cat" / "0.png")
    assert pack(pets, tmp_path / "packed").digest != before.digest


def test_verify_passes_a_whole_set_and_classes_are_mixed(packed: Path):
    manifest = shards.verify(str(packed / "cifar10"))
    assert manifest.synthetic
    assert len(set(manifest.labels("train")[:20])) > 4


def flip(path: Path, at: int = 700) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda root: flip(root / "train-00000.tar"), r"train-00000\.tar: SHA-256"),
        (lambda root: (root / "train-00000.tar").unlink(), r"train-00000\.tar does not exist"),
        (lambda root: flip(root / "pixels.u64", 5), r"pixels\.u64"),
        (lambda root: (root / "manifest.json").write_bytes(b"{}"), r"manifest\.json was altered, or is no record"),
        (lambda root: flip(root / "manifest.json"), r"manifest\.json (was altered|is not a Manifest)"),
        (
            lambda root: (root / "test-00000.tar").write_bytes((root / "test-00000.tar").read_bytes()[:-512]),
            r"test-00000\.tar: SHA-256 is .* \(286,208 bytes\), .* \(286,720 bytes\) was written",
        ),
    ],
)
def test_what_was_altered_is_named(packed: Path, tmp_path: Path, harm, named: str):
    copy = shutil.copytree(packed / "cifar10", tmp_path / "cifar10")
    harm(copy)
    with pytest.raises(DataError, match=named):
        shards.verify(str(copy))


def test_an_edited_manifest_is_refused(packed: Path, tmp_path: Path):
    copy = shutil.copytree(packed / "cifar10", tmp_path / "cifar10")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["labels"][0] = 9 - manifest["shards"][0]["labels"][0]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json was altered, or is no record"):
        shards.read_manifest(str(copy))


def test_synthetic_sets_are_functions_of_their_arguments(packed: Path, tmp_path: Path):
    from imgcls.data.synthetic import synthetic_source

    again = shards.pack(synthetic_source("cifar10", 300), str(tmp_path / "cifar10"), name="cifar10")
    assert again == shards.read_manifest(str(packed / "cifar10"))
    assert np.bincount(again.labels("train")).tolist() == [30] * 10


def test_a_file_that_cannot_be_read_for_a_while_is_no_bad_image(pets: Path, tmp_path: Path):
    source, file = open_source(pets), pets / "train" / "cat" / "0.png"
    file.rename(tmp_path / "away.png")
    with pytest.raises(DataError, match=r"train/cat/0\.png cannot be read: .*No such file.*\n  do: ") as error:
        shards.pack(source, str(tmp_path / "packed"), name="pets", max_bad=5)
    assert "no image" not in str(error.value)
    (tmp_path / "away.png").rename(file)
    assert len(shards.pack(source, str(tmp_path / "packed"), name="pets").labels("train")) == 18
