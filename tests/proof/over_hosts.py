"""A Ray cluster of several hosts with its bucket on another one, as docs/cluster.md starts it, and what is sent to it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from imgcls.records import RunResult
from sandbox.hosts import Hosts, hosts
from tests.conftest import ROOT
from tests.processes import title_of, until
from tests.proof.commands import result_in

HEAD, WORKERS, BUCKET, CLIENT = "h1", ("h2", "h3", "h4"), "h5", "h6"
DASHBOARD = f"http://{Hosts.address(HEAD)}:8265"
TOKEN = "a-token-of-this-test-and-of-nobody-else"
LATENCY_S = 0.02
PYTHON = sys.executable

SERVE = """
import json, sys
from pathlib import Path
from sandbox.s3.proxy import faulty
from sandbox.s3.server import serving
host, folder, latency_s = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
with serving(folder, buckets=("data", "runs"), host=host) as server:
    with faulty(host, server.port, host=host, faults=("stall",), fail=1.0, stall_s=latency_s) as slow:
        print(json.dumps([server.env(), server.env(port=slow.port)]), flush=True)
        sys.stdin.read()
"""
UPLOAD = """
import sys
from pathlib import Path
from imgcls import storage
folder, url = Path(sys.argv[1]), sys.argv[2]
for path in folder.rglob("*"):
    if path.is_file():
        storage.write_bytes(storage.join(url, str(path.relative_to(folder))), path.read_bytes())
"""
FETCH = """
import sys
from pathlib import Path
import fsspec
fs, root, to = fsspec.filesystem("s3"), sys.argv[1], Path(sys.argv[2])
for path in fs.find(root):
    if path.endswith((".json", ".csv", ".txt")):
        file = to / path.removeprefix(root + "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(fs.cat_file(path))
"""
WATCH = """
import re, sys, time
import fsspec
fs, root, seen = fsspec.filesystem("s3", use_listings_cache=False), sys.argv[1], None
while True:
    names = fs.find(root)
    steps = [int(found[1]) for name in names if (found := re.search(r"/step-(\\d+)/committed", name))]
    now = max(steps, default=0), sum(name.endswith("/began.json") for name in names)
    if now != seen:
        seen = now
        print(time.time(), *now, flush=True)
    time.sleep(0.1)
"""
NODES = """
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1] + "/nodes?view=summary", headers={"Authorization": "Bearer " + sys.argv[2]})
summary = json.load(urllib.request.urlopen(request, timeout=10))["data"]["summary"]
print(*[node["raylet"]["nodeManagerAddress"] for node in summary if node["raylet"]["state"] == "ALIVE"])
"""


@dataclass(frozen=True)
class Sent:
    """A command that was sent to the cluster from the client's host; what it says lies in `said`."""

    process: subprocess.Popen[str]
    said: Path

    def wait(self, timeout_s: float = 900) -> str:
        """Its output, when it has ended with 0."""
        code, text = self.process.wait(timeout_s), self.said.read_text()
        assert code == 0, f"exit code {code}\n{text}"
        return text


