"""`bench gpu`: what has to be measured on a GPU machine, most wanted first, in the seconds that there are.

A step's record is written as soon as the step is over, into the folder of this hardware. A step whose record lies there
is not done again; runs that were cut short go on from their checkpoints. Everything is a command of its own, as a user
gives it. Without a GPU the same steps run at small sizes, on synthetic images.
"""

import csv
import ctypes
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Literal

from cluster.session import names_cluster
from imgcls import records, storage
from imgcls.catalogue.published import PUBLISHED
from imgcls.data.shards import manifest_url
from imgcls.errors import ClusterError, DataError, ImgclsError
from imgcls.records import RunResult
from imgcls.results.compare import read_predictions
from imgcls.runs import SuiteFolder
from imgcls.training import environment
from jobs._door import DONE, SOME_FAILED
from tests.proof.measurement import Figures, measure, where_of
from tests.proof.records import newest

ROOT = Path(__file__).parents[2]
END_S = 15.0
"""A command whose time is over gets SIGTERM, and after so long SIGKILL."""
PR_SET_PDEATHSIG = 1


class StepRecord(Figures):
    """What a step of `jobs.bench gpu` found on one card."""

    status: Literal["done", "skipped", "failed", "open"]
    """open: it was stopped when its time was over."""
    why: str
    """It is not done."""
    commands: tuple[str, ...]
    """In this order; places below the folder of the bench."""
    found: dict[str, float | str]
    synthetic: bool
    """Small sizes on drawings: that it runs, and no figure."""
    seconds: float


class NotDoneError(Exception):
    """(status, why) of a step: `skipped`, what it measures is not there; `open`, its time is over."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    pack: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    """Of each suite; all unless said."""
    seeds: tuple[str, ...] = ("--recipes", "basic-cnn,resnet18,regularized", "--num-seeds", "5")
    short: tuple[str, ...] = ()
    """Changes to every recipe."""
    killed: tuple[str, ...] = ()
    """Changes to the recipe whose run is killed."""
    killed_every: int = 10
    """Steps between its checkpoints; it is killed after the first."""
    speed_s: float = 40.0
    least: float = 1.0
    """Share of a step's `least_s` that is enough."""


FULL = Sizes()
SMALL = Sizes(
    pack=("--source", "synthetic", "--num-samples", "200"),
    recipes=("--recipes", "basic-cnn"),
    seeds=("--recipes", "basic-cnn", "--num-seeds", "2"),
    short=("length.epochs=1", "train_fraction=1.0", "global_batch_size=32", "input.px=16", "input.stored_px=16"),
    killed=("length.epochs=6", 'model={"kind": "basic-cnn", "dropout": 0.3}'),
    killed_every=1,
    speed_s=1.0,
    least=0.1,
)


@dataclass
class Bench:
    """Where one call writes and until when, and what the step at hand has done so far."""

    folder: Path
    sizes: Sizes
    hardware: dict[str, str]
    until: float
    """By `time.monotonic`."""
    say: Callable[[str], None]
    step: str = ""
    commands: list[str] = field(default_factory=list)
    found: dict[str, float | str] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.step}.log"

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """`python -m WORDS`, its output in the step's log; it gets SIGTERM when this process dies."""
        # Where the folder and the checkout lie is no part of a record.
        command = shlex.join(["python", "-m", *words])
        self.commands.append(command.replace(f"{self.folder}/", "").replace(f"{ROOT}/", ""))
        libc = ctypes.CDLL(None)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *words],
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Raises NotDoneError where the command did not end in time and was stopped, DataError where it failed."""
        try:
            code = process.wait(max(0.0, self.until - time.monotonic()))
        except BaseException as reason:
            self.stop(process)
            over = NotDoneError("open", "its time is over: the same command goes on")
            raise over if isinstance(reason, subprocess.TimeoutExpired) else reason from None
        if code != 0:
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            command = shlex.join(map(str, process.args[1:])) if isinstance(process.args, list) else process.args
            raise DataError("\n".join([f"exit code {code}: {command}", *tail]))

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ends the command, where it still runs."""
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def run(self, *words: str) -> None:
        self.finish(self.start(*words))

    def training(self, job: str, id: str, *words: str, gpus: float, changes: Sequence[str] = ()) -> list[str]:
        """The words of `jobs.train` or `jobs.suite`. gpus: of each worker, where there are any."""
        places = ("--data", str(self.folder / "packed"), "--storage", str(self.runs), "--id", id)
        card = ("--gpus-per-worker", f"{gpus:g}") if "gpu" in self.hardware else ()
        fields = [word for change in (*self.sizes.short, *changes) for word in ("--set", change)]
        return [f"jobs.{job}", *words, *places, *card, *fields]

    def device(self, *words: str) -> None:
        """Finds what `tests.proof.device` printed, to its end or not."""
        try:
            self.run("tests.proof.device", *words)
        finally:
            for line in self.log.read_text(encoding="utf-8").splitlines():
                self.found |= json.loads(line) if line.startswith("{") else {}


