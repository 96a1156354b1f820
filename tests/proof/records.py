"""What `make proof` and `bench faults` leave on record, and the papers' tables of all records."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Literal, TypeVar

import numpy as np

from imgcls.catalogue import CATALOGUES
from imgcls.catalogue.published import PUBLISHED
from imgcls.recipe import changes_between
from imgcls.records import Record, RunResult
from imgcls.results.compare import HEADER, MEASURED, published_beside, table_row
from imgcls.results.statistics import Difference, Estimate
from tests.proof.measurement import Figures, Measurement


class Proved(Record):
    what: str
    n: int
    """Number of tries."""
    equal: int
    """Number of tries whose result was the expected one."""
    detail: str


class Proof(Figures):
    """What `make proof` tried, or a part of it with a record of its own, and whether it came out equal."""

    subject: str = "proof"
    claim: str = "a run that was killed, moved or cut otherwise ends with the bits of one that was not"
    command: str = "make proof"
    tried: tuple[Proved, ...]


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


class FaultRecord(Figures):
    """What `jobs.bench faults` found."""

    subject: str = "faults"
    claim: str = "a run on S3 ends with the same bits, whatever the storage or a kill does to it"
    command: str
    seconds: float
    seconds_without_faults: float
    """From the first of twelve steps to the last."""
    runs: tuple[FaultyRun, ...]


class BesidePublished(Record):
    """The seeds of a recipe, tested on the best checkpoint and on the last weights."""

    recipe: str
    published: float
    seeds: tuple[int, ...]
    best_epochs: tuple[int, ...]
    last_epochs: tuple[int, ...]
    best: Estimate
    last: Estimate
    last_minus_best: Difference


class PublishedRecord(Figures):
    """What `jobs.bench published` found."""

    claim: str = "what it does to our figures to test the last weights, as three of the published scripts did"
    command: str
    rows: tuple[BesidePublished, ...]


Kind = Literal["peer", "ours", "limit", "by hand"]


class Timed(Record):
    """One way to do a thing, measured again and again in turn with the others of its group."""

    group: str
    """What is done: only members of one group are compared."""
    name: str
    kind: Kind
    unit: str
    """`images/s`, of which more is better, or a unit of which less is."""
    values: tuple[float, ...]
    """One a turn: those of one place were measured one after the other."""
    median: float
    n: int


class SpeedRecord(Figures):
    """What `jobs.bench speed` found."""

    claim: str
    command: str
    seconds: float
    timed: tuple[Timed, ...]
    notes: tuple[str, ...] = ()

    def groups(self) -> dict[str, list[Timed]]:
        return {
            name: [one for one in self.timed if one.group == name] for name in dict.fromkeys(o.group for o in self.timed)
        }


R = TypeVar("R", bound=Record)


def by_day(folder: Path, subject: str) -> list[Path]:
    """The newest first."""
    return sorted(folder.glob(f"{subject}_*.json"), key=lambda path: (path.stem.rpartition("_")[2], path.name), reverse=True)


def newest(kind: type[R], folder: Path, subject: str) -> tuple[Path, R] | None:
    paths = by_day(folder, subject)
    return (paths[0], kind.from_bytes(paths[0].read_bytes(), where=str(paths[0]))) if paths else None


def measurements(folder: Path, subject: str) -> list[tuple[Path, Measurement]]:
    return [(path, Measurement.from_bytes(path.read_bytes(), where=str(path))) for path in by_day(folder, subject)]


def table_of(subject: str, folder: Path) -> str:
    """Markdown of the newest record of a subject: one of `TABLES`, else a suite."""
    return TABLES[subject](folder) if subject in TABLES else suite_table(subject, folder)


def suite_table(subject: str, folder: Path) -> str:
    """A row a recipe, or a seed, of the newest record that has it; one without is unmeasured."""
    rows, used = list[tuple[str, ...]](), dict[Path, tuple[Measurement, list[str]]]()
    measured = measurements(folder, subject)
    for recipe in CATALOGUES[subject.removeprefix("suite-")]:
        for path, record in measured:
            runs = [run for run in record.runs if run.recipe.name == recipe.name]
            if runs:
                estimate = record.estimates.get(recipe.name)
                rows += [table_row(run) for run in runs] if estimate is None else [row_of_seeds(runs, estimate)]
                used.setdefault(path, (record, []))[1].append(recipe.name)
                break
        else:
            published = PUBLISHED.get(recipe.name)
            beside = f"{published.accuracy:.4f}" if published else ""
            rows.append((recipe.name, "unmeasured", *[""] * len(MEASURED), beside))
    sources = [
        f"{', '.join(names)}: {suite_source(path, record)}" if len(used) > 1 else suite_source(path, record)
        for path, (record, names) in used.items()
    ]
    return "\n\n".join([rows_of(HEADER, rows), *sources])


def suite_source(path: Path, record: Measurement) -> str:
    seeds = len({run.seed for run in record.runs})
    wall = f"{record.seconds / 60:.1f} min without packing" if record.seconds else "several commands, one after another"
    about = f"{wall}; n = {seeds} seed{'s' * (seeds > 1)}"
    return source(path, record.command, about, record.runs[0])


def row_of_seeds(runs: Sequence[RunResult], estimate: Estimate) -> tuple[str, ...]:
    """Under HEADER: means of the seeds, with the interval that covers seeds and test images."""
    one, tests, vals = runs[0], [run.test for run in runs if run.test], [run.val for run in runs if run.val]
    published = published_beside(one)
    epochs = [run.epochs for run in runs]
    return (
        f"{one.recipe.name}, {len(runs)} seeds",
        one.status,
        f"{estimate.center:.4f}",
        f"{estimate.low:.3f}-{estimate.high:.3f}",
        f"{tests[0].num_samples:,}",
        f"{mean(test.loss for test in tests):.4f}",
        f"{mean(val.accuracy for val in vals):.4f}",
        "-".join(map(str, dict.fromkeys([min(epochs), max(epochs)]))),
        f"{mean(run.images_per_s or 0.0 for run in runs):,.0f}",
        f"{mean(run.seconds['fit'] for run in runs) / 60:.1f}",
        f"{published.accuracy:.4f}" if published else "",
    )


def answers_table(folder: Path, catalogue: str) -> str:
    """What the newest record that answers anything answers, in words; with its figure where it has one."""
    for path, record in measurements(folder, f"suite-{catalogue}"):
        if any(one.verdict != "not answered" for one in record.answers):
            figure = path.with_suffix(".svg")
            drawn = [f"![Test accuracy against the number of labels](measurements/{figure.name})"] * figure.exists()
            said = "\n".join(f"- **{one.question}** {one.verdict}. {one.detail}" for one in record.answers)
            return "\n\n".join([said, *drawn, suite_source(path, record)])
    return "Unmeasured."


def search_table(folder: Path, recipe: str) -> str:
    """A row a trial, the best by the search's metric first: what it changes, and how it ended."""
    found = newest(Measurement, folder, f"search-{recipe}")
    header = ("trial", "val accuracy", "val loss", "epochs", "ended", "changes")
    if found is None:
        return rows_of(header, [("", "unmeasured", *[""] * 4)])
    path, record = found
    search, rows = record.search, dict[tuple[float, str], tuple[str, ...]]()
    assert search is not None
    for run in record.runs:
        changed = changes_between(search.recipe, run.recipe)
        changes = ", ".join(f"{name} {value}" for name, value in changed.items() if name != "name")
        accuracy, loss, epochs, place = "", "", "", math.inf
        if run.val is not None:
            accuracy, loss, epochs = f"{run.val.accuracy:.4f}", f"{run.val.loss:.4f}", str(run.epochs)
            place = run.val.loss if search.metric == "val/loss" else -run.val.accuracy
        rows[place, run.name] = (run.name, accuracy, loss, epochs, run.error or run.status, changes)
    base = next((one for one in CATALOGUES[record.runs[0].catalogue] if one.name == recipe), search.recipe)
    fixed = ", ".join(f"{name} {value}" for name, value in changes_between(base, search.recipe).items()) or "no changes"
    about = f"around `{recipe}` of {record.runs[0].catalogue} with {fixed}; each at its best checkpoint"
    done = next(run for run in record.runs if run.hardware)
    return f"{rows_of(header, [rows[key] for key in sorted(rows)])}\n\n{source(path, record.command, about, done)}"


