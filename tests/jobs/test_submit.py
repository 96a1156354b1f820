"""`submit` as far as it goes without a cluster: the request that would be sent, and what is refused."""

import json
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster.send.submission import connected
from imgcls.errors import ClusterError
from jobs._door import MISSING_OR_BROKEN, WRONG_COMMAND
from tests.conftest import Command

ADDRESS = ("--address", "http://head:8265")


def test_the_request_is_the_golden_one(run_command: Command, tmp_path: Path):
    (tmp_path / "mine.toml").write_text("")
    words = ("suite", "--catalogue", "paper", "--data", "s3://b/packed", "--storage", "s3://b/runs", "--recipe", "mine.toml")
    flags = ("--job-id", "a-job", "--env", "NCCL_DEBUG=WARN", "--driver-resource", "driver", "--dry-run")
    verbose = "--verbose"  # anywhere before the command
    done = run_command("submit", verbose, "run", *ADDRESS, *flags, "--", *words, env={"IMGCLS_COMMIT": "0123456789ab"})
    request: dict[str, Any] = json.loads(done.stdout)
    assert request.pop("files") > 50
    assert request.pop("bytes") < 2_000_000
    golden = Path(__file__).parent / "golden" / "request.json"
    assert json.dumps(request, indent=1) + "\n" == golden.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", *ADDRESS), "there is no command to submit"),
        (("run", *ADDRESS, "--", "bench", "readme"), "bench cannot be a job"),
        (("follow", "a-job", *ADDRESS, "--dry-run"), "--dry-run"),
        (("stop", "a-job", *ADDRESS, "--", "suite"), "suite"),
        ((*ADDRESS, "--", "suite"), "run, follow, status, stop"),
    ],
)
def test_a_wrong_submission_is_refused_before_anything_is_sent(
    enter_command: Command, arguments: tuple[str, ...], says: str
):
    done = enter_command("submit", *arguments)
    assert done.returncode == WRONG_COMMAND
    assert says in done.stdout + done.stderr


@pytest.mark.parametrize("flags", [(), ("--verbose",)])
def test_a_traceback_is_shown_where_it_is_asked_for(enter_command: Command, flags: tuple[str, ...]):
    done = enter_command("submit", "run", *ADDRESS, *flags)
    assert ("Traceback" in done.stderr) == bool(flags)


class Answering(BaseHTTPRequestHandler):
    """A server that answers every request with this text, but for those of a job's log."""

    def __init__(self, text: str, *connection: Any) -> None:
        self.text = text
        super().__init__(*connection)

    def do_GET(self) -> None:
        self.send_response(500 if self.path.endswith("/logs") else 200)
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("text", ["<html>", "[]", '{"status": "another program"}'])
def test_another_program_at_the_address_is_called_no_dashboard(enter_command: Command, text: str):
    with HTTPServer(("127.0.0.1", 0), partial(Answering, text)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = enter_command("submit", "status", "a-job", "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == MISSING_OR_BROKEN
    assert "is no Ray dashboard" in done.stderr


def test_an_address_where_nobody_answers_is_named(enter_command: Command):
    done = enter_command("submit", "status", "a-job", "--address", "http://127.0.0.1:1")
    assert done.returncode == MISSING_OR_BROKEN
    assert "no Ray dashboard answers at http://127.0.0.1:1" in done.stderr


def test_a_job_that_is_over_and_whose_log_is_lost_is_not_followed_for_ever(
    enter_command: Command, monkeypatch: pytest.MonkeyPatch
):
    """The node of its command is gone: the dashboard knows the job, and cannot read what it wrote."""
    monkeypatch.setattr("cluster.send.submission.LOST_LOG_S", 0.5)
    head = {"authentication_mode": "disabled", "version": "4", "ray_version": version("ray"), "ray_commit": ""}
    job = {"type": "SUBMISSION", "submission_id": "a-job", "status": "FAILED", "entrypoint": "x", "driver_exit_code": 3}
    with HTTPServer(("127.0.0.1", 0), partial(Answering, json.dumps(head | job))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = enter_command("submit", "follow", "a-job", "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 3
    said = done.stdout + done.stderr
    assert said.index("the job is over, its log does not come") < said.index("the rest of the log cannot be read")


RUNNING = {"authentication_mode": "disabled", "version": "4", "ray_version": version("ray"), "ray_commit": ""} | {
    "type": "SUBMISSION", "submission_id": "a-job", "status": "RUNNING", "entrypoint": "x"
}  # fmt: skip


class Forgetting(Answering):
    """A head that was started anew while the job ran."""

    asked = 0

    def do_GET(self) -> None:
        Forgetting.asked += self.path.endswith("/a-job")
        if Forgetting.asked < 3:
            super().do_GET()
        else:
            self.send_error(404)


def test_a_job_that_the_cluster_has_lost_may_be_given_again(enter_command: Command):
    with HTTPServer(("127.0.0.1", 0), partial(Forgetting, json.dumps(RUNNING))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = enter_command("submit", "follow", "a-job", "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert (done.returncode, "a-job: the cluster has lost it" in done.stdout + done.stderr) == (3, True)


def test_a_follower_that_wants_an_answer_soon_gives_up():
    with HTTPServer(("127.0.0.1", 0), partial(Answering, json.dumps(RUNNING))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with connected(f"http://127.0.0.1:{server.server_port}") as jobs, pytest.raises(ClusterError, match="no connection"):
            jobs.follow("a-job", print, print, give_up_s=0.5)
        server.shutdown()
