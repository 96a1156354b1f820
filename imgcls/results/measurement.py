"""Figures as records that stay: what was found, by which command, on what. The README's tables read them."""

import statistics
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

import numpy as np

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


class Proved(Record):
    what: str
    n: int
    """So often tried."""
    equal: int
    """So often as it has to be."""
    detail: str


class Proof(Record):
    """What `make proof` tried, and whether it came out equal."""

    subject: str = "proof"
    claim: str = "a run that was killed, moved or cut otherwise ends with the bits of one that was not"
    command: str = "make proof"
    date: str
    commit: str
    versions: dict[str, str]
    hardware: dict[str, str]
    tried: tuple[Proved, ...]

    @property
    def file_name(self) -> str:
        return file_name(self.subject, self.hardware, self.date)


class FaultyRun(Record):
    """A run with one kind of fault."""

    fault: str
    injected: int
    recovered: int
    """After so many of them it went on to its end."""
    seconds_to_step: tuple[float, ...]
    """From each fault after the first step to the next one that was committed; those behind the last step, and of an
    attempt that came to its end before it had died, have none."""
    goodput: float
    """Seconds from the first step to the last without faults, over the same with them."""
    identical: bool
    """Weights, history and model.pt are those of the run without faults."""


class FaultRecord(Record):
    """What `jobs.bench faults` found."""

    subject: str = "faults"
    claim: str = "a run on S3 ends with the same bits, whatever the storage or a kill does to it"
    command: str
    date: str
    seconds: float
    commit: str
    versions: dict[str, str]
    hardware: dict[str, str]
    seconds_without_faults: float
    """From the first of twelve steps to the last."""
    runs: tuple[FaultyRun, ...]

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
    """Markdown of the newest record of a subject."""
    if subject == "proof":
        return _proof_table(newest(Proof, folder, subject))
    if subject == "faults":
        return _faults_table(newest(FaultRecord, folder, subject))
    tables: dict[str, Callable[[tuple[Path, Measurement] | None], str]] = {"numerics": _numerics_table}
    return tables.get(subject, _suite_table)(newest(Measurement, folder, subject))


def _suite_table(found: tuple[Path, Measurement] | None) -> str:
    """A row a run; a recipe without one is unmeasured."""
    runs = found[1].runs if found else ()
    rows = []
    for recipe, published in PUBLISHED.items():
        measured = [table_row(run) for run in runs if run.recipe.name == recipe]
        rows += measured or [(recipe, "unmeasured", *[""] * len(MEASURED), f"{published.accuracy:.4f}")]
    text = _rows(HEADER, rows)
    if found is None:
        return text
    seeds = len({run.seed for run in found[1].runs})
    num_seeds = f"{seeds} seed{'s' * (seeds > 1)}"
    return f"{text}\n\n{_source(found, f'{found[1].seconds / 60:.1f} min without packing; n = {num_seeds}')}"


def _numerics_table(found: tuple[Path, Measurement] | None) -> str:
    """Images/s of elastic numerics beside those of ddp, by the number of workers."""
    header = ("workers", "ddp, images/s", "elastic, images/s", "elastic / ddp", "n each")
    if found is None:
        return _rows(header, [("1", "unmeasured", "unmeasured", "", "")])
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
    return f"{_rows(header, rows)}\n\n{_source(found, f'recipe {found[1].runs[0].recipe.name}; medians')}"


def _proof_table(found: tuple[Path, Proof] | None) -> str:
    header = ("tried", "as it has to be")
    if found is None:
        return _rows(header, [("", "unmeasured")])
    path, record = found
    kinds = list(dict.fromkeys(one.what for one in record.tried))
    counts = {kind: [one for one in record.tried if one.what == kind] for kind in kinds}
    rows = [(kind, f"{sum(one.equal for one in some):,} of {sum(one.n for one in some):,}") for kind, some in counts.items()]
    return f"{_rows(header, rows)}\n\n{_told(path, record.command, 'each row in the record', record.hardware, record)}"


def _faults_table(found: tuple[Path, FaultRecord] | None) -> str:
    header = ("fault", "times", "recovered", "to the next step, median", "p95", "goodput", "the same bits")
    if found is None:
        return _rows(header, [("", "unmeasured", "", "", "", "", "")])
    path, record = found
    groups: dict[str, list[FaultyRun]] = {}
    for run in record.runs:
        for group in (run.fault, "all kills") if run.fault.endswith(" killed") else (run.fault,):
            groups.setdefault(group, []).append(run)
    rows = []
    for fault, some in sorted(groups.items(), key=lambda item: item[0] == "all kills"):
        seconds = [value for one in some for value in one.seconds_to_step]
        median, p95 = (f"{value:.1f} s" for value in np.percentile(seconds, (50, 95))) if seconds else ("", "")
        same = f"{sum(one.identical for one in some)} of {len(some)} runs"
        goodput = f"{statistics.median(one.goodput for one in some):.2f}"
        counts = (str(sum(one.injected for one in some)), str(sum(one.recovered for one in some)))
        rows.append((fault, *counts, median, p95, goodput, same))
    about = f"each step committed, twelve together in {record.seconds_without_faults:.1f} s without faults"
    return f"{_rows(header, rows)}\n\n{_told(path, record.command, about, record.hardware, record)}"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def _source(found: tuple[Path, Measurement], about: str) -> str:
    path, record = found
    return _told(path, record.command, about, record.runs[0].hardware, record)


def _told(
    path: Path, command: str, about: str, hardware: dict[str, str], record: "Measurement | Proof | FaultRecord"
) -> str:
    of = record.runs[0] if isinstance(record, Measurement) else record
    versions, commit = of.versions, of.commit
    return (
        f"`{command}`: {about}; {', '.join(f'{name} {value}' for name, value in hardware.items())}; "
        f"torch {versions['torch']}; commit {commit}; {record.date}. Record: [{path.name}](docs/measurements/{path.name})."
    )
