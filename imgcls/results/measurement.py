"""Figures as records that stay: what was found, by which command, on what."""

from datetime import date

from imgcls.catalogue import CATALOGUES
from imgcls.errors import DataError
from imgcls.records import Record, RunResult, SuiteResults


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
