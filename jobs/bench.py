"""Records of figures: write one from a suite's results, and the papers' tables from all of them."""

import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import product
from pathlib import Path
from typing import Annotated

import tyro

from imgcls import records, storage
from imgcls.catalogue import suite_of
from imgcls.errors import DataError
from imgcls.rates import keep
from imgcls.records import RunResult, SuiteResults
from imgcls.results.measurement import Figures, Measurement, check_commit, measure, table_of
from imgcls.training import environment
from jobs._door import DONE, SOME_FAILED, enter
from jobs._request import checked_name
from jobs._terminal import Lines, say_table

MEASUREMENTS = Path("docs/measurements")
ROOT = Path(__file__).parent.parent


def calibrate(catalogue: str = "quick", data: str = "data/packed") -> int:
    """Measure how fast this machine trains a catalogue's recipes, for --dry-run.

    Args:
        catalogue: quick, paper or tuned.
        data: Folder or URL of packed sets.
    """
    from jobs import _calibrate

    recipes, lines = suite_of(catalogue), Lines()
    storage.check_places(reads=[storage.absolute(data)], writes=[str(storage.cache_root())])
    rates = _calibrate.calibrate(recipes, storage.absolute(data))
    lines.say(f"rates of {rates[0].hardware}:")
    unit = {"overhead": "s a run", "session": "s a command"}
    say_table(lines, [(rate.what, rate.of, f"{rate.value:,.1f} {unit.get(rate.what, 'images/s')}") for rate in rates])
    lines.say(f"kept in {keep(rates)}")
    return DONE


def record(
    id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")],
    storage_url: Annotated[str, tyro.conf.arg(name="storage")] = "runs",
) -> int:
    """Write a suite's figures as a record under docs/measurements/.

    Args:
        id: Name of the suite, as `quick`.
        storage_url: Folder or URL where its runs left what they found.
    """
    storage.check_places(reads=[storage_url])
    return _write(measure(records.read(SuiteResults, storage.join(storage_url, checked_name(id, "ID"), "results.json"))))


def numerics(data: str = "data/packed", repeats: int = 3) -> int:
    """Write a record of images/s under elastic numerics beside ddp.

    Args:
        data: Folder or URL of packed sets.
        repeats: Of each measurement.
    """
    return _write(_compare_numerics(data, repeats))


def faults(kills: int = 3) -> int:
    """Write a record of runs on S3 whose storage fails, and that are killed.

    Args:
        kills: So many runs are killed.
    """
    from tests.proof.bench_faults import measure_faults

    check_commit({environment.commit() or "unknown"}, "bench faults")
    measured = measure_faults(kills, f"python -m jobs.bench faults --kills {kills}", Lines(synthetic=True).say)
    _write(measured)
    return DONE if all(run.identical for run in measured.runs) else SOME_FAILED


def gpu(seconds: float = 540.0, to: Path = Path("runs/gpu"), small: bool = False) -> int:
    """Measure what is wanted of a GPU machine, most wanted first.

    Args:
        seconds: Of this call; what does not fit is left to the same command another time.
        to: Folder of records and runs.
        small: Few steps on synthetic images; so too where there is no GPU.
    """
    from jobs._gpu import measure_gpu

    return measure_gpu(to, seconds, small=small, say=Lines().say)


def readme() -> int:
    """Write the tables of README and guides from the newest records."""
    for paper in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        text = paper.read_text()
        if (written := with_tables(text, folder=paper.parent)) != text:
            paper.write_text(written)
            Lines().say(f"wrote {paper}")
    return DONE


def _write(found: Measurement | Figures) -> int:
    path = MEASUREMENTS / found.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(found.to_bytes())
    Lines().say(f"wrote {path}")
    return DONE


def _compare_numerics(data: str, repeats: int) -> Measurement:
    """One epoch of `resnet18` on 1,024 images at 1 and 2 workers, ddp and elastic one after the other, again and again."""
    check_commit({environment.commit() or "unknown"}, "bench numerics")
    began, runs = time.monotonic(), list[RunResult]()
    few = ("length.epochs=1", f"train_fraction={1024 / 8500:.4f}", "global_batch_size=128")
    with tempfile.TemporaryDirectory() as folder:
        for num_workers, repeat, numerics in product((1, 2), range(repeats), ("ddp", "elastic")):
            name = f"{num_workers}-{repeat}-{numerics}"
            words = ["resnet18", "--data", data, "--storage", folder, "--id", name, "--num-workers", str(num_workers)]
            words += [word for change in (*few, f"numerics={numerics}") for word in ("--set", change)]
            # A command each: a process has one local Ray in its life.
            done = subprocess.run([sys.executable, "-m", "jobs.train", *words], check=False, capture_output=True, text=True)
            if done.returncode != 0 or "SYNTHETIC" in done.stdout:
                raise DataError(f"jobs.train {name}: no figure to record\n{done.stdout}{done.stderr}")
            run = records.read(RunResult, storage.join(folder, name, "resnet18-seed0", "result.json"))
            Lines().say(f"{num_workers} workers, {numerics}: {run.images_per_s} images/s")
            runs.append(run.model_copy(update={"examples": ()}))
    return Measurement(
        subject="numerics",
        claim="images/s in training under elastic numerics (4 virtual ranks) beside ddp",
        command=f"python -m jobs.bench numerics --repeats {repeats}",
        date=date.today().isoformat(),
        seconds=round(time.monotonic() - began, 1),
        runs=tuple(runs),
    )


def with_tables(text: str, *, folder: Path) -> str:
    """The text with each table between `<!-- table SUBJECT -->` and `<!-- end -->` as the newest record has it.

    folder: of the paper that holds the text, from the root of the repository; links to records lead from there.
    """
    from tests.proof.records import TABLES

    def table(match: re.Match[str]) -> str:
        subject, measurements = match[1], ROOT / MEASUREMENTS
        content = TABLES[subject](measurements) if subject in TABLES else table_of(subject, measurements)
        content = content.replace(f"]({MEASUREMENTS}/", f"]({os.path.relpath(MEASUREMENTS, folder)}/")
        return f"<!-- table {subject} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    enter({"calibrate": calibrate, "record": record, "numerics": numerics, "faults": faults, "gpu": gpu, "readme": readme})
