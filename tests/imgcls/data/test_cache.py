import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from imgcls import storage
from imgcls.data import shards
from imgcls.data.cache import check_room, is_cached, missing_shards, open_cache
from imgcls.data.images import DECODER, decode, stored_pixels
from imgcls.errors import DataError, StorageError
from tests.conftest import ROOT
from tests.imgcls.data.test_sources import as_another_user


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
    first, _ = next(shards.read_samples(manifest.shards[0], data))
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


def test_an_image_that_decodes_to_other_pixels_than_when_it_was_packed_never_becomes_a_cache(
    packed: Path, tmp_path: Path, fresh_cache: Path
):
    """As under another Pillow: the shards are whole, the digests of the pixels are of what was seen then."""
    copy = Path(shutil.copytree(packed / "cifar10", tmp_path / "cifar10"))
    digests = np.fromfile(copy / "pixels.u64", "<u8")
    digests[310] ^= 1
    digests.tofile(copy / "pixels.u64")
    manifest = shards.read_manifest(str(copy))
    manifest = manifest.model_copy(update={"pixels_sha256": storage.sha256(digests.tobytes())})
    path = manifest.shards[1].paths[10]
    with pytest.raises(DataError, match=rf"test-00000\.tar: {re.escape(path)} was decoded to other pixels .*{DECODER} here"):
        open_cache(str(copy), manifest, px=8, channels=3)
    assert folders(fresh_cache) == []
    digests[310] ^= 1
    digests.tofile(copy / "pixels.u64")
    open_cache(str(copy), shards.read_manifest(str(copy)), px=8, channels=3)


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_a_cache_is_shared_by_users_and_a_lack_of_rights_is_told_as_that(packed: Path, monkeypatch: pytest.MonkeyPatch):
    """The second user reads what the first one built, and may not build where it cannot write."""
    code = """if True:
        import mmap, os, sys
        from imgcls.data.cache import open_cache
        from imgcls.data.shards import read_manifest
        from imgcls.errors import StorageError
        os.setgid(12345), os.setuid(12345)
        manifest = read_manifest(sys.argv[1])
        print(open_cache(sys.argv[1], manifest, px=8, channels=3, command="another").images.shape)
        try:
            open_cache(sys.argv[1], manifest, px=4, channels=3)
        except StorageError as error:
            print(error)
    """
    before = os.umask(0o022)
    with tempfile.TemporaryDirectory() as shared:
        os.chmod(shared, 0o755)
        url = str(shutil.copytree(packed / "cifar10", Path(shared, "cifar10")))
        monkeypatch.setenv("IMGCLS_CACHE", f"{shared}/cache")
        open_cache(url, shards.read_manifest(url), px=8, channels=3, command="one")
        done = subprocess.run([sys.executable, "-c", code, url], cwd=ROOT, capture_output=True, text=True, check=False)
    os.umask(before)
    assert done.stdout.startswith("(360, 8, 8, 3)\n"), done.stderr
    assert "Permission denied\n  do: let both users write " in done.stdout
    assert "make room" not in done.stdout


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


def test_a_cache_in_anothers_home_is_told_as_a_place_that_cannot_be_written(packed: Path, fresh_cache: Path):
    manifest = shards.read_manifest(str(packed / "cifar10"))
    fresh_cache.mkdir(mode=0)
    with as_another_user():
        assert not is_cached(manifest, px=8, channels=3)
        assert len(missing_shards(manifest)) == len(manifest.shards)
        with pytest.raises(StorageError, match="Permission denied\n  do: name a place that can be written"):
            check_room([(str(packed / "cifar10"), manifest, 8, 3)])