def published_table(folder: Path) -> str:
    """The published figures beside ours, on the best checkpoint and on the last weights."""
    found = newest(PublishedRecord, folder, "published-paper")
    header = ("recipe", "n seeds", "published", "ours: last weights", "ours: best checkpoint", "last minus best")
    measured = {row.recipe: row for row in found[1].rows} if found else {}
    rows = []
    for name, published in PUBLISHED.items():
        figure = f"{published.accuracy:.4f} ({published.note})"
        if (row := measured.get(name)) is None:
            rows.append((name, "", figure, "unmeasured", "", ""))
            continue
        gap = row.last_minus_best
        last, best = (f"{of.center:.4f} ({of.low:.3f}-{of.high:.3f})" for of in (row.last, row.best))
        ours = (f"{last}, {_epochs(row.last_epochs)}", f"{best}, {_epochs(row.best_epochs)}")
        rows.append((name, str(len(row.seeds)), figure, *ours, f"{gap.center:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"))
    sources = [source(found[0], found[1].command, "means with 95% intervals", found[1])] if found else []
    return "\n\n".join([rows_of(header, rows), *sources])


def _epochs(of_seeds: Sequence[int]) -> str:
    return f"epoch {'-'.join(map(str, dict.fromkeys([min(of_seeds), max(of_seeds)])))}"


