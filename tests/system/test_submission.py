"""Jobs of a real cluster of one node, with its token and secrets of its own in its environment."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command
from tests.system.heads import TOKEN, Head, serving
from tests.system.relay import relayed

pytestmark = pytest.mark.slow

PLANTED = {"AWS_SECRET_ACCESS_KEY": "planted-on-the-nodes", "AWS_ACCESS_KEY_ID": "planted-key-id"}
MINE = {"AWS_SECRET_ACCESS_KEY": "planted-here", "OTHER_TOKEN": "planted-here-too"}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with serving(**PLANTED) as one:
        yield one


@pytest.fixture(scope="module")
def entry_points(head: Head) -> None:
    """Jobs by the name of what becomes of them, all begun at once."""
    endings = {"zero": "exit 0", "three": "exit 3", "killed": "kill -9 $$", "stopped": "sleep 600", "missing": "exit 127"}
    for name, words in endings.items():
        head.begin(name, f"echo {name} begins; {words}")


@pytest.mark.usefixtures("entry_points")
@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("zero", 0, "zero: succeeded"),
        ("three", 3, "ended with exit code 3"),
        ("killed", 137, "was killed by signal 9 (SIGKILL)"),
        ("missing", 127, "--python PATH"),
        ("stopped", 130, "was stopped"),
    ],
)
def test_the_exit_code_is_the_entry_points(head: Head, run_command: Command, name: str, code: int, says: str):
    def submit(verb: str) -> subprocess.CompletedProcess[str]:
        return run_command("submit", verb, name, "--address", head.url, env=head.env)

    if name == "stopped":
        head.wait_for(name, "RUNNING")
        assert "running" in submit("status").stdout
        assert submit("stop").returncode == 0
    done = submit("follow")
    assert done.returncode == code, done.stderr
    assert f"{name} begins" in done.stdout
    assert says in done.stderr


@pytest.mark.parametrize("silent", [False, True], ids=["reset", "in silence"])
def test_a_log_goes_on_without_loss_when_the_connection_was_cut(
    head: Head, tmp_path: Path, pytestconfig: pytest.Config, silent: bool
):
    cut_s = 20 if pytestconfig.getoption("kills") else 3
    name, count = f"counts-{silent}", 5 * (cut_s + 8)
    here = tmp_path / "it is read along"
    until_read = f"until test $i -ne 4 -o -e {shlex.quote(str(here))}; do sleep 0.1; done"
    head.begin(name, f"for i in $(seq {count}); do {until_read}; echo line $i; sleep 0.2; done")
    head.wait_for(name, "RUNNING")
    with relayed(int(head.url.rpartition(":")[2])) as relay, (tmp_path / "said").open("wb") as said:
        address = f"http://127.0.0.1:{relay.port}"
        following = subprocess.Popen(
            [sys.executable, "-m", "jobs.submit", "follow", name, "--address", address],
            env={**os.environ, **head.env, "PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=subprocess.PIPE,
        )
        while b"line 3\n" not in (tmp_path / "said").read_bytes():
            assert following.poll() is None
            time.sleep(0.1)
        here.touch()
        relay.cut(silent=silent)
        time.sleep(cut_s)
        relay.heal()
        _, told = following.communicate(timeout=120)
    assert following.returncode == 0, told
    lines = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("line ")]
    assert lines == [f"line {i}" for i in range(1, count + 1)]
    assert silent or b"the job goes on" in told


@pytest.mark.parametrize("token", [None, "another"])
def test_a_client_without_the_token_is_refused(head: Head, run_command: Command, token: str | None, tmp_path: Path):
    env = {"RAY_ADDRESS": "", "HOME": str(tmp_path)} | ({"RAY_AUTH_TOKEN": token * 8} if token else {})
    done = run_command("submit", "run", "--address", head.url, "--", "report", "quick", "--storage", tmp_path, env=env)
    assert done.returncode == 3
    assert "wants its token" in done.stderr
    assert "Traceback" not in done.stderr


SMALL = ("global_batch_size=16", "train_fraction=1.0", "length.epochs=1", "input.px=8", "input.stored_px=8")


def test_no_secret_is_anywhere_that_others_see(head: Head, run_command: Command, packed: Path, tmp_path: Path):
    """Neither the client's nor the nodes'."""
    small = [word for change in SMALL for word in ("--set", change)]
    model = ("--set", 'model={"kind": "basic-cnn", "dropout": 0.3}')
    words = ("train", "scratch", "--data", packed, "--storage", tmp_path / "runs", "--id", "sent", *small, *model)
    done = run_command("submit", "run", "--address", head.url, "--job-id", "sent", "--", *words, env=head.env | MINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "--id sent"
        in run_command("submit", "run", "--address", head.url, "--job-id", "again", "--dry-run", "--", *words).stdout
    )
    result = json.loads((tmp_path / "runs" / "sent" / "scratch-seed0" / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["commit"] not in (None, "unknown")  # though there is no git where it ran
    seen: dict[str, str | bytes] = {"said": done.stdout + done.stderr}
    seen |= {path: head.get(path) for path in ("/api/jobs/", "/api/jobs/sent/logs", "/nodes?view=summary")}
    listed = ("jobs", "actors", "runtime_envs", "workers", "tasks")
    seen |= {kind: head.get(f"/api/v0/{kind}?detail=1&limit=1000") for kind in listed}
    for folder in (tmp_path / "runs", Path(head.folder)):
        seen |= {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert any("runtime_env_agent" in name for name in seen)
    for secret in (*PLANTED.values(), *MINE.values(), TOKEN):
        where = [name for name, text in seen.items() if (secret.encode() if isinstance(text, bytes) else secret) in text]  # type: ignore[operator]
        assert not where, f"{secret} in {where}"
    again = run_command("submit", "run", "--address", head.url, "--job-id", "sent", "--", *words, env=head.env)
    assert again.returncode == 2
    assert "has seen a job of this id" in again.stderr


def test_a_job_refuses_a_place_that_goes_away_with_it(head: Head, run_command: Command):
    """Whoever sends it: here Ray's own command, from a checkout."""
    head.begin("plain", f"cd {ROOT} && {sys.executable} -m jobs.suite --data /none")
    done = run_command("submit", "follow", "plain", "--address", head.url, env=head.env)
    assert done.returncode == 2
    assert "--storage runs is relative" in done.stdout


def test_a_driver_resource_that_no_node_has_is_refused(head: Head, run_command: Command):
    words = ("--driver-resource", "driver", "--", "report", "quick", "--storage", "/tmp")
    done = run_command("submit", "run", "--address", head.url, *words, env=head.env)
    assert done.returncode == 2
    assert "no node has it" in done.stderr
    assert "CPU" in done.stderr


def test_workers_that_can_never_run_are_refused_with_what_exists(head: Head, run_command: Command, packed: Path):
    joined = head.env | {"RAY_ADDRESS": head.gcs}
    words = ("suite", "--data", packed, "--set", "global_batch_size=64", "--set", "train_fraction=1.0")
    for wish, says in ((("--gpus-per-worker", "1"), "1 GPUs each"), (("--num-workers", "9"), "9 workers")):
        done = run_command(*words, *wish, env=joined)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr
        assert "this cluster has 1 head (2 CPUs and 0 GPUs)" in done.stderr
