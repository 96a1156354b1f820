"""What tests share: packed sets, made once a session, and one local Ray for all commands that need it."""

import json
import os
import runpy
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from sandbox.s3.server import Server

ROOT = Path(__file__).parent.parent

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="slow tests too: make test-all")
    parser.addoption("--proof", action="store_true", help="full counts of tests/proof")
    parser.addoption("--record", action="store_true", help="with --proof: a record under docs/measurements")
    parser.addoption("--kills", type=int, default=0, help="so many kills of each kind under Ray, in tests/proof")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/system/", "tests/proof/")))  # the longest begin
    asked = config.option.all or config.option.proof or config.option.kills
    for item in () if asked else items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="make test-all"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["IMGCLS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("RAY_ADDRESS", None)
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two synthetic sets, imagenette and cifar10: 300 training and 60 test images each."""
    from imgcls.data import shards
    from imgcls.data.synthetic import synthetic_source

    folder = tmp_path_factory.mktemp("packed")
    for name in ("imagenette", "cifar10"):
        shards.pack(synthetic_source(name, 300), str(folder / name), name=name)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """A real S3 server with the buckets data and runs."""
    from sandbox.s3.server import serving

    with serving(tmp_path_factory.mktemp("s3") / "server", buckets=("data", "runs")) as server:
        yield server


@pytest.fixture(scope="session")
def in_bucket(packed: Path, s3: "Server") -> str:
    """The packed sets in the bucket data, byte for byte: their URL."""
    from imgcls import storage

    with reached_by(s3.env()):
        for path in packed.rglob("*"):
            if path.is_file():
                storage.write_bytes(f"s3://data/packed/{path.relative_to(packed)}", path.read_bytes())
    return "s3://data/packed"


def own_certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1 that no known authority signed, and a server's side of TLS with it."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=store"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*words.split(), *files], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    return certificate, tls


@contextmanager
def reached_by(environment: dict[str, str]) -> Iterator[None]:
    """This process reaches S3 so; fsspec keeps its connections by their arguments, of which we give none."""
    from imgcls.s3 import S3

    before = dict(os.environ)
    os.environ.update(environment)
    S3.clear_instance_cache()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        S3.clear_instance_cache()


RAY_CLUSTER = """
import json, os, sys
from cluster.session import session
with session(verbose=False):
    import ray
    print(json.dumps({**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[dict[str, str]]:
    """The environment of a process that joins this session's one local Ray; that ends when pytest does, however it ends."""
    words = [sys.executable, "-c", RAY_CLUSTER]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("{"), f"no Ray started: {line}"
        yield json.loads(line)
        process.communicate()


def run_in(folder: Path, name: str, *arguments: str | Path, env: dict[str, str] | None = None, timeout_s: float = 300):
    """Runs `python -m jobs.<name> ...` in `folder`, and returns what came of it."""
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **(env or {}), "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture
def run_command(tmp_path: Path) -> Command:
    """`run_in` a fresh folder."""
    return partial(run_in, tmp_path)


@pytest.fixture
def enter_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """As `run_command`, but in this process and so without its imports: for a command that ends before Ray begins."""

    def enter(name: str, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        words, handlers = list(map(str, arguments)), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", [f"{name}.py", *words])
            for key, value in {"COLUMNS": "200", **(env or {})}.items():
                patch.setenv(key, value)
            try:
                with pytest.raises(SystemExit) as ended:
                    runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(words, ended.value.code, said.out, said.err)

    return enter


def image(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def image_folder(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), *, splits: tuple[str, ...] = ("",), count: int = 6
) -> Path:
    """An image folder of noise, `split/class/<i>.png`; the split "" leaves that level out."""
    seed = 0
    for split in splits:
        for class_name in classes:
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for i in range(count):
                seed += 1
                image(seed).save(folder / f"{i}.png")
    return root
