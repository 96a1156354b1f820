"""Bytes that were altered where they lie: each one is found by who reads it, and named."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from imgcls import records
from imgcls.data import shards
from imgcls.data.cache import open_cache
from imgcls.errors import ImgclsError
from imgcls.recipe import Length
from imgcls.records import Manifest, SuiteRecord
from imgcls.runs import RunFolder, SuiteFolder
from imgcls.training.fit import fit
from imgcls.training.weights import load_model, read_checkpoint
from imgcls.training.world import World
from tests.proof.alone import TWELVE, config_of

SEED = 20261125


@dataclass(frozen=True)
class Object:
    path: Path
    read: Callable[[], None]
    """As a command reads it; raises, or fails the test, where a byte of it is another."""


@pytest.fixture(scope="module")
def objects(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """All that a run leaves, and all that it was made of."""
    root = tmp_path_factory.mktemp("altered")
    set_folder = Path(shutil.copytree(packed / "cifar10", root / "cifar10"))
    config = config_of(replace(TWELVE, length=Length(epochs=1)), root)
    suite, run = root / "suite", root / "suite" / config.name
    fit(config, data_url=str(root), run_url=str(run), world=World())
    records.write(config, str(run / "config.json"))
    records.write(SuiteRecord(id="suite", data="x"), str(suite / "suite.json"))
    manifest = shards.read_manifest(str(set_folder))
    (checkpoint,) = (run / "checkpoints").iterdir()

    def results() -> None:
        (one,) = SuiteFolder(str(suite)).results().runs
        RunFolder(str(run)).history(one)
        RunFolder(str(run)).predictions(one)

    def all_shards() -> None:
        for shard in manifest.shards:
            shards.fetch_shard(str(set_folder), shard)

    def checkpoints() -> None:
        read_checkpoint(str(checkpoint))

    return [
        *(Object(set_folder / shard.name, all_shards) for shard in manifest.shards),
        Object(set_folder / "manifest.json", lambda: (shards.read_manifest(str(set_folder)), None)[1]),
        Object(set_folder / "pixels.u64", lambda: (shards.read_pixel_digests(str(set_folder), manifest), None)[1]),
        Object(checkpoint / "checkpoint.ckpt", checkpoints),
        Object(checkpoint / "committed.json", checkpoints),
        Object(run / "model.pt", lambda: (load_model(str(run / "model.pt")), None)[1]),
        *(
            Object(path, results)
            for path in (run / "result.json", run / "config.json", run / "history.csv", run / "predictions.npy")
        ),
        Object(suite / "suite.json", results),
    ]


def altered(data: bytes, chance: random.Random) -> bytes:
    """One bit is another, or the end is missing: a little, a block, half of it, all of it."""
    kind = chance.choice(("flip", "flip", "cut"))
    if kind == "flip":
        at = chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    return data[: max(0, len(data) - chance.choice((1, 512, len(data) // 2, chance.randrange(1, len(data)), len(data))))]


def test_every_altered_object_is_found_and_named(objects: list[Object], full: bool, proved):
    chance, count = random.Random(SEED), 960 if full else 96
    for number in range(count):
        one = objects[number % len(objects)]
        whole = one.path.read_bytes()
        one.path.write_bytes(altered(whole, chance))
        try:
            with pytest.raises(ImgclsError) as error:
                one.read()
            assert one.path.name in str(error.value), f"{one.path.name}: {error.value}"
        finally:
            one.path.write_bytes(whole)
        one.read()
    proved("altered objects are found and named", f"seed {SEED}", n=count)


def test_swapped_shards_and_an_edited_manifest_are_found_and_named(objects: list[Object], proved):
    first, second = (one for one in objects[:2])
    assert first.path.suffix == second.path.suffix == ".tar"
    kept = first.path.read_bytes(), second.path.read_bytes()
    first.path.write_bytes(kept[1])
    second.path.write_bytes(kept[0])
    with pytest.raises(ImgclsError, match=first.path.name):
        first.read()
    first.path.write_bytes(kept[0])
    second.path.write_bytes(kept[1])
    path = first.path.parent / "manifest.json"
    whole = path.read_bytes()
    manifest = records.read(Manifest, str(path))
    records.write(manifest.model_copy(update={"class_names": manifest.class_names[::-1]}), str(path))  # sealed again
    with pytest.raises(ImgclsError, match=r"manifest\.json was edited"):
        shards.read_manifest(str(path.parent))
    path.write_bytes(whole)
    proved("swapped shards, an edited manifest", "found and named", n=2)


def test_an_altered_cache_is_found_named_and_built_again(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool, proved
):
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path))
    monkeypatch.setattr("imgcls.data.cache.BLOCK_BYTES", 1 << 16)
    chance, count = random.Random(SEED), 38 if full else 4
    set_url = str(packed / "cifar10")
    manifest = shards.read_manifest(set_url)
    whole = open_cache(set_url, manifest, px=16, channels=3).images.copy()
    for number in range(count):
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        path = folder / ("images.u8", "labels.i64", "meta.json")[number % 3]
        path.write_bytes(altered(path.read_bytes(), chance))
        said: list[str] = []
        again = open_cache(set_url, manifest, px=16, channels=3, command=f"command {number}", say=said.append)
        assert len(said) == 1
        assert folder.name in said[0]
        assert np.array_equal(again.images, whole)
    proved("altered caches are found and built again", f"seed {SEED}", n=count)
