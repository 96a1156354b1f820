"""`bench faults`: one short run, again and again, against a real S3 server behind a faulty proxy; killed, too.

Everything is a command of its own, as a user starts it. The data are synthetic: what is measured is whether the bits
stay, and how long it takes to go on.
"""

import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np

from cluster.session import names_cluster
from imgcls import records
from imgcls.data.shards import pack
from imgcls.data.synthetic import synthetic_source
from imgcls.errors import ClusterError, StorageError
from imgcls.records import RunResult
from imgcls.training import environment
from sandbox.s3.proxy import FAULTS, Passed, Proxy, faulty
from sandbox.s3.server import Server, serving
from tests.processes import descendants, title_of
from tests.proof.records import FaultRecord, FaultyRun

RUN = "regularized-seed0"
FOUR_STEPS = (
    *("--set", "train_fraction=1.0", "--set", "global_batch_size=64"),
    *("--set", "input.px=16", "--set", "input.stored_px=16", "--set", 'model={"kind": "basic-cnn", "dropout": 0.3}'),
    *("--checkpoint-every-n-steps", "1"),
)
"""An epoch of `regularized` on 270 images, each step committed."""
EPOCHS, EPOCHS_WHEN_KILLED = 3, 24
"""Workers outlive a killed command by seconds; a killed run is long enough not to end in that time."""
FAIL, FAIL_WHEN_KILLED = 0.2, 0.05
_STEP = re.compile(r"^PUT .*/step-\d+/committed\.json")
_ATTEMPT = re.compile(r"^PUT .*/attempts/\d+/began\.json")
_KILLED = {"RayTrainWorker": "ray::RayTrainWorker", "command": "", "TrainController": "ray::ImplicitFunc"}
"""What is killed, in turn, and its title; the command itself has none. The controller is in Tune's trial."""
_LIMIT_S = 900


