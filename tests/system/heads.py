"""A cluster of one node, as `ray start --head` makes it, with whatever is planted in its environment."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.processes import descendants

TOKEN = "a-token-of-this-test-and-of-nobody-else"


@dataclass(frozen=True)
class Head:
    url: str
    gcs: str
    folder: str
    """Of Ray's own files."""

    @property
    def env(self) -> dict[str, str]:
        """Of a client that reaches it by its dashboard."""
        return {"RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": ""}

    def get(self, path: str, body: bytes | None = None) -> str:
        request = urllib.request.Request(self.url + path, data=body, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def begin(self, name: str, entrypoint: str) -> None:
        """A job by Ray's own interface."""
        self.get("/api/jobs/", json.dumps({"entrypoint": entrypoint, "submission_id": name}).encode())

    def wait_for(self, name: str, wanted: str) -> None:
        until = time.monotonic() + 120
        while (status := json.loads(self.get(f"/api/jobs/{name}"))["status"]) != wanted:
            assert time.monotonic() < until, f"{name} is {status}"
            time.sleep(0.2)


@contextmanager
def serving(**planted: str) -> Iterator[Head]:
    gcs, dashboard, agent, client = (_free_port() for _ in range(4))
    folder = tempfile.mkdtemp(prefix="ray")  # sockets lie in it: a short path
    words = {
        "--port": gcs,
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client,
        "--node-ip-address": "127.0.0.1",
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--num-cpus": 2,
        "--object-store-memory": 200_000_000,
        "--temp-dir": folder,
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": f"127.0.0.1:{gcs}"} | planted
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"]
            + [f"{flag}={value}" for flag, value in words.items()],
            env=env,
            stdout=said,
            stderr=said,
        )
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", folder)
        try:
            _wait_until_jobs_are_taken(head, process)
            yield head
        finally:
            for pid in [process.pid, *descendants(process.pid)]:  # its own way takes half a minute
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _wait_until_jobs_are_taken(head: Head, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 90
    while True:
        assert process.poll() is None, "ray start ended"
        with suppress(OSError):
            head.get("/api/jobs/")
            if json.loads(head.get("/api/v0/nodes"))["data"]["result"]["total"]:
                return
        assert time.monotonic() < until, "ray start takes too long"
        time.sleep(0.2)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]
