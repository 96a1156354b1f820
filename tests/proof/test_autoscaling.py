"""Under Ray's own autoscaler: nodes come for a suite and go after it, and a run outlives those that are taken away."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgcls.data import shards
from imgcls.data.synthetic import synthetic_source
from tests.processes import until
from tests.proof.commands import assert_same, start, train
from tests.proof.nodes import go_on_after_a_notice, kill_node_of, node_of, workers_below
from tests.proof.test_kills import at_a_random_moment
from tests.system.autoscaled import autoscaled, node_type, workers_of
from tests.system.heads import Head

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("asked_for")]
SEED = 20261128
MOST = 2


@pytest.fixture(scope="module")
def two_at_most() -> Iterator[Head]:
    with autoscaled({"cpu1": node_type(1, MOST)}, max_workers=MOST) as head:
        yield head


def test_nodes_come_for_the_suite_of_five_which_queues_on_fewer_and_go_after_it(
    two_at_most: Head, tmp_path: Path, only_in_full, proved
):
    for name in ("imagenette", "cifar10"):
        shards.pack(synthetic_source(name), str(tmp_path / "packed" / name), name=name)
    until(lambda: not workers_of(two_at_most), 120, "the head to be alone")
    began, most = time.monotonic(), 0
    running = start(tmp_path, "suite", "--catalogue", "quick", "--data", "packed", env=two_at_most.joining)
    first_s = until(lambda: bool(workers_of(two_at_most)), 120, "the first node")
    while running.process.poll() is None:
        most = max(most, len(workers_of(two_at_most)))
        time.sleep(0.5)
    ended_s = time.monotonic() - began
    running.wait(0)
    empty_s = until(lambda: not workers_of(two_at_most), 120, "the head to be alone")
    rows = json.loads((running.run.parent / "results.json").read_text())["runs"]
    assert [row["status"] for row in rows] == ["finished"] * 5
    assert most == MOST
    seconds = f"{first_s:.1f} s to the first node, {ended_s:.1f} s to the end, {empty_s:.1f} s from there to the head alone"
    proved("suite of five on nodes that an autoscaler adds", f"at most {MOST} nodes of 1 CPU, idle 10 s: {seconds}")


def test_a_run_waits_for_its_node_as_long_as_the_cloud_needs_and_says_so(
    whole: dict[int, Path], packed: Path, tmp_path: Path, only_in_full, proved
):
    """Train itself gives a run up after eleven waits: of a minute by default, of a second here."""
    with autoscaled(
        {"cpu1": node_type(1, 1)},
        max_workers=1,
        provider="tests.system.provider.SlowProvider",
        NODES_NEED_S="60",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="1",
    ) as head:
        running = train(tmp_path, packed, env=head.joining)
        said = running.wait(420)
    assert said.count("its workers wait for nodes; `ray status` on the head says what the autoscaler does") == 1
    assert_same(running.run, whole[1])
    proved("nodes that need 60 s, Train's limit of a start at 1 s", "waited for, the same bits")


def test_a_node_that_is_killed_is_replaced_and_the_run_ends_with_the_same_bits(
    node_kill: int, two_at_most: Head, whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    seed, num_workers = SEED + node_kill, 1 + node_kill % 2
    moment = random.Random(seed)
    running = train(tmp_path, packed, "--num-workers", str(num_workers), env=two_at_most.joining)
    if node_kill % 5 == 0:
        until((running.run / "attempts/00001/began.json").exists, 240, "the first attempt")
        time.sleep(delay_s := moment.uniform(0, 3))
        when = f"{delay_s:.2f} s after its beginning"
    else:
        when = at_a_random_moment(running, moment)
    victim = moment.choice(workers_below(two_at_most.pid))
    node = node_of(victim)
    kill_node_of(victim)
    again_s = until((running.run / "attempts/00002/began.json").exists, 240, "the run to go on")
    running.wait(420)
    until(lambda: node not in workers_of(two_at_most), 60, "Ray to see that the node is gone")
    assert len(list((running.run / "attempts").iterdir())) == 2
    assert_same(running.run, whole[num_workers])
    proved("node killed", f"seed {seed}: of one of {num_workers} workers, {when}; begun again after {again_s:.1f} s")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_node_with_a_notice_is_replaced_and_the_run_ends_with_the_same_bits_and_no_failure(
    num_workers: int, two_at_most: Head, whole_of_80: dict[int, Path], packed: Path, tmp_path: Path, only_in_full, proved
):
    where = (tmp_path, packed, two_at_most.joining, whole_of_80)
    committed = go_on_after_a_notice(*where, num_workers=num_workers, below=two_at_most.pid)
    proved("notice to a node of an autoscaler, --max-failures 0", f"of one of {num_workers} workers: {committed}")