def numerics_table(folder: Path) -> str:
    """Images/s of elastic numerics beside those of ddp, by the number of workers."""
    found = newest(Measurement, folder, "numerics")
    header = ("workers", "ddp, images/s", "elastic, images/s", "elastic / ddp", "n each")
    if found is None:
        return rows_of(header, [("1", "unmeasured", "unmeasured", "", "")])
    path, record = found
    rates: dict[tuple[int, str], list[float]] = {}
    for run in record.runs:
        assert run.placement is not None
        rates.setdefault((run.placement.num_workers, run.recipe.numerics), []).append(run.images_per_s or 0.0)
    rows = []
    for workers in sorted({workers for workers, _ in rates}):
        ddp, elastic = rates[workers, "ddp"], rates[workers, "elastic"]
        ratio = statistics.median(e / d for e, d in zip(elastic, ddp, strict=True))
        medians = (f"{statistics.median(values):.0f}" for values in (ddp, elastic))
        rows.append((str(workers), *medians, f"{ratio:.2f}", str(len(ddp))))
    about = f"recipe {record.runs[0].recipe.name}; medians"
    return f"{rows_of(header, rows)}\n\n{source(path, record.command, about, record.runs[0])}"


def proof_table(folder: Path, subject: str = "proof", *, details: bool = False) -> str:
    """details: a column with what a kind's one or two tries took."""
    found = newest(Proof, folder, subject)
    header = ("tried", "as it has to be", *["what was seen"] * details)
    if found is None:
        return rows_of(header, [("", "unmeasured", *[""] * details)])
    path, record = found
    kinds = list(dict.fromkeys(one.what for one in record.tried))
    counts = {kind: [one for one in record.tried if one.what == kind] for kind in kinds}
    rows = [
        (
            kind,
            f"{sum(one.equal for one in some):,} of {sum(one.n for one in some):,}",
            *["; ".join(one.detail for one in some) if len(some) < 3 else "each in the record"] * details,
        )
        for kind, some in counts.items()
    ]
    return f"{rows_of(header, rows)}\n\n{source(path, record.command, 'each row in the record', record)}"


def faults_table(folder: Path) -> str:
    found = newest(FaultRecord, folder, "faults")
    header = ("fault", "times", "recovered", "to the next step, median", "p95", "goodput", "the same bits")
    if found is None:
        return rows_of(header, [("", "unmeasured", "", "", "", "", "")])
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
    return f"{rows_of(header, rows)}\n\n{source(path, record.command, about, record)}"


HEADLINES = {
    "data": "Imagenette 64 px gray, flip, later epochs",
    "step": "step, resnet18",
    "start": "start, nothing is up, 1 worker",
    "suite": "suite quick",
}
"""Of each subject of `bench speed`, the group that stands in the README."""


