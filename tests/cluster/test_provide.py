"""What a node runs for itself, without a cluster: what it imports, and what it reads from a metadata service."""

import ast
import sys
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.provide import keeper
from tests.conftest import ROOT

FILES = sorted((ROOT / "cluster/provide").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_node_needs_no_more_of_our_code_than_this_room(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            inside = name.startswith("cluster.provide") or name.partition(".")[0] in {*sys.stdlib_module_names, "ray"}
            assert inside or (file.name == "aws.py" and name.partition(".")[0] in ("boto3", "botocore")), name


class Service(HTTPServer):
    """Answers every request with the same, and keeps what it was asked."""

    def __init__(self, status: int, body: bytes) -> None:
        asked = self.asked = list[tuple[str, str, dict[str, str]]]()

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"session")

            def do_GET(self) -> None:
                asked.append((self.command, self.path, dict(self.headers.items())))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()


AT = datetime(2026, 11, 27, 23, 2, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("cloud", "status", "body", "deadline"),
    [
        ("aws", 200, b'{"action": "terminate", "time": "2026-11-27T23:02:00Z"}', AT),
        ("aws", 200, b'{"action": "stop", "time": "2026-11-27T23:02:00Z"}', AT),
        ("aws", 404, b"<html>", None),
        ("gcp", 200, b"TRUE", 30),
        ("gcp", 200, b"TRUE\n", 30),
        ("gcp", 200, b"FALSE", None),
        ("gcp", 200, b"<html>", None),
    ],
)
def test_a_notice_has_a_deadline(
    cloud: str, status: int, body: bytes, deadline: float | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # has another metadata service, or none
    with Service(status, body) as service:
        began = time.time()
        found = keeper.CLOUDS[cloud](service.url)
        service.shutdown()
    if deadline == 30:
        assert began + 30 <= (found or 0) <= time.time() + 30
    else:
        assert found == deadline
    ((_, path, headers),) = service.asked
    wanted = {"aws": ("X-aws-ec2-metadata-token", "session"), "gcp": ("Metadata-Flavor", "Google")}[cloud]
    assert wanted[1] == {name.lower(): value for name, value in headers.items()}[wanted[0].lower()]
    assert path == {"aws": "/latest/meta-data/spot/instance-action", "gcp": "/computeMetadata/v1/instance/preempted"}[cloud]


@pytest.mark.parametrize(("status", "body"), [(200, b"{"), (200, b"[]"), (200, b"{}"), (200, b'{"time": 1}'), (500, b"")])
def test_what_is_no_notice_is_said_once_and_outlived(status: int, body: bytes, capsys: pytest.CaptureFixture[str]):
    keeper.say.cache_clear()
    with Service(status, body) as service:
        for _ in range(2):
            with keeper.outlived("the metadata service"):
                keeper.aws_deadline(service.url)
        service.shutdown()
    assert capsys.readouterr().out.count("the metadata service: ") == 1