@dataclass
class Steps:
    """The steps of a run as the bucket shows them: a line each, with the time and the number of attempts."""

    process: subprocess.Popen[str]
    said: Path

    @property
    def seen(self) -> list[tuple[float, int, int]]:
        """(time, step, attempts)"""
        lines = [line.split() for line in self.said.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [(float(at), int(step), int(attempts)) for at, step, attempts in lines]

    def wait_for(self, step: int, *, attempt: int = 1, timeout_s: float = 400) -> float:
        """When so many attempts were on record and this step, or a later one, was committed."""

        def reached() -> list[float]:
            return [at for at, last, attempts in self.seen if last >= step and attempts >= attempt]

        until(lambda: bool(reached()), timeout_s, f"step {step} of attempt {attempt}")
        return reached()[0]


@dataclass
class Site:
    hosts: Hosts
    folder: Path
    near: dict[str, str] = field(default_factory=dict)
    """The environment of a process that uses the bucket."""
    far: dict[str, str] = field(default_factory=dict)
    """The same, with a latency before each answer."""

    @property
    def env(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "IMGCLS_"))}
        ours = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        # What a host writes stays on its own disk.
        return clean | ours | {"RAY_TMPDIR": "/mnt", "IMGCLS_CACHE": "/mnt/cache", "COLUMNS": "200"}

    def serve_bucket(self) -> None:
        with self.log("bucket") as said:
            words = (PYTHON, "-c", SERVE, self.hosts.address(BUCKET), "/mnt/s3", str(LATENCY_S))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
            process = self.hosts.popen(BUCKET, *words, env=self.env, cwd=ROOT, **pipes)
        assert process.stdout is not None
        self.near, self.far = json.loads(process.stdout.readline())

    def upload(self, folder: Path, url: str) -> None:
        self.hosts.run(BUCKET, PYTHON, "-c", UPLOAD, folder, url, env=self.env | self.near, cwd=ROOT)

    def begin_head(self) -> None:
        address = self.hosts.address(HEAD)
        self._ray_start(HEAD, "--head", f"--node-ip-address={address}", f"--dashboard-host={address}", "--num-cpus=0")
        until(lambda: address in self.nodes(), 90, "the head")

    def join(self, *names: str, **env: str) -> None:
        """These hosts become nodes of one CPU each. On a machine that is busy with other things `ray start` may give up."""
        started = dict[str, subprocess.Popen[str]]()

        def joined() -> bool:
            for host in names:
                if host not in started or started[host].poll() is not None:
                    address = f"--address={self.hosts.address(HEAD)}:6379"
                    started[host] = self._ray_start(host, address, "--num-cpus=1", **env)
            return {self.hosts.address(host) for host in names} <= self.nodes()

        until(joined, 240, f"{names} to join")

    def nodes(self) -> set[str]:
        """Addresses of the nodes that are alive."""
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return set(self.hosts.run(CLIENT, PYTHON, "-c", NODES, DASHBOARD, TOKEN, check=False, **quiet).stdout.split())

    def submit(self, *words: str, env: tuple[str, ...] = ()) -> Sent:
        """`jobs.submit run ... -- words`, from a host that is no node."""
        variables = [word for one in env for word in ("--env", one)]
        return self._send("run", "--address", DASHBOARD, *variables, "--", *words, door="submit")

    def doctor(self) -> tuple[int, dict[str, list[dict]]]:
        """Exit code, and the checks by their name."""
        sent = self._send("--address", DASHBOARD, "--json", door="doctor")
        code, text = sent.process.wait(300), sent.said.read_text()
        checks: dict[str, list[dict]] = {}
        for check in json.loads(text[text.index("{\n") :])["checks"]:
            checks.setdefault(check["name"], []).append(check)
        return code, checks

    def _send(self, *words: str, door: str) -> Sent:
        with self.log(door) as said:
            quiet = {"stdout": said, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            process = self.hosts.popen(CLIENT, PYTHON, "-m", f"jobs.{door}", *words, env=self.env, cwd=ROOT, **quiet)
        return Sent(process, Path(said.name))

    def _ray_start(self, host: str, *flags: str, **env: str) -> subprocess.Popen[str]:
        common = ("--block", "--disable-usage-stats", "--object-store-memory=100000000")
        with self.log(host) as said:
            quiet = {"stdout": said, "stderr": said, "stdin": subprocess.DEVNULL}
            words = (Path(PYTHON).with_name("ray"), "start", *flags, *common)
            return self.hosts.popen(host, *words, env=self.env | self.near | env, cwd="/mnt", **quiet)

    def watch(self, run: str) -> Steps:
        """run: ID/NAME."""
        with self.log("steps") as said:
            quiet = {"stdout": said, "stderr": subprocess.DEVNULL}
            words = (PYTHON, "-c", WATCH, f"runs/{run}")
            process = self.hosts.popen(CLIENT, *words, env=self.env | self.near, cwd=ROOT, **quiet)
        return Steps(process, Path(said.name))

    def fetch(self, suite: str) -> Path:
        """The small files of all runs under this id, in a folder of this machine."""
        shutil.rmtree(self.folder / suite, ignore_errors=True)
        words = (PYTHON, "-c", FETCH, f"runs/{suite}", self.folder / suite)
        self.hosts.run(CLIENT, *words, env=self.env | self.near, cwd=ROOT)
        return self.folder / suite

    def result(self, run: str) -> RunResult:
        """run: ID/NAME."""
        suite, _, name = run.partition("/")
        return result_in(self.fetch(suite) / name)

    def hosts_of_workers(self) -> list[str]:
        """Hosts on which a worker of a run is alive."""
        up = [host for host in WORKERS if host in self.hosts.first]
        return [host for host in up if any(map(_is_worker, self.hosts.pids(host)))]

    @contextmanager
    def log(self, name: str):
        with (self.folder / f"{name}-{time.monotonic_ns()}.txt").open("w") as file:
            yield file


def _is_worker(pid: int) -> bool:
    return title_of(pid).startswith("ray::RayTrainWorker")


@contextmanager
def site_of_hosts(folder: Path) -> Iterator[Site]:
    """The hosts, the bucket, a head without CPUs, and three nodes of one CPU each."""
    with hosts(6) as made:
        site = Site(made, folder)
        site.serve_bucket()
        site.begin_head()
        site.join(*WORKERS)
        yield site
