"""Records -> the rows of the table, and the answers. The page and the printed table use it."""

from dataclasses import dataclass

import numpy as np

from imgcls.catalogue.published import PUBLISHED, Published
from imgcls.records import RunResult, SuiteResults
from imgcls.results.statistics import Interval, accuracy_interval, difference_interval


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


def counts(result: RunResult) -> tuple[int, int]:
    """(correct, counted) on the test split."""
    assert result.test is not None
    return round(result.test.accuracy * result.test.num_samples), result.test.num_samples


def interval_of(group: dict[int, RunResult]) -> Interval:
    return accuracy_interval([counts(run) for run in group.values()])


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


def answers(results: SuiteResults) -> list[Answer]:
    """One for each question whose two recipes the suite has."""
    recipes = {run.recipe.name for run in results.runs}
    return [_answer(results, question) for question in QUESTIONS if {question.first, question.second} <= recipes]


def _answer(results: SuiteResults, question: Question) -> Answer:
    firsts, seconds = groups(results, question.first), groups(results, question.second)
    for name, candidates in ((question.first, firsts), (question.second, seconds)):
        if len(candidates) > 1:
            return Answer(question.text, "not answered", f"runs of {name} differ in their settings or data")
    a, b = (candidates[0] if candidates else {} for candidates in (firsts, seconds))
    shared = sorted(a.keys() & b.keys())
    if not shared:
        missing = question.first if not a else question.second
        return Answer(question.text, "not answered", f"{missing} is not finished with a seed that both have")
    gap = difference_interval([counts(a[seed]) for seed in shared], [counts(b[seed]) for seed in shared])
    by = "" if len(shared) > 1 else ", by one seed"
    size = f"{100 * gap.center:+.1f} points, 95% interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
    detail = f"{question.first} minus {question.second}: {size} (it covers {gap.of})"
    if other := _other_differences(a[shared[0]], b[shared[0]], question):
        detail += f". They also differ in {other}."
    if gap.low > 0:
        verdict = f"{question.first} is better{by}"
    elif gap.high < 0:
        verdict = f"{question.second} is better{by}"
    else:
        verdict = "not decided by these runs"
    return Answer(question.text, verdict, detail)


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
    interval = accuracy_interval([counts(run)])
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
