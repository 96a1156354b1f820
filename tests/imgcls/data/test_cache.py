import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from imgcls import storage
from imgcls.data import shards
from imgcls.data.cache import open_cache
from imgcls.data.images import decode, stored_pixels
from imgcls.errors import DataError, StorageError


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def test_a_row_is_the_decoded_sample_of_the_manifest(packed: Path):
    url, manifest = str(packed / "cifar10"), shards.read_manifest(str(packed / "cifar10"))
    cache = open_cache(url, manifest, px=16, channels=1)
    assert cache.images.shape == (360, 16, 16, 1)
    assert cache.labels.tolist() == [*manifest.labels("train"), *manifest.labels("test")]
    data = shards.fetch_shard(url, manifest.shards[0])
    first, _ = next(shards.read_samples(manifest.shards[0], data, where=url))
    assert np.array_equal(cache.images[0], stored_pixels(decode(first), px=16, channels=1))


def test_a_cache_is_built_once_and_opened_without_the_shards(packed: Path, tmp_path: Path):
    copy = shutil.copytree(packed / "cifar10", tmp_path / "cifar10")
    manifest = shards.read_manifest(str(copy))
    first = open_cache(str(copy), manifest, px=8, channels=3)
    for tar in copy.glob("*.tar"):
        tar.unlink()
    assert np.array_equal(open_cache(str(copy), manifest, px=8, channels=3).images, first.images)


@pytest.mark.parametrize("name", ["images.u8", "labels.i64", "meta.json"])
def test_an_altered_cache_is_built_again(packed: Path, fresh_cache: Path, name: str):
    url, manifest = str(packed / "cifar10"), shards.read_manifest(str(packed / "cifar10"))
    before = open_cache(url, manifest, px=8, channels=3).images.copy()
    path = folders(fresh_cache)[0] / name
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)
    assert np.array_equal(open_cache(url, manifest, px=8, channels=3).images, before)


def test_a_damaged_shard_never_becomes_a_cache(packed: Path, tmp_path: Path, fresh_cache: Path):
    copy = shutil.copytree(packed / "cifar10", tmp_path / "cifar10")
    data = bytearray((copy / "test-00000.tar").read_bytes())
    data[5000] ^= 1
    (copy / "test-00000.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"test-00000\.tar: SHA-256"):
        open_cache(str(copy), shards.read_manifest(str(copy)), px=8, channels=3)
    assert folders(fresh_cache) == []


def test_a_place_that_cannot_be_written_is_named(packed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMGCLS_CACHE", "/proc/nowhere")
    with pytest.raises(StorageError, match="IMGCLS_CACHE"):
        open_cache(str(packed / "cifar10"), shards.read_manifest(str(packed / "cifar10")), px=8, channels=3)


def _open(packed: str) -> int:
    return int(open_cache(packed, shards.read_manifest(packed), px=24, channels=3).images.sum())


def test_two_processes_on_an_empty_cache_build_it_once(packed: Path, fresh_cache: Path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        sums = list(pool.map(_open, [str(packed / "cifar10")] * 2))
    assert sums[0] == sums[1]
    assert len(folders(fresh_cache)) == 1


def test_the_cache_lies_where_the_variable_says_or_in_the_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("IMGCLS_CACHE")
    assert storage.cache_root() == Path.home() / ".cache" / "imgcls"
