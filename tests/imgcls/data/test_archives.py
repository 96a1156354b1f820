import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from imgcls.data.archives import Archive, download
from imgcls.data.sources import open_source
from imgcls.errors import DataError, NoSourceError

CONTENT = bytes(range(256)) * 20000


class Server(BaseHTTPRequestHandler):
    cut_at: int | None = None
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        Server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        body = CONTENT[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: Server.cut_at] if Server.cut_at else body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    Server.cut_at, Server.ranges = None, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def archive(server: str, content: bytes = CONTENT) -> Archive:
    return Archive(f"{server}/pets.tgz", "sha256", hashlib.sha256(content).hexdigest())


def test_a_download_that_was_cut_goes_on_where_it_stopped(server: str, tmp_path: Path):
    Server.cut_at = 1_000_000
    with pytest.raises(DataError, match="the connection ended at 1,000,000 of 5,120,000 bytes") as cut:
        download(archive(server), tmp_path)
    assert cut.type is DataError, "there is a source: synthetic images do not take its place"
    Server.cut_at = None
    seen: list[tuple[int, int]] = []
    path = download(archive(server), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert Server.ranges == [None, "bytes=1000000-"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_what_is_there_is_not_fetched_again(server: str, tmp_path: Path):
    download(archive(server), tmp_path)
    download(archive(server), tmp_path)
    assert len(Server.ranges) == 1


def test_other_bytes_than_the_official_ones_are_refused_and_deleted(server: str, tmp_path: Path):
    with pytest.raises(DataError, match="the official one is"):
        download(archive(server, b"other"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_does_not_answer_is_named(tmp_path: Path):
    with pytest.raises(NoSourceError, match="cannot be fetched"):
        download(Archive("http://127.0.0.1:9/pets.tgz", "md5", ""), tmp_path)


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes strings and arrays as CIFAR-10's own pickles have them."""

    def save_string(self, value: bytes | str) -> None:
        data = value if isinstance(value, bytes) else value.encode()
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)  # type: ignore[attr-defined]

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_string, str: save_string}  # type: ignore[attr-defined]


def pickled(content: object) -> bytes:
    file = io.BytesIO()
    Python2(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")  # as NumPy 1 called it


def cifar_archive(path: Path, *, bad: object = None, drop: str = "") -> Path:
    rng = np.random.default_rng(0)
    parts = {f"data_batch_{i}": 20 for i in range(1, 6)} | {"test_batch": 20}
    with tarfile.open(path, "w:gz") as tar:
        members: dict[str, object] = {"batches.meta": {"label_names": ["airplane", "automobile"]}}
        for name, count in parts.items():
            data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            data = np.asfortranarray(data) if name == "data_batch_2" else data
            files = [f"{name}_{i}.png" for i in range(count)]
            members[name] = {"data": data, "labels": [i % 2 for i in range(count)], "filenames": files}
        if bad is not None:
            members["data_batch_3"] = bad
        for name, content in members.items():
            if name == drop:
                continue
            data = pickled(content)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_cifars_own_archive_is_read(tmp_path: Path):
    source = open_source(cifar_archive(tmp_path / "cifar-10-python.tar.gz"))
    assert source.class_names == ("airplane", "automobile")
    assert [sum(s.split == split for s in source.samples) for split in ("train", "test")] == [100, 20]
    assert source.samples[0].path == "train/airplane/data_batch_1_0.png"
    drawn = np.random.default_rng(0).integers(0, 256, (120, 3, 32, 32), dtype=np.uint8).transpose(0, 2, 3, 1)
    for sample, pixels in zip(source.samples, drawn, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.content.read()))), pixels)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/imgcls-evil",)


def test_a_pickle_that_wants_more_than_arrays_and_strings_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"it asks for (posix|nt|os)\.system"):
        open_source(cifar_archive(tmp_path / "evil.tar.gz", bad=Evil()))
    assert not Path("/tmp/imgcls-evil").exists()


def test_an_archive_that_lacks_a_part_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="lacks data_batch_2"):
        open_source(cifar_archive(tmp_path / "cut.tar.gz", drop="data_batch_2"))


def test_a_cifar_archive_of_other_shapes_is_told_as_damage(tmp_path: Path):
    odd = {"data": np.zeros((3, 5), dtype=np.uint8), "labels": [0, 7, 0], "filenames": ["a", "b", "c"]}
    for number, bad in enumerate((odd, {"data": 1}, {}, [], {**odd, "data": np.zeros((3, 3072), dtype=np.uint8)})):
        path = cifar_archive(tmp_path / f"{number}.tar.gz", bad=bad)
        with pytest.raises(DataError, match=rf"{number}\.tar\.gz is damaged, or no archive that can be read"):
            open_source(path)
