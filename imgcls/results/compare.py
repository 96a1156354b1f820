"""Records -> the rows of the table, and the answers. The page and the printed table use it."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from imgcls.catalogue.published import PUBLISHED, Published
from imgcls.records import RunResult, SuiteResults
from imgcls.results.statistics import Estimate, Hits, accuracy, difference


@dataclass(frozen=True, slots=True)
class Answer:
    question: str
    verdict: str
    detail: str


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    first: str
    second: str
    asks: frozenset[str]
    """The fields of a recipe whose effect is in question."""


QUESTIONS = (
    Question("Which network?", "resnet18", "basic-cnn", frozenset({"model"})),
    Question("Does regularization help?", "regularized", "scratch", frozenset({"model", "augment"})),
    Question("Does transfer help?", "finetuned", "scratch", frozenset({"init"})),
)


def groups(results: SuiteResults, recipe: str | None = None) -> list[dict[int, RunResult]]:
    """Finished runs by seed, of all recipes or of those with this name. The runs of a group differ in the seed alone."""
    by_request: dict[object, dict[int, RunResult]] = {}
    for run in results.finished:
        if recipe in (None, run.recipe.name):
            by_request.setdefault((run.recipe, run.data_digest), {})[run.seed] = run
    return list(by_request.values())


Predicted = Mapping[str, NDArray[np.void]]
"""By run: what was predicted of each test sample, rows of `records.PREDICTED`."""


def predicted(files: Mapping[str, bytes]) -> Predicted:
    """files: by run, as `RunFolder.predictions` reads them."""
    return {name: np.load(io.BytesIO(data), allow_pickle=False) for name, data in files.items()}


def hits_of(runs: Iterable[RunResult], tested: Predicted) -> Hits | None:
    """None where these runs were not tested on the same images, or one of them did not keep what it predicted."""
    names = [run.name for run in runs]
    tables = [tested[name] for name in names if name in tested]
    if len(tables) < len(names) or not all(np.array_equal(table["sample"], tables[0]["sample"]) for table in tables):
        return None
    return np.stack([table["label"] == table["prediction"] for table in tables])


def of_one(run: RunResult) -> Estimate:
    """Of one run's test accuracy; its count alone decides it."""
    assert run.test is not None
    return accuracy(np.arange(run.test.num_samples)[None] < round(run.test.accuracy * run.test.num_samples))


def estimates(results: SuiteResults, tested: Predicted) -> list[tuple[list[RunResult], Estimate]]:
    """Of each recipe the finished seeds and their estimate; a seed alone where they cannot be taken together."""
    found = list[tuple[list[RunResult], Estimate]]()
    for group in groups(results):
        runs = list(group.values())
        hits = hits_of(runs, tested) if len(runs) > 1 else None
        found += [([run], of_one(run)) for run in runs] if hits is None else [(runs, accuracy(hits))]
    return found


NOT_PAIRED = "their test images differ, or an earlier version tested one of them and kept no predictions.npy"
CONFUSED = 10


def most_confused(result: RunResult) -> list[tuple[str, str, int, int]]:
    """(label, prediction, how often, test samples of the label) of the most frequent mistakes, the worst first."""
    assert result.test is not None
    matrix, names = np.array(result.test.confusion), result.class_names
    wrong = matrix - np.diag(np.diag(matrix))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
    cells = zip(*np.unravel_index(worst, wrong.shape), strict=True)
    return [(names[i], names[j], int(wrong[i, j]), int(matrix[i].sum())) for i, j in cells if wrong[i, j]]


def published_beside(run: RunResult) -> Published | None:
    """The published figure of the same recipe on the same photographs."""
    figure = PUBLISHED.get(run.recipe.name)
    return figure if figure and figure.dataset == run.recipe.dataset and not run.synthetic else None


def answers(results: SuiteResults, tested: Predicted) -> list[Answer]:
    """One for each question whose two recipes the suite has."""
    recipes = {run.recipe.name for run in results.runs}
    return [_answer(results, question, tested) for question in QUESTIONS if {question.first, question.second} <= recipes]


