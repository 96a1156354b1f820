"""A cluster of one node, as `ray start --head` makes it, with whatever is planted in its environment."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tests.processes import alive, descendants

TOKEN = "a-token-of-this-test-and-of-nobody-else"


@dataclass(frozen=True)
class Head:
    url: str
    gcs: str
    folder: str
    """Of Ray's own files."""
    pid: int = 0

    @property
    def env(self) -> dict[str, str]:
        """Of a client that reaches it by its dashboard."""
        return {"RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": ""}

    @property
    def joining(self) -> dict[str, str]:
        """The environment of a command that joins it."""
        return {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": self.gcs}

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
    """A head with two CPUs."""
    with started(head_to_be(), {"--num-cpus": 2}, planted) as head:
        yield head


def head_to_be() -> Head:
    """One that is not started yet: its ports and its folder."""
    gcs, dashboard = _free_port(), _free_port()
    # Sockets lie in the folder: a short path.
    return Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", tempfile.mkdtemp(prefix="ray"))


@contextmanager
def started(head: Head, words: Mapping[str, object], planted: Mapping[str, str]) -> Iterator[Head]:
    """This head with these words more, and with all processes that it starts; none of them is left afterwards."""
    words = {
        "--port": head.gcs.rpartition(":")[2],
        "--dashboard-port": head.url.rpartition(":")[2],
        "--dashboard-agent-listen-port": _free_port(),
        "--ray-client-server-port": _free_port(),
        "--node-ip-address": "127.0.0.1",
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--object-store-memory": 200_000_000,
        "--temp-dir": head.folder,
        **words,
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"]
            + [f"{flag}={value}" for flag, value in words.items()],
            env={**clean, **head.joining, **planted},
            stdout=said,
            stderr=said,
            start_new_session=True,  # by which its processes are found, whoever has ended
        )
        try:
            _wait_until_jobs_are_taken(head, process)
            yield replace(head, pid=process.pid)
        finally:
            while left := alive([process.pid, *descendants(process.pid)]):  # its own way takes half a minute
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.poll()
            process.wait()
            shutil.rmtree(head.folder, ignore_errors=True)


def _wait_until_jobs_are_taken(head: Head, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 180
    while True:
        assert process.poll() is None, "ray start ended"
        with suppress(OSError):
            head.get("/api/jobs/")
            if json.loads(head.get("/api/v0/nodes"))["data"]["result"]["total"]:
                return
        assert time.monotonic() < until, "ray start takes too long"
        time.sleep(0.2)


def _free_port() -> int:
    """Below those that the system gives to connections: nobody has it when Ray, seconds later, wants it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