@dataclass(frozen=True)
class _Bench:
    folder: Path
    server: Server
    proxy: Proxy
    say: Callable[[str], None]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, epochs: int) -> subprocess.Popen[bytes]:
        words = ("train", "regularized", "--data", "s3://data/packed", "--storage", "s3://runs", "--id", name, *FOUR_STEPS)
        return self._command(*words, "--set", f"length.epochs={epochs}", IMGCLS_CACHE=str(self.folder / f"cache-{name}"))

    def finish(self, process: subprocess.Popen[bytes], name: str) -> RunResult | None:
        """The run's result when the command has ended, read past the proxy; None where it failed, which is said."""
        try:
            code = process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = "none"
            os.killpg(process.pid, signal.SIGKILL)
        if code != 0:
            self.say(f"{name}: exit code {code}\n{(self.folder / 'said.txt').read_text()[-2000:]}")
            return None
        with _environment(self.server.env()):
            return records.read(RunResult, f"s3://runs/{name}/{RUN}/result.json")

    def _command(self, *words: str, **env: str) -> subprocess.Popen[bytes]:
        with (self.folder / "said.txt").open("ab") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", f"jobs.{words[0]}", *words[1:]],
                env={**_without_aws(), **self.server.env(port=self.proxy.port), **env},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def end(self) -> None:
        """Nothing that was started is left."""
        for process in self.started:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _without_aws() -> dict[str, str]:
    """Nothing of the caller's leads past the proxy."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before, settings = dict(os.environ), {**_without_aws(), **settings}
    os.environ.clear()
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure_faults(num_kills: int, command: str, say: Callable[[str], None]) -> FaultRecord:
    """Raises StorageError where a run did not come to its end, ClusterError where Ray would not be its own to kill."""
    if names_cluster():
        raise ClusterError("bench faults kills processes of a Ray of its own\n  do: unset RAY_ADDRESS")
    began, runs = time.monotonic(), list[FaultyRun]()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder, "server"), buckets=("data", "runs")) as server,
        faulty(server.host, server.port) as proxy,
        ExitStack() as ends,
    ):
        bench = _Bench(Path(folder), server, proxy, say)
        ends.callback(bench.end)
        with _environment(server.env()):
            pack(synthetic_source("cifar10", 300), "s3://data/packed/cifar10", name="cifar10")
        whole = _without_faults(bench, EPOCHS)
        for fault in FAULTS:
            runs.append(_with_fault(bench, fault, whole))
            say(told(runs[-1]))
        longer = _without_faults(bench, EPOCHS_WHEN_KILLED) if num_kills else whole
        for number in range(num_kills):
            runs.append(_with_kill(bench, number, longer))
            say(told(runs[-1]))
    return FaultRecord(
        command=command,
        date=date.today().isoformat(),
        seconds=round(time.monotonic() - began, 1),
        commit=environment.commit() or "unknown",
        versions=environment.versions(),
        hardware=environment.hardware(),
        seconds_without_faults=round(whole.training_s, 3),
        runs=tuple(runs),
    )


def told(run: FaultyRun) -> str:
    same = "the same bits" if run.identical else "OTHER BITS"
    median, p95 = np.percentile(run.seconds_to_step, (50, 95)) if run.seconds_to_step else (0.0, 0.0)
    return (
        f"{run.fault}: {run.recovered} of {run.injected} recovered, to the next step {median:.1f} s (median), "
        f"{p95:.1f} s (p95), goodput {run.goodput:.2f}, {same}"
    )


@dataclass(frozen=True)
class _Whole:
    """A run that nothing happens to."""

    result: RunResult
    training_s: float


def _without_faults(bench: _Bench, epochs: int) -> _Whole:
    bench.proxy.passed.clear()
    name = f"whole-{epochs}"
    result = bench.finish(bench.start(name, epochs), name)
    if result is None:
        raise StorageError("bench faults: the run without faults failed")
    return _Whole(result, _training_s(bench.proxy.passed))


def _with_fault(bench: _Bench, fault: str, whole: _Whole) -> FaultyRun:
    proxy = bench.proxy
    proxy.passed.clear()
    proxy.faults, proxy.fail = (fault,), FAIL
    result = bench.finish(bench.start(fault, EPOCHS), fault)
    proxy.fail = 0.0
    return _measured(fault, [one.at for one in proxy.injected], proxy.passed, result, whole)


def _with_kill(bench: _Bench, number: int, whole: _Whole) -> FaultyRun:
    """A worker, the command or the controller is killed at a random step; the command is given again where it has to be."""
    what = list(_KILLED)[number % len(_KILLED)]
    proxy, chance, title = bench.proxy, random.Random(number), _KILLED[what]
    proxy.passed.clear()
    proxy.faults, proxy.fail = tuple(fault for fault in FAULTS if fault != "stall"), FAIL_WHEN_KILLED
    name = f"kill-{number}"
    process = bench.start(name, EPOCHS_WHEN_KILLED)
    _wait_for_steps(proxy, chance.randrange(1, 2 * EPOCHS_WHEN_KILLED), process)
    time.sleep(chance.uniform(0, 0.1))
    victims = [pid for pid in descendants(process.pid) if title_of(pid).startswith(title)] if title else [process.pid]
    if not victims:
        raise StorageError(f"bench faults, {name}: no {title} to be killed")
    victim = victims[0]
    os.kill(victim, signal.SIGKILL)
    killed_at = time.time()
    if not title:
        process.wait()
        process = bench.start(name, EPOCHS_WHEN_KILLED)
    result = bench.finish(process, name)
    proxy.fail = 0.0
    # A worker that has not noticed yet may commit once more: the next step is one of the next attempt.
    again = next((at for at in _times(proxy.passed, _ATTEMPT) if at > killed_at), math.inf)
    return _measured(f"{what} killed", [killed_at], proxy.passed, result, whole, not_before=again)


def _wait_for_steps(proxy: Proxy, count: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _LIMIT_S
    while len(_times(proxy.passed, _STEP)) < count:
        if process.poll() is not None or time.monotonic() > until:
            raise StorageError(f"bench faults: the command ended before {count} steps")
        time.sleep(0.05)


def _measured(
    fault: str,
    times: Sequence[float],
    passed: Sequence[Passed],
    result: RunResult | None,
    whole: _Whole,
    not_before: float = 0.0,
) -> FaultyRun:
    if result is None:
        return FaultyRun(fault=fault, injected=len(times), recovered=0, seconds_to_step=(), goodput=0.0, identical=False)
    steps = _times(passed, _STEP)
    first = min(steps)  # before it the command starts, faults or not
    after = [(at, min((step for step in steps if step > max(at, not_before)), default=None)) for at in times if at > first]
    return FaultyRun(
        fault=fault,
        injected=len(times),
        recovered=len(times),
        seconds_to_step=tuple(round(step - at, 3) for at, step in after if step is not None),
        goodput=round(whole.training_s / _training_s(passed), 3),
        identical=(result.weights_sha256, result.history_sha256, result.model_sha256)
        == (whole.result.weights_sha256, whole.result.history_sha256, whole.result.model_sha256),
    )


def _times(passed: Sequence[Passed], request: re.Pattern[str]) -> list[float]:
    """When such a request was done; in order."""
    return sorted(one.at for one in passed if request.match(one.request) and one.status == 200)


def _training_s(passed: Sequence[Passed]) -> float:
    """From the first commit to the last."""
    steps = _times(passed, _STEP)
    return max(steps) - min(steps)
