"""Under Ray: what a run does when a worker hangs, has a bug, diverges, or loses its node."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from imgcls.data import shards
from imgcls.data.synthetic import synthetic_source
from imgcls.training.checkpoints import CheckpointStore
from tests.conftest import ROOT
from tests.processes import alive, until
from tests.proof.commands import Running, assert_same, result_in, start, train
from tests.proof.faults import HANGS_ONCE, RAISES, TURNS_NAN, planted
from tests.proof.nodes import go_on_after_a_notice

pytestmark = [pytest.mark.timeout(420), pytest.mark.usefixtures("only_in_full")]


def with_fault(tmp_path: Path, fault: str, **where: int) -> dict[str, str]:
    return {"PYTHONPATH": f"{planted(tmp_path / 'fault', fault, **where)}:{ROOT}"}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_same_exception_twice_at_one_step_stops_the_run_with_its_log(
    num_workers: int, packed: Path, tmp_path: Path, proved
):
    fault = with_fault(tmp_path, RAISES, step=5, rank=num_workers - 1)
    running = train(tmp_path, packed, "--num-workers", str(num_workers), env=fault)
    assert running.process.wait(240) == 1
    result = result_in(running.run)
    assert result.status == "failed"
    assert result.error is not None
    assert "the same exception twice at step 5" in result.error
    assert "ValueError: planted" in result.error
    assert any("ValueError: planted" in line for line in result.log_tail)  # of whichever rank it was
    assert len(list((running.run / "attempts").iterdir())) == 2
    assert CheckpointStore(str(running.run / "checkpoints")).committed()[-1].step == 5
    proved("the same exception twice stops the run", f"{num_workers} workers")


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_step_and_samples(packed: Path, tmp_path: Path, proved):
    fault = with_fault(tmp_path, TURNS_NAN, step=5, rank=1)
    running = train(tmp_path, packed, "--num-workers", "2", env=fault)
    assert running.process.wait(120) == 1
    result = result_in(running.run)
    assert result.error is not None
    assert re.search(r"not finite in epoch 2, step 5, samples \[\d+, ", result.error)
    assert len(list((running.run / "attempts").iterdir())) == 1  # nobody tried again
    assert CheckpointStore(str(running.run / "checkpoints")).committed()[-1].step == 5
    proved("a loss that is not finite on one rank of two", "stopped in one attempt")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_hangs_is_ended_within_the_limit_and_the_run_goes_on(
    num_workers: int, whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    running = train(tmp_path, packed, "--num-workers", str(num_workers), "--hang-timeout-s", "30")
    running.wait_for_step(4)
    before = running.pids("ray::RayTrainWorker")
    running.kill("ray::RayTrainWorker", num_workers - 1, signal.SIGSTOP)
    seconds = until(lambda: not alive(before), 40, "the hung worker to be ended")
    running.wait()
    assert_same(running.run, whole[num_workers])
    proved("a worker under SIGSTOP, --hang-timeout-s 30", f"of {num_workers}: ended after {seconds:.0f} s")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_training_step_that_hangs_is_ended_within_the_limit_and_the_run_goes_on(
    num_workers: int, whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    fault = with_fault(tmp_path, HANGS_ONCE, step=5, rank=num_workers - 1)
    running = train(tmp_path, packed, "--num-workers", str(num_workers), "--hang-timeout-s", "20", env=fault)
    running.wait()
    assert_same(running.run, whole[num_workers])
    ending = json.loads((running.run / f"attempts/00001/rank-{num_workers - 1}.json").read_text())
    assert (ending["error"], ending["step"]) == ("hung: busy with one batch for 18 s", 5)
    assert "time.sleep" in ending["trace"]
    proved("a training step that does not end, --hang-timeout-s 20", f"on one of {num_workers}: ended, the same bits")


@pytest.fixture
def three_nodes(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a command that joins a cluster of a head without CPUs and three nodes of one CPU each."""
    ray = str(Path(sys.executable).parent / "ray")
    # Ray is not imported here: it would keep the token mode of its first import, and this session's own needs another.
    here = _said_by("import ray; print(ray.util.get_node_ip_address())", dict(os.environ))
    port = 20_000 + os.getpid() % 10_000
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = clean | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
        "RAY_ADDRESS": f"{here}:{port}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    said = (tmp_path / "nodes.txt").open("wb")
    quiet = {"env": env, "stdout": said, "stderr": said, "start_new_session": True}
    common = ("--block", "--disable-usage-stats", "--object-store-memory", "100000000")
    ports = ("--dashboard-port", str(port + 1), "--ray-client-server-port", str(port + 2))
    head = subprocess.Popen(
        [ray, "start", "--head", "--node-ip-address", here, "--port", str(port), "--num-cpus", "0", *ports, *common],
        **quiet,  # pyright: ignore[reportCallIssue, reportArgumentType]
    )
    nodes = [head]
    try:
        until(lambda: len(_nodes(env)) == 1, 60, "the head")
        for count in (2, 3, 4):  # one after the other: two at once take each other's socket
            command = [ray, "start", "--address", env["RAY_ADDRESS"], "--num-cpus", "1", *common]
            nodes.append(subprocess.Popen(command, **quiet))  # pyright: ignore[reportCallIssue, reportArgumentType]
            until(lambda count=count: len(_nodes(env)) == count, 60, f"{count} nodes")
        yield {name: env[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(60)


def _nodes(env: dict[str, str]) -> dict[str, dict]:
    code = "import ray, json; ray.init(logging_level='ERROR'); print(json.dumps([n for n in ray.nodes() if n['Alive']]))"
    return {node["NodeID"]: node for node in json.loads(_said_by(code, env) or "[]")}


def _said_by(code: str, env: dict[str, str]) -> str:
    """The last line that this Python prints, or nothing where it fails."""
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[-1] if done.returncode == 0 else ""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_drained_node_brings_a_checkpoint_and_does_not_count_as_a_failure(
    num_workers: int, three_nodes: dict[str, str], whole_of_80: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    where = (tmp_path, packed, three_nodes, whole_of_80)
    committed = go_on_after_a_notice(*where, num_workers=num_workers, below=os.getpid())
    proved("a drained node, --max-failures 0", f"of one of {num_workers} workers: not counted, the same bits; {committed}")


def test_a_killed_command_leaves_nothing_in_a_cluster_that_it_had_joined(
    three_nodes: dict[str, str], whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    running = train(tmp_path, packed, env=three_nodes)
    running.wait_for_step(2)
    worker = json.loads((running.run / "attempts/00001/began.json").read_text())["pid"]
    os.kill(running.process.pid, signal.SIGKILL)
    until(lambda: not alive([worker]), 60, "the worker to be ended")
    seconds = until(lambda: not _left(three_nodes), 60, "no actor and no placement group to be left")
    again = train(tmp_path, packed, env=three_nodes)
    again.wait()
    assert_same(again.run, whole[1])
    proved("a command killed on a joined cluster", f"nothing left after {seconds:.1f} s")


def _left(env: dict[str, str]) -> list[str]:
    """Actors and placement groups of the cluster, but for the one coordinator that Train keeps on each cluster."""
    code = """
import ray; ray.init(logging_level="ERROR")
from ray.util.state import list_actors, list_placement_groups
actors = [a.class_name for a in list_actors() if a.state != "DEAD" and a.class_name != "_AutoscalingCoordinatorActor"]
print(actors + [g.state for g in list_placement_groups() if g.state != "REMOVED"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_of_two_commands_at_one_run_the_second_is_refused_and_takes_over_from_a_killed_one(
    whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    first = train(tmp_path, packed)
    first.wait_for_step(1)
    second = train(tmp_path, packed)
    assert second.process.wait(60) == 3
    assert "another command is at scratch-seed0" in second.said.read_text()
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    third = train(tmp_path, packed)
    third.wait()
    assert_same(third.run, whole[1])
    proved("two commands at one run", "the second refused, the next takes over")


def test_of_two_suites_on_an_empty_cache_one_builds_and_one_waits_and_takes_over_where_the_builder_is_killed(
    tmp_path: Path, proved
):
    shards.pack(synthetic_source("cifar10", 6000), str(tmp_path / "packed" / "cifar10"), name="cifar10")
    cache = tmp_path / "cache"

    def suite(name: str) -> Running:
        flags = ("--recipes", "scratch", "--set", "length.epochs=1", "--set", "train_fraction=0.05")
        return start(tmp_path / name, "suite", *flags, "--data", tmp_path / "packed", env={"IMGCLS_CACHE": str(cache)})

    def building(running: Running) -> bool:
        return any(
            str(cache) in target and "images.u8" in target for pid in running.pids("ray::") for target in open_files(pid)
        )

    both = [suite("one"), suite("other")]
    builder: list[Running] = []

    def found() -> bool:
        builder[:] = [running for running in both if building(running)]
        return bool(builder)

    until(found, 120, "one of them to build")
    assert len(builder) == 1
    os.kill(builder[0].process.pid, signal.SIGKILL)
    (waiting,) = [running for running in both if running is not builder[0]]
    waiting.wait()
    assert len([path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]) == 1
    assert [path for path in cache.iterdir() if path.name.startswith(".")] == []
    killed = suite(builder[0].folder.name)
    killed.wait()
    assert result_in(killed.run).weights_sha256 == result_in(waiting.run).weights_sha256
    proved("two suites on an empty cache, the builder killed", "the other took over")


def open_files(pid: int) -> list[str]:
    found = []
    for link in Path("/proc", str(pid), "fd").glob("*"):
        with suppress(OSError):
            found.append(os.readlink(link))
    return found