def _answer(results: SuiteResults, question: Question, tested: Predicted) -> Answer:
    firsts, seconds = groups(results, question.first), groups(results, question.second)
    for name, candidates in ((question.first, firsts), (question.second, seconds)):
        if len(candidates) > 1:
            return Answer(question.text, "not answered", f"runs of {name} differ in their settings or data")
    a, b = (candidates[0] if candidates else {} for candidates in (firsts, seconds))
    shared = sorted(a.keys() & b.keys())
    if not shared:
        missing = question.first if not a else question.second
        return Answer(question.text, "not answered", f"{missing} is not finished with a seed that both have")
    hits = hits_of([*(a[seed] for seed in shared), *(b[seed] for seed in shared)], tested)
    if hits is None:
        return Answer(question.text, "not answered", NOT_PAIRED)
    gap = difference(hits[: len(shared)], hits[len(shared) :])
    detail = f"{question.first} minus {question.second}: {_told(gap, question)}"
    detail += f" Minutes of training: {_minutes(results, question.first, a)}; {_minutes(results, question.second, b)}."
    if other := _other_differences(a[shared[0]], b[shared[0]], question):
        detail += f" They also differ in {other}."
    better = {gap.low > 0: question.first, gap.high < 0: question.second}.get(True)
    verdict = f"{better} is better{', by one seed' * (len(shared) == 1)}" if better else "not distinguishable by these runs"
    return Answer(question.text, verdict, detail)


def _told(gap: Estimate, question: Question) -> str:
    sure = (
        f"{gap.probability:.3f}" if 0.001 <= gap.probability <= 0.999 else "over 0.999" if gap.center > 0 else "under 0.001"
    )
    return (
        f"{100 * gap.center:+.1f} points, 95% interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f} (it covers {gap.of}). "
        f"{question.first} is the better one with a probability of {sure}. A true difference of "
        f"{100 * gap.detectable:.1f} points would be found in four of five cases."
    )


def _minutes(results: SuiteResults, recipe: str, group: dict[int, RunResult]) -> str:
    """Mean of the seeds, with what their sources took."""
    took = {run.name: run.seconds.get("fit", 0.0) / 60 for run in results.finished}
    sources = [took.get(run.init.run, 0.0) if run.init else 0.0 for run in group.values()]
    of_source = f", {fmean(sources):.1f} of them for its source" if any(sources) else ""
    return f"{recipe} {fmean(took[run.name] for run in group.values()) + fmean(sources):.1f}{of_source}"


def _other_differences(a: RunResult, b: RunResult, question: Question) -> str:
    """Other fields in which the two recipes differ: they too may have caused the difference."""
    first, second = a.recipe.to_json(), b.recipe.to_json()
    return ", ".join(name for name in first if first[name] != second[name] and name not in question.asks | {"name"})


MEASURED = ("test accuracy", "95%", "test n", "test loss", "val accuracy", "epochs", "images/s", "min")
HEADER = ("run", "status", *MEASURED, "published")


def table_row(run: RunResult) -> tuple[str, ...]:
    """The cells of one run under HEADER. The interval is its test set's; `min` are the minutes from its start to its end."""
    published = published_beside(run)
    beside = f"{published.accuracy:.4f}" if published else ""
    if run.test is None or run.val is None:
        return (run.name, run.status, *[""] * len(MEASURED), beside)
    interval = of_one(run)
    return (
        run.name,
        run.status,
        f"{run.test.accuracy:.4f}",
        f"{interval.low:.3f}-{interval.high:.3f}",
        f"{run.test.num_samples:,}",
        f"{run.test.loss:.4f}",
        f"{run.val.accuracy:.4f}",
        f"{run.epochs}",
        f"{run.images_per_s:,.0f}" if run.images_per_s else "",
        f"{run.seconds.get('fit', 0) / 60:.1f}",
        beside,
    )
