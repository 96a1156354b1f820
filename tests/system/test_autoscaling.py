"""A cluster without CPUs, to which Ray's own autoscaler can add one node of one CPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.processes import until
from tests.system.autoscaled import autoscaled, node_type, workers_of
from tests.system.heads import Head
from tests.system.test_runs import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_at_most() -> Iterator[Head]:
    with autoscaled({"cpu1": node_type(1, 1)}, max_workers=1, idle_s=2) as head:
        yield head


def test_workers_for_which_no_node_can_be_added_are_refused_and_none_comes(
    run_command: Command, one_at_most: Head, packed: Path, tmp_path: Path
):
    for flags in (("--cpus-per-worker", "4"), ("--num-workers", "2"), ("--gpus-per-worker", "1")):
        done = run_command("train", "basic-cnn", "--data", packed, *TINY, *flags, env=one_at_most.joining)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "can never run: this cluster has 1 head (0 CPUs and 0 GPUs), and can add 1 cpu1" in done.stderr
        assert "do: fewer --num-workers, or a smaller --cpus-per-worker or --gpus-per-worker" in done.stderr
        assert "Traceback" not in done.stderr
    assert not workers_of(one_at_most)
    assert not list(tmp_path.rglob("config.json"))


def test_a_suite_queues_on_the_one_node_that_can_be_added_which_goes_after_it(
    run_command: Command, one_at_most: Head, packed: Path, tmp_path: Path
):
    suite = ("suite", "--recipes", "basic-cnn", "--num-seeds", "2", "--id", "two", *TINY)
    done = run_command(*suite, "--data", packed, env=one_at_most.joining)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "runs/two/results.json").read_text())["runs"]
    assert [row["status"] for row in rows] == ["finished"] * 2
    until(lambda: not workers_of(one_at_most), 60, "the head to be alone")
