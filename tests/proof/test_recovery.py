"""A hundred kills in a row, and an hour with one every five minutes: the same bits, and the seconds that they cost.

One command, and its record: `python -m pytest tests/proof/test_recovery.py --proof --record`
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from imgcls.data import shards
from imgcls.data.synthetic import synthetic_source
from imgcls.training.checkpoints import CheckpointStore
from imgcls.training.weights import read_checkpoint
from tests.processes import until
from tests.proof.commands import Running, assert_same, flags_of, start, train
from tests.proof.conftest import Whole
from tests.proof.nodes import kill_node_of, workers_below
from tests.system.autoscaled import autoscaled, node_type
from tests.system.heads import Head

pytestmark = pytest.mark.usefixtures("asked_for")

SEED = 20261129
STEPS = (*("--set", "length.epochs=40", "--set", "length.patience=null"), *("--checkpoint-every-n-steps", "1"))
"""Beside the twelve: 160 of them, each committed."""
LOCAL, NODES = ("worker", "worker", "controller", "command", "command"), ("node",) * 5
TITLES = {"worker": "ray::RayTrainWorker", "controller": "ray::ImplicitFunc"}
HOUR_S, EVERY_S = 3600, 300
AN_HOUR = ("--set", "train_fraction=1.0", "--set", "length.epochs=1000", "--set", "length.patience=null")
"""`scratch`, an epoch of some minutes."""
spent: dict[str, list[float]] = {}
"""Seconds from each kill to the next step, by what was killed."""


@pytest.fixture(scope="module")
def three_at_most() -> Iterator[Head]:
    with autoscaled({"cpu1": node_type(1, 3)}, max_workers=3) as head:
        yield head


@pytest.fixture(scope="module")
def whole_of_160(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(packed, tmp_path_factory.mktemp("whole-of-160"), *STEPS)


@dataclass
class Killed:
    """A run that is killed again and again, and a user who gives its command again where that was killed."""

    start: Callable[[], Running]
    nodes: Head | None = None
    running: Running = field(init=False)

    def __post_init__(self) -> None:
        self.running = self.start()
        self.wait_for(1)

    @property
    def run(self) -> Path:
        return self.running.run

    def step(self) -> int:
        """The last that is committed."""
        return 0 if (last := CheckpointStore(str(self.run / "checkpoints")).last()) is None else last.step

    def wait_for(self, step: int) -> None:
        until(lambda: self.step() >= step, 240, f"step {step}")

    def kill(self, what: str, chance: random.Random) -> tuple[float, float]:
        """When a later attempt began, and the seconds from the kill to there."""
        attempts, killed_at = len(attempts_of(self.run)), time.time()
        if what == "command":
            os.kill(self.running.process.pid, signal.SIGKILL)
            self.running.process.wait()
            self.running = self.start()
        elif what == "node":
            assert self.nodes is not None
            kill_node_of(chance.choice(workers_below(self.nodes.pid)))
        else:
            self.running.kill(TITLES[what], chance.randrange(3))
        until(lambda: len(attempts_of(self.run)) > attempts, 240, f"the attempt after the kill of a {what}")
        return (began := attempts_of(self.run)[attempts]), began - killed_at


def attempts_of(run: Path) -> list[float]:
    """When each began."""
    return [file.stat().st_mtime for file in sorted((run / "attempts").glob("*/began.json"))]


def commits_of(run: Path) -> dict[int, float]:
    """When each step was committed whose checkpoint is there."""
    times = dict[int, float]()
    for marker in (run / "checkpoints").glob("*/committed.json"):
        with suppress(FileNotFoundError):  # pruned meanwhile
            times[int(marker.parent.name.removeprefix("step-"))] = marker.stat().st_mtime
    return times


@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    killed_run: int, whole_of_160: Whole, packed: Path, tmp_path: Path, request: pytest.FixtureRequest, proved
):
    """Every fourth on nodes that an autoscaler replaces; else a local Ray's worker, controller or command is killed."""
    seed, num_workers, on_nodes = SEED + killed_run, 1 + killed_run % 3, killed_run % 4 == 3
    chance, nodes = random.Random(seed), request.getfixturevalue("three_at_most") if on_nodes else None
    flags = (*flags_of(num_workers), *STEPS, "--max-failures", "1000")
    killed = Killed(lambda: train(tmp_path, packed, *flags, env=nodes and nodes.joining), nodes)
    kinds, told = list(NODES if on_nodes else LOCAL), []
    chance.shuffle(kinds)
    for what in kinds:
        killed.wait_for(killed.step() + chance.randrange(4))
        time.sleep(chance.uniform(0, 0.3))
        step = killed.step()
        assert step < 160, "the run came to its end before it was killed"
        began, seconds = killed.kill(what, chance)
        until(lambda began=began: max(commits_of(killed.run).values()) > began, 240, "the attempt's first step")
        seconds += max(commits_of(killed.run).values()) - began
        told.append(f"seed {seed}: one of {num_workers} workers, after step {step}; the next step after {seconds:.1f} s")
        spent.setdefault(what, []).append(seconds)
        print(what, told[-1])
    killed.running.wait(420)
    assert_same(killed.run, whole_of_160[num_workers])
    for what, detail in zip(kinds, told, strict=True):
        proved(f"{what} killed, in a run that was killed {len(kinds)} times", detail)


def test_what_a_kill_costs(proved):
    if not spent:
        pytest.skip("nothing was killed")
    local = [seconds for what, some in spent.items() if what != "node" for seconds in some]
    for what, some in {**spent, "worker, controller or command": local}.items():
        median, p95 = np.percentile(some, (50, 95))
        figures = f"median {median:.1f} s, p95 {p95:.1f} s, longest {max(some):.1f} s; n = {len(some)}"
        proved(f"from a kill to the next step: {what}", figures)


@pytest.mark.timeout(HOUR_S + 1200)
def test_goodput_of_an_hour_with_a_kill_every_five_minutes(tmp_path: Path, only_in_full, proved):
    """How often a checkpoint is made is the run's own choice.

    Goodput: what the steps that count take where nothing comes between, by the commits of the same hour, without the
    checkpoints' part of it; over the hour.
    """
    shards.pack(synthetic_source("cifar10", 20_000), str(tmp_path / "packed" / "cifar10"), name="cifar10")
    killed = Killed(
        lambda: start(tmp_path, "train", "scratch", "--data", "packed", *AN_HOUR, *flags_of(2), "--max-failures", "1000")
    )
    chance, seen = random.Random(SEED), set[tuple[float, int]]()
    began = next_kill = time.time()
    while time.time() < began + HOUR_S:
        seen |= {(at, step) for step, at in commits_of(killed.run).items()}
        if time.time() > next_kill + EVERY_S:
            next_kill += EVERY_S
            what = chance.choice(LOCAL)
            spent_s = killed.kill(what, chance)[1]
            print(f"{what} killed, begun again after {spent_s:.1f} s")
        time.sleep(0.5)
    last = read_checkpoint(str(max((killed.run / "checkpoints").glob("*/committed.json")).parent))
    killed.running.process.send_signal(signal.SIGINT)
    assert killed.running.process.wait(120) == 130
    (state,) = (state for name, state in last["callbacks"].items() if name.startswith("Recorder"))
    checkpoints = state["seconds"]["checkpoint"] / state["seconds"]["fit"]
    attempts, commits = attempts_of(killed.run), sorted(seen)
    clean = [
        (at - before, step - earlier)
        for (before, earlier), (at, step) in pairwise(commits)
        if step > earlier and not any(before < attempt < at for attempt in attempts)
    ]
    pace_s = sum(seconds for seconds, _ in clean) / sum(steps for _, steps in clean)
    (first_at, first), (last_at, step) = commits[0], commits[-1]
    goodput = (step - first) * pace_s * (1 - checkpoints) / (last_at - first_at)
    assert len(attempts) == 1 + HOUR_S // EVERY_S
    proved(
        f"an hour with a kill every {EVERY_S / 60:.0f} minutes: goodput {goodput:.1%}",
        f"seed {SEED}: {len(attempts) - 1} kills of worker, controller or command, two workers; {step - first} steps in "
        f"{last_at - first_at:.0f} s, at {pace_s:.3f} s each where nothing came between; {len(clean)} checkpoints in whole "
        f"stretches, {checkpoints:.2%} of the time",
    )
