"""`bench speed step`: images/s of training by one thread: by hand, by `fit` without Ray, under Ray; one run, and two.

Every one trains three epochs, and the second counts: before it imports and kernels are warmed up, after it another run may
have ended.
"""

import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from imgcls.catalogue import recipe_of
from imgcls.cpus import usable_cpus
from imgcls.errors import DataError
from imgcls.runs import RunFolder
from tests.processes import descendants, title_of
from tests.proof.records import Timed
from tests.speed.commands import Running, start, words_of
from tests.speed.prepared import prepare
from tests.speed.turns import Turns

NOTES = (
    "Second of three epochs of about 1,000 images; decoded images in the page cache. No figure holds what comes at the "
    "end of an epoch; imgcls counts samples and losses in its steps, and reports on them.",
    "Helpers: all processes of the command but the two that train, from when both train until one has ended its training.",
)
RECIPES = ("resnet18", "basic-cnn")
CHANGES = {"length.epochs": 3}
NUM_TRAIN, NUM_TEST = 1160, 100
TRAINER = "ray::RayTrainWorker"
LEAST_S = 3.0
"""Two runs train beside each other for so long, or nothing is known of them."""


def measure_step(
    data_url: str, repeats: int, say: Callable[[str], None], *, num_train: int = NUM_TRAIN, **changes: object
) -> list[Timed]:
    """changes: fields of the recipes, beside `CHANGES`."""
    turns = Turns(say)
    with tempfile.TemporaryDirectory(prefix="speed") as folder:
        base = recipe_of("quick", RECIPES[0])
        prepared = prepare(base, data_url, Path(folder), num_train=num_train, num_test=NUM_TEST)
        for repeat in range(repeats):
            for name in RECIPES:
                bench = _Bench(str(prepared.packed), Path(folder, "runs", f"{name}-{repeat}"), name, CHANGES | changes)
                alone, two = f"step, {name}", f"step, {name}, two runs side by side"
                turns.add(alone, "loop by hand", "by hand", "images/s", bench.by_hand(1))
                turns.add(alone, "fit without Ray", "ours", "images/s", bench.without_ray())
                turns.add(alone, "imgcls", "ours", "images/s", bench.under_ray())
                turns.add(two, "loop by hand", "by hand", "images/s", bench.by_hand(2))
                rate, helpers = bench.two_under_ray()
                turns.add(two, "imgcls", "ours", "images/s", rate)
                turns.add(f"helpers while two runs of {name} train", "imgcls", "ours", "% of all cores", helpers)
    return turns.items()


class _Bench:
    """One recipe in one turn. Every method returns images/s of a run."""

    def __init__(self, packed: str, runs: Path, recipe: str, changes: dict[str, object]) -> None:
        self.packed, self.runs, self.recipe, self.changes = packed, runs, recipe, changes
        self.fields = [f"{path}={value}" for path, value in changes.items()]
        self.env = {"IMGCLS_CACHE": str(Path(packed).parent / "cache")}

    def by_hand(self, count: int) -> float:
        words = ("tests.speed.by_hand", self.packed, "1", "rates", self.recipe, *self.fields)
        several = [start(*words, env=self.env | {"OMP_NUM_THREADS": "1"}) for _ in range(count)]
        for one in several:
            one.finish()
        return statistics.mean(json.loads(one.output().splitlines()[-1])[1] for one in several)

    def without_ray(self) -> float:
        run = self.runs / "without-ray"
        start("tests.speed.without_ray", self.packed, str(run), self.recipe, *self.fields, env=self.env).finish()
        return _rate(run)

    def _start(self, job: str, id: str, *words: str) -> Running:
        places = ("--data", self.packed, "--storage", str(self.runs), "--id", id)
        return start(f"jobs.{job}", *words, *places, *words_of(self.changes), env=self.env)

    def under_ray(self) -> float:
        self._start("train", "one", self.recipe).finish()
        return _rate(self.runs / "one" / f"{self.recipe}-seed0")

    def two_under_ray(self) -> tuple[float, float]:
        """(images/s of a run, per cent of all cores that the helpers take)."""
        running = self._start("suite", "two", "--recipes", self.recipe, "--num-seeds", "2")
        runs = [self.runs / "two" / f"{self.recipe}-seed{seed}" for seed in range(2)]
        while running.process.poll() is None and not all(map(_trains, runs)):
            time.sleep(0.2)
        began, before = time.monotonic(), _helpers(running.process.pid)
        after, until = before, began
        while running.process.poll() is None and not any(len(_rows(run)) == 3 for run in runs):
            after, until = _helpers(running.process.pid), time.monotonic()
            time.sleep(0.5)
        running.finish()
        if until - began < LEAST_S:
            raise DataError(f"the two runs of {self.recipe} trained beside each other for {until - began:.1f} s: no figure")
        cpu_s = sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())
        share = 100 * cpu_s / max(1e-9, until - began) / usable_cpus()
        return statistics.mean(map(_rate, runs)), share


def _trains(run: Path) -> bool:
    with suppress(FileNotFoundError):
        return "steps an epoch" in Path(RunFolder(str(run)).log_url).read_text()
    return False


def _rows(run: Path) -> list[dict[str, str]]:
    with suppress(FileNotFoundError):
        return list(csv.DictReader(Path(RunFolder(str(run)).timing_url).read_text().splitlines()))
    return []


def _rate(run: Path) -> float:
    return float(_rows(run)[1]["images_per_s"])


def _helpers(pid: int) -> dict[int, float]:
    """CPU seconds so far of each process of a command, but of those that train."""
    seconds = {}
    for one in (pid, *descendants(pid)):
        with suppress(OSError):
            fields = Path("/proc", str(one), "stat").read_text().rpartition(")")[2].split()
            if not title_of(one).startswith(TRAINER):
                seconds[one] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds
