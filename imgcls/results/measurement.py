"""Figures as records that stay: what was found, by which command, on what. The tables of README and guides read them."""

import statistics
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

from imgcls.catalogue import CATALOGUES
from imgcls.catalogue.published import PUBLISHED
from imgcls.errors import DataError
from imgcls.records import Record, RunResult, SuiteResults
from imgcls.results.compare import HEADER, MEASURED, table_row


class Measurement(Record):
    """Finished runs at one commit, on one kind of hardware."""

    subject: str
    claim: str
    command: str
    date: str
    seconds: float
    """Of the command, without packing."""
    runs: tuple[RunResult, ...]
    """Without their example images."""

    @property
    def file_name(self) -> str:
        return file_name(self.subject, self.runs[0].hardware, self.date)


class Figures(Record):
    """What was found at one commit, on one machine."""

    subject: str
    date: str
    commit: str
    versions: dict[str, str]
    hardware: dict[str, str]

    @property
    def file_name(self) -> str:
        return file_name(self.subject, self.hardware, self.date)


def where_of(hardware: dict[str, str]) -> str:
    """The hardware's name as part of a file's name."""
    return hardware.get("gpu", f"{hardware['cpus']}cpu-{hardware['vectors']}").lower().replace(" ", "-")


def file_name(subject: str, hardware: dict[str, str], day: str) -> str:
    return f"{subject}_{where_of(hardware)}_{day}.json"


def measure(results: SuiteResults) -> Measurement:
    """Raises DataError where a figure would not be honest: synthetic data, changed code, or nothing finished."""
    done = results.finished
    if not done:
        raise DataError(f"{results.id}: no run is finished, there is nothing to record")
    if results.synthetic:
        raise DataError(f"{results.id} is SYNTHETIC: its figures say nothing, and are not recorded")
    changed = [one.name for one in done if one.recipe not in CATALOGUES[one.catalogue]]
    if changed:
        raise DataError(
            f"{results.id}: {', '.join(changed)} differ from the catalogue {results.catalogue}, and are not recorded"
        )
    if len({(str(one.hardware), one.catalogue) for one in done}) > 1:
        raise DataError(
            f"{results.id} is of several kinds of hardware or catalogues: a record is of one\n  do: take another --id"
        )
    check_commit({one.commit or "unknown" for one in done}, results.id)
    return Measurement(
        subject=f"suite-{results.catalogue}",
        claim=f"test accuracy of the catalogue {results.catalogue}, each run tested once on its best checkpoint",
        command=results.command,
        date=date.today().isoformat(),
        seconds=results.seconds,
        runs=tuple(one.model_copy(update={"examples": ()}) for one in done),
    )


def check_commit(commits: set[str], what: str) -> None:
    """Raises DataError where the code is not that of one commit."""
    if len(commits) > 1 or any(c == "unknown" or c.endswith("+changes") for c in commits):
        raise DataError(
            f"{what} ran at {', '.join(sorted(commits))}: a figure needs one commit, with nothing changed\n"
            "  do: commit, and run it again under another --id"
        )


R = TypeVar("R", bound=Record)


def newest(kind: type[R], folder: Path, subject: str) -> tuple[Path, R] | None:
    found = sorted(folder.glob(f"{subject}_*.json"), key=lambda path: path.stem.rpartition("_")[2])
    return (found[-1], kind.from_bytes(found[-1].read_bytes(), where=str(found[-1]))) if found else None


def table_of(subject: str, folder: Path) -> str:
    """Markdown of the newest measurement of a subject."""
    tables: dict[str, Callable[[tuple[Path, Measurement] | None], str]] = {"numerics": _numerics_table}
    return tables.get(subject, _suite_table)(newest(Measurement, folder, subject))


def _suite_table(found: tuple[Path, Measurement] | None) -> str:
    """A row a run; a recipe without one is unmeasured."""
    runs = found[1].runs if found else ()
    rows = []
    for recipe, published in PUBLISHED.items():
        measured = [table_row(run) for run in runs if run.recipe.name == recipe]
        rows += measured or [(recipe, "unmeasured", *[""] * len(MEASURED), f"{published.accuracy:.4f}")]
    text = rows_of(HEADER, rows)
    if found is None:
        return text
    seeds = len({run.seed for run in found[1].runs})
    num_seeds = f"{seeds} seed{'s' * (seeds > 1)}"
    about = f"{found[1].seconds / 60:.1f} min without packing; n = {num_seeds}"
    return f"{text}\n\n{source(found[0], found[1].command, about, found[1].runs[0])}"


def _numerics_table(found: tuple[Path, Measurement] | None) -> str:
    """Images/s of elastic numerics beside those of ddp, by the number of workers."""
    header = ("workers", "ddp, images/s", "elastic, images/s", "elastic / ddp", "n each")
    if found is None:
        return rows_of(header, [("1", "unmeasured", "unmeasured", "", "")])
    rates: dict[tuple[int, str], list[float]] = {}
    for run in found[1].runs:
        assert run.placement is not None
        rates.setdefault((run.placement.num_workers, run.recipe.numerics), []).append(run.images_per_s or 0.0)
    rows = []
    for workers in sorted({workers for workers, _ in rates}):
        ddp, elastic = rates[workers, "ddp"], rates[workers, "elastic"]
        ratio = statistics.median(e / d for e, d in zip(elastic, ddp, strict=True))
        medians = (f"{statistics.median(one):.0f}" for one in (ddp, elastic))
        rows.append((str(workers), *medians, f"{ratio:.2f}", str(len(ddp))))
    about = f"recipe {found[1].runs[0].recipe.name}; medians"
    return f"{rows_of(header, rows)}\n\n{source(found[0], found[1].command, about, found[1].runs[0])}"


def rows_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def source(path: Path, command: str, about: str, at: RunResult | Figures) -> str:
    """The line under a table. at: what has its commit and its hardware."""
    hardware, day = ", ".join(f"{name} {value}" for name, value in at.hardware.items()), path.stem.rpartition("_")[2]
    return (
        f"`{command}`: {about}; {hardware}; torch {at.versions['torch']}; commit {at.commit}; {day}. "
        f"Record: [{path.name}](docs/measurements/{path.name})."
    )
