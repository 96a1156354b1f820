"""Commands that are measured: each a process of its own, as a user gives it."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from imgcls.errors import DataError
from tests.speed.prepared import ROOT

TIMEOUT_S = 3600.0
FIRST_STEP_S = 300.0
"""From a command to its first step, at most."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Running:
    words: tuple[str, ...]
    process: subprocess.Popen[bytes]
    said: IO[bytes]
    began: float
    """By `time.monotonic`."""

    def finish(self) -> float:
        """Seconds until its end. Raises DataError where it failed."""
        code = self.process.wait(TIMEOUT_S)
        seconds = time.monotonic() - self.began
        if code != 0:
            raise self._no_figure(f"exit code {code}")
        return seconds

    def seconds_until(self, there: Callable[[], bool]) -> float:
        """From its start; then it goes on to its end. Raises DataError where it is not there in time."""
        while not there():
            if time.monotonic() - self.began > FIRST_STEP_S:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise self._no_figure(f"not there after {FIRST_STEP_S:.0f} s")
            if self.process.poll() is not None and not there():
                self.finish()
                raise self._no_figure("it ended without what was waited for")
            time.sleep(0.02)
        seconds = time.monotonic() - self.began
        self.finish()
        return seconds

    def output(self) -> str:
        self.said.seek(0)
        return self.said.read().decode(errors="replace")

    def _no_figure(self, why: str) -> DataError:
        return DataError(f"python -m {' '.join(self.words)}: {why}, no figure to record\n{self.output()[-3000:]}")


def start(*words: str, env: Mapping[str, str] | None = None) -> Running:
    """`python -m WORDS`, with a Ray of its own unless `env` names one; it gets SIGTERM when this process dies."""
    said = tempfile.TemporaryFile()  # noqa: SIM115
    # Nothing of these commands may look for the peers of `speed data`, or for a cluster that ran here once.
    ours = {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    libc, began = ctypes.CDLL(None), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=os.environ | ours | dict(env or {}),
        stdout=said,
        stderr=said,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    return Running(words, process, said, began)


def words_of(changes: Mapping[str, object]) -> list[str]:
    return [word for path, value in changes.items() for word in ("--set", f"{path}={value}")]


def count_of(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern))
