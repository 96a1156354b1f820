"""What each VM of a cloud does for itself, beside a real Ray: the keeper, and the loop that shuts the VM down."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.infra.keeping import FOLDER, line_of
from tests.processes import descendants, title_of, until
from tests.system.autoscaled import workers_of
from tests.system.heads import Head, serving

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("only_in_full")]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def head(only_in_full: None) -> Iterator[Head]:
    with serving(RAY_CLOUD_INSTANCE_ID="i-head") as one:
        yield one


class Metadata:
    """A cloud's metadata service that answers as `mode` says; without one it is down."""

    def __init__(self, cloud: str) -> None:
        self.cloud, self.mode, self.seconds = cloud, "", 60.0
        self.server: ThreadingHTTPServer | None = None
        self.port = 0

    def answer(self, path: str, headers: Any) -> tuple[int, str]:
        """Of AWS with a session of IMDSv2, of GCP with its header; else as real ones refuse."""
        match self.mode, self.cloud, path:
            case "garbage", _, _:
                return 200, "\0\xff{"
            case "none", _, _ if not path.endswith("/token"):
                return (404, "no such page") if self.cloud == "aws" else (200, "FALSE")
            case _, "aws", "/latest/api/token":
                return (200, "session") if headers["X-aws-ec2-metadata-token-ttl-seconds"] else (400, "")
            case "taken", "aws", "/latest/meta-data/spot/instance-action":
                at = datetime.fromtimestamp(time.time() + self.seconds, UTC)
                notice = {"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"}
                return (200, json.dumps(notice)) if headers["X-aws-ec2-metadata-token"] == "session" else (401, "")
            case "taken", "gcp", "/computeMetadata/v1/instance/preempted":
                return (200, "TRUE") if headers["Metadata-Flavor"] == "Google" else (403, "")
        return 500, "not here"

    def turn(self, mode: str) -> None:
        self.mode = mode
        if self.server is None:
            self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
            self.port = self.server.server_port
            threading.Thread(target=self.server.serve_forever, daemon=True).start()
        if mode == "down":
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                if service.mode == "slow":
                    time.sleep(20)
                status, body = service.answer(self.path, self.headers)
                with suppress(OSError):
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(body.encode("latin-1"))

            def log_message(self, format: str, *args: object) -> None: ...

        return Handler


