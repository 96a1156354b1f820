"""A suite's figures as a record that stays: what was found, by which command, on what. The README's tables read it."""

from datetime import date
from pathlib import Path

from imgcls.catalogue import CATALOGUES
from imgcls.catalogue.published import PUBLISHED
from imgcls.errors import DataError
from imgcls.records import Record, RunResult, SuiteResults
from imgcls.results.compare import HEADER, MEASURED, table_row


class Measurement(Record):
    """The finished runs of one suite, at one commit, on one kind of hardware."""

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
        hardware = self.runs[0].hardware
        where = hardware.get("gpu", f"{hardware['cpus']}cpu-{hardware['vectors']}").lower().replace(" ", "-")
        return f"{self.subject}_{where}_{self.date}.json"


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
    if len({str(one.hardware) for one in done}) > 1:
        raise DataError(f"{results.id} ran on several kinds of hardware: a record is of one\n  do: take another --id")
    commits = {one.commit or "unknown" for one in done}
    if len(commits) > 1 or any(c == "unknown" or c.endswith("+changes") for c in commits):
        raise DataError(
            f"{results.id} ran at {', '.join(sorted(commits))}: a figure needs one commit, with nothing changed\n"
            "  do: commit, and run it again under another --id"
        )
    return Measurement(
        subject=f"suite-{results.catalogue}",
        claim=f"test accuracy of the catalogue {results.catalogue}, each run tested once on its best checkpoint",
        command=results.command,
        date=date.today().isoformat(),
        seconds=results.seconds,
        runs=tuple(one.model_copy(update={"examples": ()}) for one in done),
    )


def newest(folder: Path, subject: str) -> tuple[Path, Measurement] | None:
    found = sorted(folder.glob(f"{subject}_*.json"), key=lambda path: path.stem.rpartition("_")[2])
    return (found[-1], Measurement.from_bytes(found[-1].read_bytes(), where=str(found[-1]))) if found else None


def markdown_table(found: tuple[Path, Measurement] | None) -> str:
    """A row a run; a recipe without one is unmeasured."""
    runs = found[1].runs if found else ()
    rows = [HEADER, ("---",) * len(HEADER)]
    for recipe, published in PUBLISHED.items():
        measured = [table_row(run) for run in runs if run.recipe.name == recipe]
        rows += measured or [(recipe, "unmeasured", *[""] * len(MEASURED), f"{published.accuracy:.4f}")]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if found is None:
        return "\n".join(lines)
    path, record = found
    first, seeds = record.runs[0], len({run.seed for run in record.runs})
    lines.append("")
    lines.append(
        f"`{record.command}`: {record.seconds / 60:.1f} min without packing; n = {seeds} seed{'s' * (seeds > 1)}; "
        f"{', '.join(f'{name} {value}' for name, value in first.hardware.items())}; torch {first.versions['torch']}; "
        f"commit {first.commit}; {record.date}. Record: [{path.name}](docs/measurements/{path.name})."
    )
    return "\n".join(lines)
