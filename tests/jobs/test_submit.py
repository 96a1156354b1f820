"""`submit` as far as it goes without a cluster: the request that would be sent, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs._door import WRONG_COMMAND
from tests.conftest import Command

ADDRESS = ("--address", "http://head:8265")


def test_the_request_is_the_golden_one(run_command: Command, tmp_path: Path):
    (tmp_path / "mine.toml").write_text("")
    words = ("suite", "--catalogue", "paper", "--data", "s3://b/packed", "--storage", "s3://b/runs", "--recipe", "mine.toml")
    flags = ("--job-id", "a-job", "--env", "NCCL_DEBUG=WARN", "--driver-resource", "driver", "--dry-run")
    done = run_command("submit", "run", *ADDRESS, *flags, "--", *words, env={"IMGCLS_COMMIT": "0123456789ab"})
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
