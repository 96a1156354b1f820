"""Records of figures: write one from a suite's results, and the papers' tables from all of them."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from imgcls import storage
from imgcls.catalogue import suite_of
from imgcls.errors import DataError
from imgcls.rates import keep
from imgcls.runs import SuiteFolder
from imgcls.training import environment
from jobs._door import DONE, SOME_FAILED, enter
from jobs._request import checked_name
from jobs._terminal import Lines, say_table

if TYPE_CHECKING:
    from tests.proof.measurement import Figures, Measurement

MEASUREMENTS = Path("docs/measurements")
ROOT = Path(__file__).parent.parent

Id = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")]
Storage = Annotated[str, tyro.conf.arg(name="storage")]


def calibrate(catalogue: str = "quick", data: str = "data/packed") -> int:
    """Measure how fast this machine trains a catalogue's recipes, for --dry-run.

    Args:
        catalogue: quick, paper, tuned, choices or transfer.
        data: Folder or URL of packed sets.
    """
    from jobs import _calibrate

    recipes, lines = suite_of(catalogue), Lines()
    storage.check_places(reads=[storage.absolute(data)], writes=[str(storage.cache_root())])
    rates = _calibrate.calibrate(recipes, storage.absolute(data))
    lines.say(f"rates of {rates[0].hardware}:")
    unit = {"overhead": "s a run", "session": "s a command"}
    rows = [(rate.what, rate.of, f"{rate.value:,.1f} {unit.get(rate.what, 'images/s')}", rate.source) for rate in rates]
    say_table(lines, [("what", "of", "rate", "source"), *rows])
    lines.say(f"kept in {keep(rates)}")
    return DONE


def record(id: Id, storage_url: Storage = "runs") -> int:
    """Write a suite's figures as a record under docs/measurements/.

    Args:
        id: Name of the suite, as `quick`.
        storage_url: Folder or URL where its runs left what they found.
    """
    _check_checkout("bench record")
    from tests.proof.measurement import measure_suite

    storage.check_places(reads=[storage_url])
    measured, figure = measure_suite(SuiteFolder(storage.join(storage_url, checked_name(id, "ID"))))
    _write(measured)
    if figure:
        (MEASUREMENTS / measured.file_name).with_suffix(".svg").write_text(figure)
    return DONE


def published(id: Id, storage_url: Storage = "runs", data: str = "data/packed") -> int:
    """Write a record of a suite's last weights beside its best checkpoints and the published figures.

    Args:
        id: Name of the suite, as `paper`.
        storage_url: Folder or URL where its runs left what they found.
        data: Folder or URL of packed sets.
    """
    _check_checkout("bench published")
    from tests.proof.published import beside_published

    return _write(beside_published(SuiteFolder(storage.join(storage_url, checked_name(id, "ID"))), data, Lines().say))


def numerics(data: str = "data/packed", repeats: int = 3) -> int:
    """Write a record of images/s under elastic numerics beside ddp.

    Args:
        data: Folder or URL of packed sets.
        repeats: Of each measurement.
    """
    _check_checkout("bench numerics", committed=True)
    from tests.proof.numerics import compare_numerics

    return _write(compare_numerics(data, repeats, Lines().say))


def faults(kills: int = 3) -> int:
    """Write a record of runs on S3 whose storage fails, and that are killed.

    Args:
        kills: So many runs are killed.
    """
    _check_checkout("bench faults", committed=True)
    from tests.proof.bench_faults import measure_faults

    _write(measured := measure_faults(kills, f"python -m jobs.bench faults --kills {kills}", Lines(synthetic=True).say))
    return DONE if all(run.identical for run in measured.runs) else SOME_FAILED


def gpu(seconds: float = 540.0, to: Path = Path("runs/gpu"), small: bool = False) -> int:
    """Measure what is wanted of a GPU machine, most wanted first.

    Args:
        seconds: Of this call; what does not fit is left to the same command another time.
        to: Folder of records and runs.
        small: Few steps on synthetic images; so too where there is no GPU.
    """
    _check_checkout("bench gpu")
    from tests.proof.gpu import measure_gpu

    return measure_gpu(to, seconds, small=small, say=Lines().say)


def speed(
    what: tyro.conf.Positional[Literal["data", "step", "start", "suite"]],
    data: str = "data/packed",
    repeats: int | None = None,
) -> int:
    """Write a record of our speed beside that of what one would take in place of it.

    Args:
        what: data: images/s of loaders; step: of training; start: seconds to the first step; suite: seconds of `quick`.
        data: Folder or URL of packed sets.
        repeats: Of each measurement; 5, of the suite 1.
    """
    _check_checkout("bench speed", committed=True)
    from tests.speed.bench import measure_speed

    return _write(measure_speed(what, data, repeats, Lines().say))


def readme() -> int:
    """Write the tables of README and guides from the newest records."""
    for paper in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        text = paper.read_text()
        if (written := with_tables(text, folder=paper.parent)) != text:
            paper.write_text(written)
            Lines().say(f"wrote {paper}")
    return DONE


def _check_checkout(command: str, *, committed: bool = False) -> None:
    """Raises DataError without a checkout, where what is measured to prove something stands beside the tests.

    committed: where code has changed that is not committed, too.
    """
    try:
        from tests.proof.measurement import check_commit
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("tests"):
            raise
        raise DataError(
            f"{command} needs a checkout: what it runs stands beside the tests\n"
            "  do: the same command in the checkout's folder, or with PYTHONPATH naming it"
        ) from None
    if committed:
        check_commit({environment.commit() or "unknown"}, command)


def _write(measured: "Measurement | Figures") -> int:
    path = MEASUREMENTS / measured.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(measured.to_bytes())
    Lines().say(f"wrote {path}")
    return DONE


def with_tables(text: str, *, folder: Path) -> str:
    """The text with each table between `<!-- table SUBJECT -->` and `<!-- end -->` as the newest record has it.

    folder: of the paper that holds the text, from the root of the repository; links to records lead from there.
    """
    _check_checkout("bench readme")
    from tests.proof.records import table_of

    def table(match: re.Match[str]) -> str:
        content = table_of(match[1], ROOT / MEASUREMENTS)
        content = content.replace(f"]({MEASUREMENTS}/", f"]({os.path.relpath(MEASUREMENTS, folder)}/")
        return f"<!-- table {match[1]} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    enter({one.__name__: one for one in (calibrate, record, numerics, faults, gpu, speed, published, readme)})
