"""Whole commands on a real S3 server that fails: the same bits as in folders, or the reason, in time."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from imgcls import storage
from imgcls.records import SuiteResults, read
from sandbox.s3.proxy import Proxy, faulty
from sandbox.s3.server import READER, Server
from tests.conftest import ROOT, reached_by, run_in
from tests.processes import descendants, title_of

pytestmark = [pytest.mark.timeout(1200)]
TINY = (
    *("--set", "length.epochs=1", "--set", "train_fraction=1.0", "--set", "global_batch_size=32"),
    *("--set", "input.px=32", "--set", "input.stored_px=32"),
)
SMALL = (*TINY, "--set", 'model={"kind": "basic-cnn"}', "--checkpoint-every-n-steps", "1")
BUCKETS = ("--data", "s3://data/packed", "--storage", "s3://runs")


@pytest.fixture
def proxy(s3: Server, in_bucket: str) -> Iterator[Proxy]:
    with faulty(s3.host, s3.port) as found:
        yield found


@pytest.fixture
def session() -> Iterator[Path]:
    """Where the Ray of a command with `RAY_TMPDIR` two folders above keeps its files: other tests start others."""
    with storage.temporary_folder("ray") as folder:
        yield Path(folder, "ray", "session_latest")


def environment(s3: Server, proxy: Proxy, cache: Path) -> dict[str, str]:
    return {**s3.env(port=proxy.port), "RAY_ADDRESS": "", "IMGCLS_CACHE": str(cache)}


def weights(name: str, s3: Server) -> str | None:
    with reached_by(s3.env()):
        return read(SuiteResults, f"s3://runs/{name}/results.json").runs[0].weights_sha256


@pytest.fixture(scope="module")
def whole(s3: Server, in_bucket: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    env = {**s3.env(), "RAY_ADDRESS": "", "IMGCLS_CACHE": str(folder)}
    done = run_in(folder, "train", "scratch", *BUCKETS, "--id", "whole", *SMALL, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    found = weights("whole", s3)
    assert found is not None
    return found


def test_the_suite_on_a_failing_server_has_the_bits_of_one_in_folders_and_no_secret_gets_out(
    asked_for: None, s3: Server, proxy: Proxy, packed: Path, session: Path, tmp_path: Path, proved
):
    """One request in five fails."""
    folders = run_in(
        tmp_path, "suite", "--data", packed, "--storage", tmp_path / "runs", "--id", "s", *TINY, env={"RAY_ADDRESS": ""}
    )
    assert folders.returncode == 0, folders.stdout + folders.stderr
    proxy.fail = 0.2
    env = environment(s3, proxy, tmp_path / "cache") | {"RAY_TMPDIR": str(session.parents[1])}
    secret, seen = s3.env()["AWS_SECRET_ACCESS_KEY"], list[str]()
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.suite", *BUCKETS, "--id", "s", *TINY],
        cwd=tmp_path, env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as suite:  # fmt: skip
        while suite.poll() is None:
            seen += [title for title in map(title_of, descendants(suite.pid)) if secret in title]
            seen += _files_with(secret, *Path(tempfile.gettempdir()).glob("imgcls-*"))  # Tune's and Train's own folders
            time.sleep(0.5)
        assert suite.stdout is not None
        said = suite.stdout.read()
    assert suite.returncode == 0, said
    proxy.fail = 0.0
    inside = read(SuiteResults, str(tmp_path / "runs/s/results.json"))
    with reached_by(s3.env()):
        outside = read(SuiteResults, "s3://runs/s/results.json")
        objects = {name: storage.read_bytes(name) for name in _all("s3://runs/s")}
    assert [(run.name, run.weights_sha256, run.test) for run in outside.runs] == [
        (run.name, run.weights_sha256, run.test) for run in inside.runs
    ]
    retries = sum(run.storage["retries"] for run in outside.runs)
    assert 0 < retries <= len(proxy.injected)
    assert all(run.storage["requests"] > 0 for run in outside.runs)
    assert secret not in said
    assert not seen
    assert not [name for name, data in objects.items() if secret.encode() in data]
    assert not _files_with(secret, tmp_path, session)
    assert _files_with("PL_DISABLE_FORK", session)  # there Ray tells of runtime environments
    proved("the suite on S3, one request in five failing", f"{len(proxy.injected)} faults", n=len(outside.runs))


def test_two_workers_on_a_failing_server_have_the_bits_of_two_in_folders(
    only_in_full: None, s3: Server, proxy: Proxy, packed: Path, tmp_path: Path, proved
):
    command = ("train", "scratch", "--id", "two", *SMALL, "--num-workers", "2", "--cpus-per-worker", "1")
    folders = run_in(
        tmp_path, *command, "--data", packed, "--storage", tmp_path / "runs", env={"RAY_ADDRESS": ""}
    )  # fmt: skip
    assert folders.returncode == 0, folders.stdout + folders.stderr
    proxy.fail = 0.2
    done = run_in(tmp_path, *command, *BUCKETS, env=environment(s3, proxy, tmp_path / "cache"))
    proxy.fail = 0.0
    assert done.returncode == 0, done.stdout + done.stderr
    assert weights("two", s3) == read(SuiteResults, str(tmp_path / "runs/two/results.json")).runs[0].weights_sha256
    proved("two workers on S3, one request in five failing", f"{len(proxy.injected)} faults")


def _files_with(secret: str, *folders: Path) -> list[str]:
    found = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        with suppress(OSError):  # it may have gone since
            if path.is_file() and secret.encode() in path.read_bytes():
                found.append(str(path))
    return found


def _all(url: str) -> Iterator[str]:
    yield from (storage.join(url, name) for name in storage.files(url))
    for name in storage.folders(url):
        yield from _all(storage.join(url, name))


@pytest.mark.parametrize(
    ("name", "request_of"),
    [("checkpoint", r"^PUT .*step-00000004/checkpoint"), ("shard", r"^GET .*cifar10/train-00000\.tar")],
)
def test_a_request_that_is_never_answered_is_given_up_and_the_run_goes_on(
    name: str, request_of: str, only_in_full: None, s3: Server, proxy: Proxy, whole: str, tmp_path: Path, proved
):
    proxy.fail, proxy.faults, proxy.match, proxy.most = 1.0, ("hang",), request_of, 1
    command = ("train", "scratch", *BUCKETS, "--id", f"hang-{name}", *SMALL)
    done = run_in(tmp_path, *command, env=environment(s3, proxy, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(proxy.injected) == 1
    assert weights(f"hang-{name}", s3) == whole
    proved("one request that is never answered", request_of)


def test_a_checkpoint_that_can_never_be_written_ends_the_run_in_time_with_the_last_one_kept(
    only_in_full: None, s3: Server, proxy: Proxy, tmp_path: Path, proved
):
    proxy.fail, proxy.faults, proxy.match = 1.0, ("hang",), r"^PUT .*step-0000000[4-9]/checkpoint"
    began = time.monotonic()
    command = ("train", "scratch", *BUCKETS, "--id", "never", *SMALL, "--max-failures", "0")
    done = run_in(tmp_path, *command, env=environment(s3, proxy, tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"step-00000004/checkpoint\.ckpt cannot be written: no answer within \d+ s", done.stdout)
    assert time.monotonic() - began < 180
    with reached_by(s3.env()):
        assert storage.exists("s3://runs/never/scratch-seed0/checkpoints/step-00000003/committed.json")
    proved("a checkpoint that is never answered", "the run ends, the last one is kept")


@contextmanager
def running(name: str, steps: int, proxy: Proxy, folder: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`scratch` under this id, at the moment when so many steps are committed."""
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.train", "scratch", *BUCKETS, "--id", name, *SMALL],
        cwd=folder, env={**os.environ, **env, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    ) as process:  # fmt: skip
        marker = f"{name}/scratch-seed0/checkpoints/step-{steps:08d}/committed"
        while not [one for one in proxy.passed if marker in one.request]:
            assert process.poll() is None
            time.sleep(0.05)
        yield process


