"""`bench numerics`: images/s of elastic numerics beside ddp, each run a command of its own."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import product

from imgcls import records, storage
from imgcls.errors import DataError
from imgcls.records import RunResult
from tests.proof.measurement import Measurement

FEW = ("length.epochs=1", f"train_fraction={1024 / 8500:.4f}", "global_batch_size=128")
"""One epoch of `resnet18` on 1,024 images."""


def compare_numerics(data: str, repeats: int, say: Callable[[str], None]) -> Measurement:
    """At 1 and 2 workers, ddp and elastic one after the other, again and again."""
    began, runs = time.monotonic(), list[RunResult]()
    with tempfile.TemporaryDirectory() as folder:
        for num_workers, repeat, numerics in product((1, 2), range(repeats), ("ddp", "elastic")):
            name = f"{num_workers}-{repeat}-{numerics}"
            words = ["resnet18", "--data", data, "--storage", folder, "--id", name, "--num-workers", str(num_workers)]
            words += [word for change in (*FEW, f"numerics={numerics}") for word in ("--set", change)]
            # A command each: a process has one local Ray in its life.
            done = subprocess.run([sys.executable, "-m", "jobs.train", *words], check=False, capture_output=True, text=True)
            if done.returncode != 0 or "SYNTHETIC" in done.stdout:
                raise DataError(f"jobs.train {name}: no figure to record\n{done.stdout}{done.stderr}")
            run = records.read(RunResult, storage.join(folder, name, "resnet18-seed0", "result.json"))
            say(f"{num_workers} workers, {numerics}: {run.images_per_s} images/s")
            runs.append(run.model_copy(update={"examples": ()}))
    return Measurement(
        subject="numerics",
        claim="images/s in training under elastic numerics (4 virtual ranks) beside ddp",
        command=f"python -m jobs.bench numerics --repeats {repeats}",
        date=date.today().isoformat(),
        seconds=round(time.monotonic() - began, 1),
        runs=tuple(runs),
    )
