"""A run that is killed again and again, and what it left when."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from imgcls.training.checkpoints import CheckpointStore
from tests.processes import until
from tests.proof.commands import Running
from tests.proof.nodes import WORKER, kill_node_of, workers_below
from tests.system.heads import Head

LOCAL = ("worker", "worker", "controller", "command", "command")
"""What is killed where there are no nodes to kill."""
TITLES = {"worker": WORKER, "controller": "ray::ImplicitFunc"}


@dataclass
class Killed:
    """The run, and a user who gives its command again where that was killed."""

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
        return max((one.step for one in CheckpointStore(str(self.run / "checkpoints")).committed()), default=0)

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