@dataclass(frozen=True)
class Step:
    name: str
    least_s: float
    """It is not begun with less time left."""
    most_s: float
    do: Callable[[Bench], None]
    goes_on: bool = False
    """Its runs of an earlier call are gone on with; those of other steps begin anew."""


def measure_gpu(folder: Path, seconds: float, *, small: bool, say: Callable[[str], None]) -> int:
    """The exit code: SOME_FAILED where a step failed. Raises ClusterError where Ray would not be its own to kill."""
    if names_cluster():
        raise ClusterError("bench gpu kills commands of a Ray of its own\n  do: unset RAY_ADDRESS")
    until, hardware = time.monotonic() + seconds, environment.hardware()
    small = small or "gpu" not in hardware
    # A figure of one card is not compared with another's, nor a small one with a real one.
    folder = folder.absolute() / f"{where_of(hardware)}{'-small' * small}"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, SMALL if small else FULL, hardware, until, say)
    say(f"{len(STEPS)} steps in {seconds:.0f} s; records, logs and runs lie in {folder}")
    packed = _do(bench, Step("pack", 0, seconds, _pack))
    if packed.status != "done":
        raise DataError(f"there is nothing to train on: {packed.why}")
    return carry_out(bench, STEPS)


def carry_out(bench: Bench, steps: Sequence[Step]) -> int:
    """Each step without a record of its end that fits into the time left is done, and leaves its record."""
    failed = left = 0
    for step in steps:
        before, left_s = newest(StepRecord, bench.folder, f"gpu-{step.name}"), bench.until - time.monotonic()
        if before and before[1].status in ("done", "skipped"):
            bench.say(f"{step.name}: {before[1].status} before")
        elif left_s < step.least_s * bench.sizes.least:
            bench.say(f"{step.name}: not begun, {left_s:.0f} s are left")
            left += 1
        else:
            record = _do(bench, step)
            storage.write_bytes(str(bench.folder / record.file_name), record.to_bytes())
            facts = "\n".join(f"  {name}: {value}" for name, value in record.found.items())
            bench.say(f"{step.name}: {record.status} in {record.seconds:.0f} s {record.why}\n{facts}")
            failed += record.status == "failed"
            left += record.status == "open"
    if left:
        bench.say(f"{left} of {len(steps)} steps are left: the same command goes on with them")
    return SOME_FAILED if failed else DONE


def _do(bench: Bench, step: Step) -> StepRecord:
    began, until = time.monotonic(), bench.until
    bench.step, bench.commands, bench.found = step.name, [], {}
    bench.until = min(until, began + step.most_s)
    bench.log.unlink(missing_ok=True)
    for left in bench.runs.glob(f"{step.name}*") if not step.goes_on else ():
        shutil.rmtree(left, ignore_errors=True)  # a command that was killed with its call may still be leaving
    status, why = "done", ""
    try:
        step.do(bench)
    except NotDoneError as reason:
        status, why = reason.args
    except Exception as error:  # whatever it is: the machine is here for minutes, and other steps may do
        status, why = "failed", f"{type(error).__name__}: {error}"
    bench.until = until
    return StepRecord(
        subject=f"gpu-{step.name}",
        status=status,
        why=why,
        commands=tuple(bench.commands),
        found=bench.found,
        synthetic=bench.sizes is SMALL,
        seconds=round(time.monotonic() - began, 1),
        date=date.today().isoformat(),
        commit=environment.commit() or "unknown",
        versions=environment.versions(),
        hardware=bench.hardware,
    )


def _pack(bench: Bench) -> None:
    for name in ("imagenette", "cifar10"):
        if not storage.exists(manifest_url(str(bench.folder / "packed" / name))):
            bench.run("jobs.pack", name, "--to", str(bench.folder / "packed"), *bench.sizes.pack)


def _pytest(bench: Bench) -> None:
    if "gpu" not in bench.hardware:
        raise NotDoneError("skipped", "no CUDA device")
    if importlib.util.find_spec("pytest") is None:
        raise NotDoneError("skipped", "pytest is not installed; `device` and `killed-*` try the same by commands")
    bench.run("pytest", "-m", "gpu", str(ROOT / "tests"))