def times_as_quick(ours: Timed, other: Timed) -> float:
    """The median over the turns."""
    ratios = (mine / theirs for mine, theirs in zip(ours.values, other.values, strict=True))
    return statistics.median(ratios if ours.unit == "images/s" else (1 / ratio for ratio in ratios))


def ours_of(group: Sequence[Timed]) -> Timed:
    """The one that a user gets: the last of ours."""
    return [one for one in group if one.kind == "ours"][-1]


def best_other(group: Sequence[Timed]) -> Timed | None:
    """Of peers and loops by hand."""
    others = [one for one in group if one.kind in ("peer", "by hand")]
    return max(others, key=lambda one: one.median if one.unit == "images/s" else -one.median, default=None)


def speed_table(what: str, folder: Path) -> str:
    """All that `bench speed WHAT` measured: ours, the peers, the limit."""
    found = newest(SpeedRecord, folder, f"speed-{what}")
    header = ("what", "by", "median", "least to most", "imgcls is so many times as quick", "n")
    if found is None:
        return rows_of(header, [("", "unmeasured", "", "", "", "")])
    path, record = found
    rows = []
    for group, members in record.groups().items():
        ours = ours_of(members)
        for number, one in enumerate(members):
            spread = f"{_amount(min(one.values))} to {_amount(max(one.values))}"
            beside = "" if one is ours else f"{times_as_quick(ours, one):.2f}"
            name = f"{one.name} (limit)" if one.kind == "limit" else one.name
            first = "" if number else group
            rows.append((first, name, f"{_amount(one.median)} {one.unit}", spread, beside, str(one.n)))
    told = "\n".join(f"- {note}" for note in record.notes)
    return f"{rows_of(header, rows)}\n\n{told}\n\n{source(path, record.command, 'medians, ratios by turn', record)}"


def speeds_table(folder: Path) -> str:
    """A row a subject: ours beside the best of the others, in the group that says most."""
    header = ("what", "best of the others", "imgcls", "times as quick", "n")
    rows, sources = list[tuple[str, ...]](), dict[str, list[str]]()
    for what, group in HEADLINES.items():
        found = newest(SpeedRecord, folder, f"speed-{what}")
        members = found[1].groups().get(group, []) if found else []
        best = best_other(members)
        if found is None or best is None:
            rows.append((group, "unmeasured", "", "", ""))
            continue
        ours = ours_of(members)
        theirs, mine = f"{_amount(best.median)} {best.unit}, {best.name}", f"{_amount(ours.median)} {ours.unit}"
        rows.append((group, theirs, mine, f"{times_as_quick(ours, best):.2f}", str(ours.n)))
        sources.setdefault(where_from(found[1], found[0]), []).append(f"[record](docs/measurements/{found[0].name})")
    return "\n\n".join([rows_of(header, rows), *(f"{at}: {', '.join(paths)}." for at, paths in sources.items())])


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


PROVED_APART = ("autoscaling", "hosts", "recovery", "goodput", "search")
TABLES: dict[str, Callable[[Path], str]] = {
    "numerics": numerics_table,
    "proof": proof_table,
    **{part: partial(proof_table, subject=part, details=True) for part in PROVED_APART},
    "faults": faults_table,
    "published-paper": published_table,
    "search-basic-cnn": partial(search_table, recipe="basic-cnn"),
    **{f"answers-{catalogue}": partial(answers_table, catalogue=catalogue) for catalogue in ("paper", "transfer")},
    "speed": speeds_table,
    **{f"speed-{what}": partial(speed_table, what) for what in HEADLINES},
}


def rows_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def source(path: Path, command: str, about: str, at: RunResult | Figures) -> str:
    """The line under a table. at: what has its commit and its hardware."""
    return f"`{command}`: {about}; {where_from(at, path)}. [Record](docs/measurements/{path.name})."


def where_from(at: RunResult | Figures, path: Path) -> str:
    """Hardware, torch, commit and day of a record."""
    hardware = (f"{value} CPUs" if name == "cpus" else value for name, value in at.hardware.items())
    day = path.stem.rpartition("_")[2]
    return f"{', '.join(hardware)}; torch {at.versions['torch']}; commit {at.commit}; {day}"
