"""Figures as records that stay: what was found, by which command, on what."""

from dataclasses import replace
from datetime import date

from pydantic import Field

from imgcls import records
from imgcls.catalogue import CATALOGUES
from imgcls.errors import DataError
from imgcls.records import Record, RunResult, SuiteResults
from imgcls.results.compare import Answer, Predictions, answers, estimates, read_predictions, transfers
from imgcls.results.page import figures
from imgcls.results.statistics import Estimate
from imgcls.runs import SuiteFolder
from imgcls.search import Search


class Measurement(Record):
    """Finished runs at one commit, on one kind of hardware; of a search all trials."""

    subject: str
    claim: str
    command: str
    date: str
    seconds: float
    """Of the command, without packing; 0 where it has only done what others had left."""
    runs: tuple[RunResult, ...]
    """Without their example images."""
    answers: tuple[Answer, ...] = ()
    estimates: dict[str, Estimate] = Field(default={})
    """By recipe with several seeds, all of which kept what they predicted."""
    search: Search | None = None

    @property
    def file_name(self) -> str:
        return file_name(self.subject, next(run.hardware for run in self.runs if run.hardware), self.date)


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


def measure(results: SuiteResults, predictions: Predictions) -> Measurement:
    """Raises DataError where a figure would not be honest: synthetic data, changed code, or nothing finished."""
    done = results.finished
    if not done:
        raise DataError(f"{results.id}: no run is finished, there is nothing to record")
    if results.synthetic:
        raise DataError(f"{results.id} is SYNTHETIC: its figures say nothing, and are not recorded")
    if len({(str(one.hardware), one.catalogue) for one in done}) > 1:
        raise DataError(
            f"{results.id} is of several kinds of hardware or catalogues: a record is of one\n  do: take another --id"
        )
    search = results.search
    if search is None:
        recipes = CATALOGUES[done[0].catalogue]
        subject = f"suite-{results.catalogue}"
        claim = f"test accuracy of the catalogue {results.catalogue}, each run tested once on its best checkpoint"
    else:
        recipes = replace(search, num_trials=len(results.runs)).trials()
        subject = f"search-{search.recipe.name}"
        claim = f"{search.metric} of the trials of a search; none of them is tested"
        if any(run.status == "open" for run in results.runs):
            raise DataError(f"{results.id} has trials that are not over\n  do: the same command goes on with them")
    if changed := [one.name for one in done if one.recipe not in recipes]:
        raise DataError(f"{results.id}: {', '.join(changed)} differ from the catalogue or the trials, and are not recorded")
    check_commit({one.commit or "unknown" for one in done}, results.id)
    by_recipe: dict[str, list[Estimate]] = {}
    for runs, estimate in estimates(results, predictions):
        by_recipe.setdefault(runs[0].recipe.name, []).append(estimate)
    return Measurement(
        subject=subject,
        claim=claim,
        command=results.command,
        date=date.today().isoformat(),
        seconds=results.seconds if {one.name for one in done} <= results.took.keys() else 0.0,
        runs=tuple(one.model_copy(update={"examples": ()}) for one in (results.runs if search else done)),
        answers=tuple(answers(results, predictions)),
        estimates={name: found[0] for name, found in by_recipe.items() if len(found) == 1 and found[0].num_seeds > 1},
        search=search,
    )


def measure_suite(suite: SuiteFolder) -> tuple[Measurement, str]:
    """Its record, and its figure of labels as SVG, empty where it has none. Raises DataError, as `measure`."""
    results = records.read(SuiteResults, suite.results_url)
    predictions = read_predictions(suite.predictions(results))
    figure = figures.styled(figures.labels)(estimates(results, predictions), transfers(results.runs))
    return measure(results, predictions), figure


def check_commit(commits: set[str], what: str) -> None:
    """Raises DataError where the code is not that of one commit."""
    if len(commits) > 1 or any(c == "unknown" or c.endswith("+changes") for c in commits):
        raise DataError(
            f"{what} ran at {', '.join(sorted(commits))}: a figure needs one commit, with nothing changed\n"
            "  do: commit, and run it again under another --id"
        )
