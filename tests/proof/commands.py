"""Commands with a local Ray of their own, and the processes that they bring: to be killed, and to be counted."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from imgcls import records
from imgcls.records import RunResult
from imgcls.training.checkpoints import CheckpointStore
from tests.conftest import ROOT
from tests.processes import descendants, title_of, until

RUN = "scratch-seed0"
TWELVE_STEPS = (
    *("--set", "length.epochs=3", "--set", "length.patience=2", "--set", "train_fraction=1.0"),
    *("--set", "global_batch_size=64", "--set", "input.px=32", "--set", "input.stored_px=32"),
    *("--set", "model.dropout=0.2", "--set", 'augment={"flip": true, "rotate_degrees": 10, "brightness": 0.2}'),
    *("--set", 'schedule={"kind": "one-cycle"}'),
)
"""`scratch`, a ResNet-18, on 270 synthetic images: three epochs of four steps, with all that could come out otherwise."""

EIGHTY_STEPS = (*("--set", "length.epochs=20", "--set", "length.patience=null"), *("--checkpoint-every-n-steps", "1000"))
"""Beside them, makes of them twenty epochs with a checkpoint at the end of each."""


@dataclass(frozen=True)
class Running:
    """A command under way in `folder`; what it says lies in `said`."""

    process: subprocess.Popen[bytes]
    folder: Path
    said: Path
    run: Path

    def wait(self, timeout_s: float = 240) -> str:
        """Its output, when it has ended with 0."""
        code = self.process.wait(timeout_s)
        text = self.said.read_text()
        assert code == 0, f"exit code {code}\n{text}"
        return text

    def wait_for_step(self, step: int, timeout_s: float = 240) -> None:
        """Returns as soon as this step is committed."""
        store = CheckpointStore(str(self.run / "checkpoints"))
        until(lambda: any(one.step >= step for one in store.committed()), timeout_s, f"step {step}")

    def pids(self, title: str = "") -> list[int]:
        """Of its processes, and those that they started, whose title begins so."""
        return [pid for pid in descendants(self.process.pid) if title_of(pid).startswith(title)]

    def kill(self, title: str, index: int = 0, with_signal: int = signal.SIGKILL) -> None:
        found = self.pids(title)
        os.kill(found[index % len(found)], with_signal)


def start(folder: Path, *arguments: str | Path, env: dict[str, str] | None = None, run: str = RUN) -> Running:
    """`python -m jobs.<arguments>` in `folder`; --storage and --id are given as runs and `proof`."""
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / f"said-{time.monotonic_ns()}.txt"
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", f"jobs.{arguments[0]}", *map(str, arguments[1:]), "--storage", "runs", "--id", "proof"],
            cwd=folder,
            env={**os.environ, "RAY_ADDRESS": "", "PYTHONPATH": str(ROOT), **(env or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(process, folder, said, folder / "runs" / "proof" / run)


def train(folder: Path, packed: Path, *flags: str | Path, env: dict[str, str] | None = None) -> Running:
    """The twelve steps, with a checkpoint after each."""
    every = () if "--checkpoint-every-n-steps" in flags else ("--checkpoint-every-n-steps", "1")
    return start(folder, "train", "scratch", "--data", packed, *TWELVE_STEPS, *every, *flags, env=env)


def flags_of(num_workers: int) -> tuple[str, ...]:
    """More workers than this machine has cores have half a CPU each."""
    return "--num-workers", str(num_workers), *(("--cpus-per-worker", "0.5") if num_workers > 2 else ())


def assert_same(run: Path, whole: Path) -> None:
    a, b = result_in(run), result_in(whole)
    assert a.weights_sha256 == b.weights_sha256
    assert (run / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()
    assert (a.best_weights_sha256, a.test, a.val) == (b.best_weights_sha256, b.test, b.val)
    assert a.predictions_sha256 == b.predictions_sha256


def result_in(run: Path) -> RunResult:
    return records.read(RunResult, str(run / "result.json"))
