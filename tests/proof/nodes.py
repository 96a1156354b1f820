"""Nodes under a run: which one a worker is on, taken away at once, and with a notice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.processes import alive, descendants, title_of, until
from tests.proof.commands import EIGHTY_STEPS, assert_same, flags_of, train

WORKER = "ray::RayTrainWorker"
GRACE_S = 30
"""From a spot instance's notice to its end; some clouds give more."""
NOTICED = re.compile(r"a node of this run is about to be taken away, at step (\d+)")


def workers_below(pid: int) -> list[int]:
    """The ranks that train on the nodes that this process, and its own, have started."""
    return [one for one in descendants(pid) if title_of(one).startswith(WORKER)]


def raylet_of(worker: int) -> int:
    return int(Path("/proc", str(worker), "stat").read_text().rpartition(")")[2].split()[1])


def node_of(worker: int) -> str:
    """Ray's id of its node, out of the raylet's command line."""
    words = Path("/proc", str(raylet_of(worker)), "cmdline").read_bytes().decode().split("\0")
    return next(word.partition("=")[2] for word in words if word.startswith("--node_id="))


def kill_node_of(worker: int) -> None:
    """The node and all that runs on it end at once, as when a machine loses its power."""
    raylet = raylet_of(worker)
    while left := alive([raylet, *descendants(raylet)]):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def drain(node: str, env: dict[str, str]) -> None:
    """The notice that this node will be taken away in `GRACE_S`."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "drain-node", "--address", env["RAY_ADDRESS"], "--node-id", node, "--reason-message", "test"]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(GRACE_S)]
    subprocess.run(command, env={**os.environ, **env}, check=True, capture_output=True)


def go_on_after_a_notice(
    folder: Path, packed: Path, env: dict[str, str], whole: dict[int, Path], *, num_workers: int, below: int
) -> str:
    """A run of eighty steps whose node gets the notice: it is no failure, and the bits are those of `whole`.

    below: whose nodes it has, as `workers_below` takes it. Returns when the checkpoint was committed.
    """
    flags = ("--max-failures", "0", *flags_of(num_workers), *EIGHTY_STEPS)
    running = train(folder, packed, *flags, env=env)
    running.wait_for_step(4)
    of_rank_0 = json.loads((running.run / "attempts/00001/began.json").read_text())["pid"]
    drain(node_of(max(workers_below(below), key=lambda pid: pid != of_rank_0)), env)
    began, log = time.monotonic(), running.run / "log.txt"
    until(lambda: NOTICED.search(log.read_text()) is not None, GRACE_S, "the run to hear of the notice")
    running.wait_for_step(step := int(NOTICED.findall(log.read_text())[0]), GRACE_S)
    committed_s = time.monotonic() - began
    assert committed_s < GRACE_S
    assert "begun again from the last checkpoint" in running.wait(420)
    endings = [json.loads(file.read_text())["end"] for file in (running.run / "attempts/00001").glob("rank-*.json")]
    assert "preempted" in endings
    assert len(list((running.run / "attempts").iterdir())) == 2
    assert_same(running.run, whole[num_workers])
    return f"step {step} committed {committed_s:.1f} s after the notice"
