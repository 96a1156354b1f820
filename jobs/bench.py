"""Records of figures: write one from a suite's results, and the README's tables from all of them."""

import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import tyro

from imgcls import records, storage
from imgcls.catalogue import suite_of
from imgcls.errors import DataError, RecipeError
from imgcls.rates import keep
from imgcls.records import RunResult, SuiteResults
from imgcls.results.measurement import Figures, Measurement, check_commit, measure, table_of
from imgcls.training import environment
from jobs._door import DONE, SOME_FAILED, enter
from jobs._request import checked_name
from jobs._terminal import Lines, say_table

MEASUREMENTS = Path("docs/measurements")
ROOT = Path(__file__).parent.parent


def bench(
    what: Annotated[
        tyro.conf.Positional[Literal["calibrate", "record", "numerics", "faults", "gpu", "readme"]],
        tyro.conf.arg(metavar="WHAT"),
    ],
    id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")] = "",
    storage_url: Annotated[str, tyro.conf.arg(name="storage")] = "runs",
    data: str = "data/packed",
    catalogue: str = "quick",
    repeats: int = 3,
    kills: int = 3,
    seconds: float = 540.0,
    to: Path = Path("runs/gpu"),
    small: bool = False,
    verbose: bool = False,
) -> int:
    """Measure: this machine's rates, a record under docs/measurements/, or the README's tables from the records.

    Args:
        what: `calibrate`: how fast this machine trains a catalogue's recipes, for --dry-run. `record ID`: a suite's
            figures. `numerics`: images/s of elastic numerics beside ddp. `faults`: runs on S3 whose storage fails, and
            that are killed. `gpu`: what is to be measured on a GPU machine, most wanted first. `readme`: the tables.
        id: Name of the suite, as `quick`.
        storage_url: Folder or URL where runs leave what they found.
        data: Folder or URL of packed sets, for `calibrate` and `numerics`.
        catalogue: quick, paper or tuned, for `calibrate`.
        repeats: Of each measurement, for `numerics`.
        kills: So many runs are killed, for `faults`.
        seconds: Of this call, for `gpu`; what does not fit is left to the same command another time.
        to: Folder of records and runs, for `gpu`.
        small: Few steps on synthetic images, for `gpu`; so too where there is no GPU.
        verbose: Tracebacks too.
    """
    if what == "calibrate":
        return _calibrate(catalogue, data)
    if what == "record":
        if not id:
            raise RecipeError("bench record needs the ID of a suite, as quick")
        storage.check_places(reads=[storage_url])
        return _write(measure(records.read(SuiteResults, storage.join(storage_url, checked_name(id, "ID"), "results.json"))))
    if what == "numerics":
        return _write(_compare_numerics(data, repeats))
    if what == "faults":
        from tests.proof.bench_faults import measure_faults

        check_commit({environment.commit() or "unknown"}, "bench faults")
        found = measure_faults(kills, f"python -m jobs.bench faults --kills {kills}", Lines(synthetic=True).say)
        _write(found)
        return DONE if all(run.identical for run in found.runs) else SOME_FAILED
    if what == "gpu":
        from jobs._gpu import measure_gpu

        return measure_gpu(to, seconds, small=small, say=Lines().say)
    readme = Path("README.md")
    readme.write_text(with_tables(readme.read_text()))
    Lines().say(f"wrote {readme}")
    return DONE


def _calibrate(catalogue: str, data: str) -> int:
    from jobs._calibrate import calibrate

    recipes, lines = suite_of(catalogue), Lines()
    storage.check_places(reads=[storage.absolute(data)], writes=[str(storage.cache_root())])
    found = calibrate(recipes, storage.absolute(data))
    lines.say(f"rates of {found[0].hardware}:")
    unit = {"overhead": "s a run", "session": "s a command"}
    say_table(lines, [(rate.what, rate.of, f"{rate.value:,.1f} {unit.get(rate.what, 'images/s')}") for rate in found])
    lines.say(f"kept in {keep(found)}")
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


def with_tables(readme: str) -> str:
    """The text with each table between `<!-- table SUBJECT -->` and `<!-- end -->` as the newest record has it."""
    from tests.proof.records import TABLES

    def table(match: re.Match[str]) -> str:
        subject, folder = match[1], ROOT / MEASUREMENTS
        content = TABLES[subject](folder) if subject in TABLES else table_of(subject, folder)
        return f"<!-- table {subject} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", table, readme, flags=re.DOTALL)


if __name__ == "__main__":
    enter(bench)
