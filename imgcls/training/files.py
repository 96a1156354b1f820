"""What a run leaves to be read while it trains: its log, history and times as CSV, TensorBoard events. Written by rank 0."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from imgcls import storage
from imgcls.runs import RunFolder
from imgcls.training.history import METRICS, History

SLOW_S = 5.0


class RunLog:
    """The run's log: kept in memory, and put whole into the run's folder."""

    def __init__(self, run: RunFolder, *, writes: bool, synthetic: bool) -> None:
        self.url, self.writes, self.mark = run.log_url, writes, "SYNTHETIC " if synthetic else ""
        old = storage.read_bytes_if_there(self.url) if writes else None
        self.lines = old.decode(errors="replace").splitlines() if old else []

    def line(self, text: str) -> None:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.lines += [f"{self.mark}{stamp} {part}" for part in text.splitlines()]
        if self.writes:
            storage.write_bytes(self.url, ("\n".join(self.lines) + "\n").encode(), durable=False)


class Stopwatch:
    """Seconds by phase, and in all under `fit`; those of earlier attempts, up to their last commit, are added."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - begin)

    def add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        return self._seconds | {"fit": self._seconds.get("fit", 0.0) + time.perf_counter() - self.began}


class TrafficMeter:
    """What this rank has sent and received since it began, and in its earlier attempts up to their last commit."""

    def __init__(self) -> None:
        self._at_start = asdict(storage.traffic)
        """Less what earlier attempts have."""
        self._last = dict[str, float]()

    @property
    def amounts(self) -> dict[str, float]:
        now = asdict(storage.traffic)
        return {name: now[name] - at_start for name, at_start in self._at_start.items()}

    def go_on(self, before: dict[str, float], *, checkpoint_s: float) -> None:
        """From what earlier attempts have sent and received, and spent on checkpoints."""
        self._at_start = {name: at_start - before.get(name, 0) for name, at_start in self._at_start.items()}
        self._last = before | {"checkpoint_s": checkpoint_s}

    def complaint(self, *, epoch_s: float, checkpoint_s: float) -> str:
        """Where, since the last call, requests failed or the training waited for them; else nothing.

        checkpoint_s: seconds spent on checkpoints so far.
        """
        now, last = self.amounts | {"checkpoint_s": checkpoint_s}, self._last
        self._last = now
        requests, retries, waited_s = (now[name] - last.get(name, 0) for name in ("requests", "retries", "checkpoint_s"))
        if retries > requests / 10 or waited_s > max(SLOW_S, epoch_s / 2):
            return f"storage is slow: {retries:.0f} of {requests:.0f} requests were made again; {waited_s:.1f} s waited"
        return ""


class RunFiles:
    """`write` makes the files say what the history says."""

    def __init__(self, run: RunFolder, *, writes: bool) -> None:
        self.run, self.writes = run, writes
        self._events, self._num_events = b"", 0
        self._events_url = storage.join(run.url, f"{run.EVENTS}{time.time():.3f}")

    def write(self, history: History) -> None:
        if not self.writes:
            return
        storage.write_bytes(self.run.history_url, history.as_csv())
        storage.write_bytes(self.run.timing_url, history.timing_as_csv(), durable=False)
        self._write_events(history)

    def _write_events(self, history: History) -> None:
        """TensorBoard events of the whole history, in one file of this attempt that only grows: it can be read along."""
        from tensorboardX import SummaryWriter

        if not self._events:  # of earlier attempts: all that stays of them is in the history
            for name in storage.files(self.run.url):
                if name.startswith(self.run.EVENTS):
                    storage.delete(storage.join(self.run.url, name))
        with storage.temporary_folder("events") as folder:
            with SummaryWriter(folder) as events:
                for row in history.rows[self._num_events :]:
                    for name in METRICS:
                        events.add_scalar(name, row[name], int(row["step"]))
            (file,) = Path(folder).iterdir()
            self._events += file.read_bytes()
        self._num_events = len(history.rows)
        storage.extend(self._events_url, self._events)