def _killed(bench: Bench, *, num_workers: int, gpus: float) -> None:
    """A run that was killed goes on to the bits of one that was not. One rank has NCCL on a GPU, two on one card gloo."""
    words = ("regularized", "--num-workers", str(num_workers), "--cpus-per-worker", f"{1 / num_workers:g}")
    words += ("--checkpoint-every-n-steps", str(bench.sizes.killed_every))
    ids = [f"{bench.step}-{id}" for id in ("whole", "killed")]
    whole, killed = (bench.training("train", id, *words, gpus=gpus, changes=bench.sizes.killed) for id in ids)
    runs = [bench.runs / id / "regularized-seed0" for id in ids]
    # Side by side: the machine is here for minutes, and most of a short command is its start.
    left_alone, process = bench.start(*whole), bench.start(*killed)
    try:
        while process.poll() is None and time.monotonic() < bench.until:
            if markers := list(runs[1].glob("checkpoints/*/committed.json")):
                process.kill()
                bench.found["killed after"] = markers[0].parent.name
            time.sleep(0.05)
        with suppress(DataError):  # it was killed
            bench.finish(process)
        bench.run(*killed)
        bench.finish(left_alone)
    finally:
        bench.stop(left_alone)
    one, two = map(_result, runs)
    same = (one.weights_sha256, one.history_sha256) == (two.weights_sha256, two.history_sha256)
    bench.found |= {"steps": float(one.steps), "weights and history": "the same bits" if same else "OTHER BITS"}
    if not same or "killed after" not in bench.found:
        raise DataError("not killed, or other bits")


def _suite(bench: Bench, *, catalogue: str, seeds: bool = False, changes: Sequence[str] = ()) -> None:
    """What of it came to an end in time is found; a record as of `bench record` lies beside the step's, or why not."""
    began, id = time.monotonic(), f"{catalogue}{'-short' * bool(changes)}"
    words = ("--catalogue", catalogue, *(bench.sizes.seeds if seeds else bench.sizes.recipes))
    try:
        bench.run(*bench.training("suite", id, *words, "--checkpoint-every-n-steps", "200", gpus=0.2, changes=changes))
    finally:
        try:
            suite = SuiteFolder(str(bench.runs / id))
            results = suite.publish()
            bench.found |= {one.name: one.test.accuracy for one in results.finished if one.test}
            told = {"command": bench.commands[-1], "seconds": round(time.monotonic() - began, 1)}
            record = measure(results.model_copy(update=told), read_predictions(suite.predictions(results)))
            storage.write_bytes(str(bench.folder / record.file_name), record.to_bytes())
        except ImgclsError as reason:
            bench.found["no record of the suite"] = str(reason)


def _speed(bench: Bench, *, recipe: str) -> None:
    """Images/s under Ray, then those of the device without it, one after the other."""
    fields = ("length.epochs=1", *bench.sizes.short)
    id = f"{bench.step}-ray"
    bench.run(*bench.training("train", id, recipe, "--catalogue", "paper", gpus=1.0, changes=fields))
    bench.found["trained under Ray, images/s"] = _result(bench.runs / id / f"{recipe}-seed0").images_per_s or 0.0
    bench.device("speed", "paper", recipe, str(bench.sizes.speed_s), *fields)


def _reach(bench: Bench) -> None:
    """Seconds of training and validation until the published accuracy is reached on the validation part."""
    run, target = bench.runs / "reach" / "regularized-seed0", PUBLISHED["regularized"].accuracy
    try:
        bench.run(*bench.training("train", "reach", "regularized", "--catalogue", "paper", gpus=1.0))
        if test := _result(run).test:
            bench.found |= {"test accuracy": test.accuracy, "test n": float(test.num_samples)}
    finally:
        epochs = [row | time for row, time in zip(_rows(run / "history.csv"), _rows(run / "timing.csv"), strict=False)]
        after_s = accumulate(float(one["train_s"]) + float(one["validate_s"]) for one in epochs)
        reached = (s for one, s in zip(epochs, after_s, strict=True) if float(one["val/accuracy"]) >= target)
        bench.found |= {"epochs": float(len(epochs)), f"seconds to val/accuracy {target}": next(reached, "not reached")}


def _result(run: Path) -> RunResult:
    return records.read(RunResult, str(run / "result.json"))


def _rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.exists() else []


STEPS = (
    Step("device", 15, 60, lambda bench: bench.device("checks")),
    Step("pytest", 30, 120, _pytest),
    Step("quick-short", 45, 120, partial(_suite, catalogue="quick", changes=("length.epochs=1",))),
    Step("killed-1", 90, 240, partial(_killed, num_workers=1, gpus=1.0)),
    Step("rows", 90, 800, partial(_suite, catalogue="paper"), goes_on=True),
    Step("speed-resnet18", 75, 150, partial(_speed, recipe="resnet18")),
    Step("speed-regularized", 75, 150, partial(_speed, recipe="regularized")),
    Step("killed-2", 90, 240, partial(_killed, num_workers=2, gpus=0.4)),
    Step("seeds", 60, 240, partial(_suite, catalogue="paper", seeds=True), goes_on=True),
    Step("reach", 60, 300, _reach, goes_on=True),
    Step("tuned", 60, 480, partial(_suite, catalogue="tuned"), goes_on=True),
)
"""Most wanted first."""
