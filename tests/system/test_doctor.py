"""The doctor's door: a table or JSON, and an exit code that a script can use."""

import json

import pytest

from tests.conftest import Command
from tests.system.heads import serving

pytestmark = pytest.mark.slow


def test_a_healthy_cluster_has_no_fault(run_command: Command, ray_cluster: dict[str, str], packed):
    done = run_command("doctor", "--data", packed, "--storage", "runs", "--json", env=ray_cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["healthy"] is True
    assert {"versions", "clock", "data", "storage", "placement", "all-reduce"} <= {one["name"] for one in report["checks"]}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpus-per-worker", "1"), ("placement", "FAULT", "can never run: this cluster has 1 head", "do: fewer")),
        (("--storage", "s3://runs"), ("storage", "FAULT", "AWS_SECRET_ACCESS_KEY")),
        (("--address", "127.0.0.1:1"), ("cluster", "FAULT", "no Ray cluster answers", "do: start it")),
    ],
)
def test_a_fault_ends_with_3_and_says_what_to_do(run_command: Command, ray_cluster: dict[str, str], arguments, says):
    nobody = {"AWS_EC2_METADATA_DISABLED": "true"}
    done = run_command("doctor", *arguments, env=ray_cluster | nobody)
    assert done.returncode == 3, done.stdout + done.stderr
    assert all(one in done.stdout for one in says), done.stdout
    assert "Traceback" not in done.stderr
    assert ray_cluster["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def open_head():
    with serving(RAY_AUTH_MODE="disabled") as head:
        yield head


@pytest.mark.parametrize("form", ["dashboard", "head"])
def test_a_cluster_without_authentication_is_a_fault(run_command: Command, open_head, form: str, tmp_path):
    env = {"RAY_ADDRESS": "", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    done = run_command("doctor", "--address", open_head.url if form == "dashboard" else open_head.gcs, env=env)
    assert done.returncode == 3, done.stdout + done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines() if "FAULT" in line} == {"auth"}, done.stdout
    assert "answers 200 without a token" in done.stdout
    assert "ray get-auth-token --generate" in done.stdout