@contextmanager
def second_node(head: Head, instance: str) -> Iterator[None]:
    words = ["--address", head.gcs, "--block", "--num-cpus=1", "--resources", json.dumps({instance: 1})]
    words += ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
    words += ["--object-store-memory=100000000", f"--temp-dir={head.folder}", "--disable-usage-stats"]
    env = os.environ | head.joining | {"RAY_CLOUD_INSTANCE_ID": instance}
    process = subprocess.Popen([BIN / "ray", "start", *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        until(lambda: len(workers_of(head)) == 1, 60, "the second node")
        yield
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


DRAINING = """
import json
import ray
from ray._private.state import state
ray.init(logging_level="ERROR")
print(json.dumps(state.get_draining_nodes()))
"""


def draining(head: Head) -> dict[str, float]:
    """Deadlines, in seconds since the epoch, by node."""
    words = [sys.executable, "-c", DRAINING]
    done = subprocess.run(words, env=os.environ | head.joining, capture_output=True, text=True, timeout=60, check=True)
    return {node: at_ms / 1000 for node, at_ms in json.loads(done.stdout).items()}


@pytest.mark.parametrize(("cloud", "left_s"), [("aws", 60), ("gcp", 30)])
def test_a_notice_drains_this_node_until_its_time_whatever_the_metadata_service_said_before(
    head: Head, tmp_path: Path, cloud: str, left_s: float, proved
):
    service, instance = Metadata(cloud), f"i-{cloud}"
    service.turn("none")
    with second_node(head, instance), (tmp_path / "said").open("w") as said:
        task = f"ray.remote(resources={{'{instance}': 1}})(lambda: time.sleep(200))"
        busy = f"import ray, time; ray.init(); ray.get({task}.remote())"
        head.begin(f"busy-{cloud}", f'{sys.executable} -c "{busy}"')
        wait_for_task(head, f"busy-{cloud}")
        (node,) = workers_of(head)
        words = ["--instance", instance, "--file", tmp_path / "job", "--metadata", f"http://127.0.0.1:{service.port}"]
        keeper = subprocess.Popen(
            [sys.executable, "-m", "cluster.provide.keeper", cloud, *words],
            env=os.environ | head.joining,
            cwd=ROOT,
            stdout=said,
            stderr=said,
        )
        try:
            for mode in ("none", "down", "none", "slow", "garbage", "500", "none"):
                service.turn(mode)
                time.sleep(7)
                assert keeper.poll() is None, f"{mode}: {Path(said.name).read_text()}"
            assert draining(head) == {}
            began = time.time()
            service.turn("taken")
            seconds = until(lambda: "drained" in Path(said.name).read_text(), 15, "the drain")
            deadlines = draining(head)
            assert deadlines.keys() == {node}
            assert began + left_s - 1 <= deadlines[node] <= began + left_s + seconds + 1
            assert keeper.poll() is None
            head.get(f"/api/jobs/busy-{cloud}/stop", b"")
            until(lambda: state_of(head, node)["state"] == "DEAD", 60, "the end of a drained node without work")
            assert state_of(head, node)["state_message"].startswith("Terminated due to preemption")
            proved("a notice of the cloud drains the node", f"{cloud}: {seconds:.1f} s after it, until {left_s} s after it")
        finally:
            keeper.kill()
            keeper.wait()
            service.turn("down")


def wait_for_task(head: Head, name: str) -> None:
    def runs() -> bool:
        tasks = json.loads(head.get("/api/v0/tasks?filter_keys=state&filter_predicates=%3D&filter_values=RUNNING"))
        return tasks["data"]["result"]["total"] > 0

    head.wait_for(name, "RUNNING")
    until(runs, 60, "its task")


def state_of(head: Head, node: str) -> dict[str, Any]:
    rows = json.loads(head.get("/api/v0/nodes"))["data"]["result"]["result"]
    return next(row for row in rows if row["node_id"] == node)


@contextmanager
def vm(head: Head, folder: Path) -> Iterator[Callable[[], int]]:
    """A worker's loop and its keeper, by the very lines of aws.yaml; gives how often it has been shut down.

    Here half an hour is 20 s, and there is no metadata service.
    """
    sudo = folder / "sudo"
    sudo.write_text(f'#!/bin/sh\necho "$@" >> {folder}/sudone\n')
    sudo.chmod(0o755)
    loop = line_of("ray/aws.yaml", "initialization_commands", "shutdown", **{"sleep 60": "sleep 0.5", "-30": "-0.3333"})
    changes = {"/tmp/ray/session_latest/logs": str(folder), "--file": "--metadata http://127.0.0.1:9 --file"}
    keeper = line_of("ray/aws.yaml", "worker_start_ray_commands", "keeper", **changes)
    env = os.environ | head.joining | {"RAY_HEAD_IP": "127.0.0.1", "RAY_CLOUD_INSTANCE_ID": "i-head"}
    env |= {"PATH": f"{folder}:{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    try:
        for line in (keeper, loop):
            subprocess.run(["bash", "-c", line.replace(FOLDER, str(folder))], env=env, cwd=folder, check=True, timeout=10)
            until((folder / "job").exists, 60, "the keeper")  # half an hour is enough for it; 20 s may not be

        def shut_down() -> int:
            said = (folder / "sudone").read_text().splitlines() if (folder / "sudone").exists() else []
            assert set(said) <= {"shutdown -h now"}
            return len(said)

        yield shut_down
    finally:
        end_all_of(folder)


def end_all_of(folder: Path) -> None:
    """They have left this process's family; each has the folder in its title."""
    for path in Path("/proc").glob("[0-9]*"):
        if str(folder) in title_of(int(path.name)) and int(path.name) != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)


def test_a_vm_shuts_itself_down_without_a_job_and_not_with_one_whatever_else_is_dead(head: Head, tmp_path: Path, proved):
    head.begin("working", "sleep 60")  # it does not connect to Ray, as `jobs.pack` does not
    with vm(head, tmp_path) as shut_down:
        head.wait_for("working", "RUNNING")
        os.kill(head.pid, signal.SIGSTOP)  # `ray start --block` would end with the first of its processes that ends
        kill(head, "/monitor.py")
        head.wait_for("working", "SUCCEEDED")
        assert shut_down() == 0, (tmp_path / "keeper.log").read_text()
        until(lambda: shut_down() > 0, 40, "a shutdown without a job")

        command = [sys.executable, "-c", "import ray, time; ray.init(); time.sleep(300)"]  # joins: no record of a job
        joined, began = subprocess.Popen(command, env=os.environ | head.joining, stdout=subprocess.DEVNULL), time.time()
        try:
            until(lambda: (tmp_path / "job").stat().st_mtime > began, 60, "the keeper to see the command")
            before = shut_down()
            time.sleep(25)
            assert shut_down() == before, "it is shut down beside a command"
            kill(head, "/gcs_server")
            until(lambda: shut_down() > before, 60, "a shutdown without a head")
        finally:
            joined.kill()
            joined.wait()
    proved("a VM without a job shuts itself down, and not beside one", "the autoscaler dead; then the head dead", n=2)


def kill(head: Head, word: str) -> None:
    """The one process of the head with this word in its title."""
    (pid,) = (pid for pid in descendants(head.pid) if word in title_of(pid).partition(" --")[0])
    os.kill(pid, signal.SIGKILL)