def test_a_killed_command_goes_on_from_the_bucket(
    only_in_full: None, s3: Server, proxy: Proxy, whole: str, tmp_path: Path, proved
):
    env = environment(s3, proxy, tmp_path)
    with running("killed", 4, proxy, tmp_path, env) as process:
        os.kill(process.pid, signal.SIGKILL)
    again = run_in(tmp_path, "train", "scratch", *BUCKETS, *SMALL, "--id", "killed", env=env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert weights("killed", s3) == whole
    proved("a killed command on S3", "goes on to the same bits")


def test_an_outage_of_90_seconds_costs_time_alone(
    only_in_full: None, s3: Server, proxy: Proxy, whole: str, tmp_path: Path, proved
):
    with running("outage", 4, proxy, tmp_path, environment(s3, proxy, tmp_path)) as process:
        proxy.fail, proxy.faults = 1.0, ("hang",)
        time.sleep(90)
        proxy.fail = 0.0
        assert process.wait(300) == 0
    assert weights("outage", s3) == whole
    proved("an outage of 90 s", "the same bits")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user cannot mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def listening() -> Iterator[int]:
    """The port of somebody who accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def wrong(what: str, s3: Server, folder: Path) -> Iterator[tuple[dict[str, str], dict[str, str], str]]:
    """(environment, flags that differ, what is said)."""
    with ExitStack() as stack:
        if what == "endpoint":
            yield s3.env(port=1), {}, "Could not connect"
        elif what == "silent endpoint":
            yield s3.env(port=stack.enter_context(listening())), {}, "no answer within 10 s"
        elif what == "key":
            yield s3.env(("nobody", "x")), {}, "key ID you provided does not exist"
        elif what == "secret":
            yield s3.env((READER[0], "x")), {}, "signature"
        elif what == "data bucket":
            yield s3.env(), {"--data": "s3://nobucket/packed"}, "s3://nobucket/packed cannot be listed"
        elif what == "bucket":
            yield s3.env(), {"--storage": "s3://nobucket"}, "s3://nobucket cannot be listed: The specified bucket"
        elif what == "read-only credential":
            yield s3.env(READER), {}, "s3://runs cannot be written: Access Denied"
        elif what == "full cache disk":
            small = stack.enter_context(mounted(folder / "small", "size=500k"))
            yield {**s3.env(), "IMGCLS_CACHE": str(small)}, {}, "MB of room"
        elif what == "read-only cache":
            unwritable = stack.enter_context(mounted(folder / "unwritable", "ro"))
            yield {**s3.env(), "IMGCLS_CACHE": str(unwritable / "cache")}, {}, "Read-only file system"
        else:
            unwritable = stack.enter_context(mounted(folder / "unwritable", "ro"))
            yield s3.env(), {"--storage": str(unwritable)}, "Read-only file system"


WRONG = ("endpoint", "silent endpoint", "key", "secret", "data bucket", "bucket", "read-only credential", "full cache disk")


@pytest.mark.parametrize("what", [*WRONG, "read-only cache", "read-only mount"])
def test_a_place_that_cannot_serve_is_refused_in_time_and_nothing_is_lost(
    what: str, only_in_full: None, s3: Server, in_bucket: str, tmp_path: Path, proved
):
    with reached_by(s3.env()):
        before = {name: storage.read_bytes(name) for name in _all("s3://runs")}
    with wrong(what, s3, tmp_path) as (env, flags, told):
        places = {"--data": "s3://data/packed", "--storage": "s3://runs"} | flags
        began = time.monotonic()
        done = run_in(
            tmp_path, "train", "scratch", *(word for flag in places.items() for word in flag), *SMALL, "--id", "refused",
            env={"RAY_ADDRESS": "", "IMGCLS_CACHE": str(tmp_path / "cache"), **env},
        )  # fmt: skip
        took = time.monotonic() - began
    assert done.returncode == 3, done.stdout + done.stderr
    assert told in done.stderr
    assert "do: " in done.stderr
    assert "Traceback" not in done.stderr
    assert took < 15
    with reached_by(s3.env()):
        assert {name: storage.read_bytes(name) for name in _all("s3://runs")} == before
    proved("a place that cannot serve is refused within 15 s", what)
