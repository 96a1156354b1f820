"""Records -> the rows of the table, and the answers. The page and the printed table use it."""

import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from imgcls.catalogue.published import PUBLISHED, Published
from imgcls.records import RunResult, Scores, SuiteResults
from imgcls.results.statistics import Difference, Estimate, Hits, accuracy, difference
from imgcls.runs import SuiteFolder


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
)


def groups(results: SuiteResults, recipe: str | None = None) -> list[dict[int, RunResult]]:
    """Finished runs by seed, of all recipes or of those with this name. The runs of a group differ in the seed alone."""
    by_request: dict[object, dict[int, RunResult]] = {}
    for run in results.finished:
        if recipe in (None, run.recipe.name):
            by_request.setdefault((run.recipe, run.data_digest), {})[run.seed] = run
    return list(by_request.values())


Predictions = Mapping[str, NDArray[np.void]]
"""By run: a row a test sample, columns as in `records.PREDICTED`."""


def read_predictions(files: Mapping[str, bytes]) -> Predictions:
    """files: by run, as `RunFolder.predictions` reads them."""
    return {name: np.load(io.BytesIO(data), allow_pickle=False) for name, data in files.items()}


def hits_of(runs: Sequence[RunResult], tables: Sequence[NDArray[np.void]]) -> Hits | None:
    """None where they were not all tested on the same images."""
    alike = all(np.array_equal(table[["sample", "label"]], tables[0][["sample", "label"]]) for table in tables)
    if not alike or len({run.data_digest for run in runs}) > 1:
        return None
    return np.stack([table["label"] == table["prediction"] for table in tables])


def of_scores(scores: Scores) -> Estimate:
    """Of one run's accuracy; its count alone decides it."""
    return accuracy(np.arange(scores.num_samples)[None] < round(scores.accuracy * scores.num_samples))


def estimates(results: SuiteResults, predictions: Predictions) -> list[tuple[list[RunResult], Estimate]]:
    """Of each recipe the finished seeds and their estimate; a seed alone where it did not keep what it predicted."""
    found = list[tuple[list[RunResult], Estimate]]()
    for group in groups(results):
        kept = [run for run in group.values() if run.name in predictions]
        hits = hits_of(kept, [predictions[run.name] for run in kept]) if len(kept) > 1 else None
        together = [] if hits is None else kept
        found += [(together, accuracy(hits))] if hits is not None else []
        found += [([run], of_scores(run.test)) for run in group.values() if run.test and run not in together]
    return found


NOT_PAIRED = "they were not tested on the same images, or what was predicted of them was not kept"
CONFUSED = 10


def most_confused(matrix: NDArray[np.int_], names: tuple[str, ...]) -> list[tuple[str, str, int, int]]:
    """(label, prediction, how often, test samples of the label) of the most frequent mistakes, the worst first."""
    wrong = matrix - np.diag(np.diag(matrix))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
    cells = zip(*np.unravel_index(worst, wrong.shape), strict=True)
    return [(names[i], names[j], int(wrong[i, j]), int(matrix[i].sum())) for i, j in cells if wrong[i, j]]


def published_beside(run: RunResult) -> Published | None:
    """The published figure of the same recipe on the same photographs."""
    figure = PUBLISHED.get(run.recipe.name)
    return figure if figure and figure.dataset == run.recipe.dataset and not run.synthetic else None


def answers(results: SuiteResults, predictions: Predictions) -> list[Answer]:
    """One for each question whose two recipes the suite has; on transfer for each `finetuned...` with its `scratch...`."""
    recipes, pairs = {run.recipe.name for run in results.runs}, transfers(results.runs)
    labels = {run.recipe.name: f"with {run.num_train:,} labels" for run in results.finished}
    asked = [*QUESTIONS]
    for first, second in pairs.items():
        which = f", {labels.get(first, first)}" if len(pairs) > 1 else ""
        asked.append(Question(f"Does transfer help{which}?", first, second, frozenset({"init"})))
    return [_answer(results, question, predictions) for question in asked if {question.first, question.second} <= recipes]


def transfers(runs: Sequence[RunResult]) -> dict[str, str]:
    """Each `finetuned...` recipe of a suite, with the `scratch...` that it is compared with."""
    recipes = dict.fromkeys(run.recipe.name for run in runs)
    pairs = {name: name.replace("finetuned", "scratch", 1) for name in recipes if name.startswith("finetuned")}
    return {name: other for name, other in pairs.items() if other in recipes}


def _answer(results: SuiteResults, question: Question, predictions: Predictions) -> Answer:
    firsts, seconds = groups(results, question.first), groups(results, question.second)
    for name, candidates in ((question.first, firsts), (question.second, seconds)):
        if len(candidates) > 1:
            return Answer(question.text, "not answered", f"runs of {name} differ in their settings or data")
    a, b = (candidates[0] if candidates else {} for candidates in (firsts, seconds))
    if not a.keys() & b.keys():
        missing = question.first if not a else question.second
        return Answer(question.text, "not answered", f"{missing} is not finished with a seed that both have")
    first, second, gap = paired(a, predictions, b, predictions)
    if gap is None:
        return Answer(question.text, "not answered", NOT_PAIRED)
    detail = f"{question.first} minus {question.second}: {_in_words(gap, question.first)}"
    detail += f" Minutes from start to end: {_minutes(results, first)}; {_minutes(results, second)}."
    if other := _other_differences(first[0], second[0], question):
        detail += f" They also differ in {other}."
    return Answer(question.text, verdict_of(gap, question.first, question.second), detail)


def verdict_of(gap: Difference, first: str, second: str) -> str:
    better = first if gap.low > 0 else second if gap.high < 0 else None
    by = ", by one seed" if gap.num_seeds == 1 else ""
    return f"{better} is better{by}" if better else "not distinguishable by these runs"


def paired(
    a: Mapping[int, RunResult], of_a: Predictions, b: Mapping[int, RunResult], of_b: Predictions
) -> tuple[list[RunResult], list[RunResult], Difference | None]:
    """The seeds of both that kept what they predicted, and `a` minus `b`; None where they were tested on other images."""
    seeds = [seed for seed in sorted(a.keys() & b.keys()) if a[seed].name in of_a and b[seed].name in of_b]
    first, second = [a[seed] for seed in seeds], [b[seed] for seed in seeds]
    tables = [*(of_a[run.name] for run in first), *(of_b[run.name] for run in second)]
    hits = hits_of([*first, *second], tables) if seeds else None
    return first, second, None if hits is None else difference(hits[: len(seeds)], hits[len(seeds) :])


def beside(a: SuiteResults, of_a: Predictions, b: SuiteResults, of_b: Predictions) -> list[tuple[str, ...]]:
    """Two suites, under a header: each recipe's accuracy in both, by the seeds of both, and `b` minus `a`."""
    rows: list[tuple[str, ...]] = [("recipe", "seeds", "test n", a.id, b.id, "difference", "95%", "verdict")]
    for name in dict.fromkeys(run.recipe.name for run in (*a.runs, *b.runs)):
        ours, theirs = groups(a, name), groups(b, name)
        common = len(ours) == len(theirs) == 1 and ours[0].keys() & theirs[0].keys()
        second, first, gap = paired(theirs[0], of_b, ours[0], of_a) if common else ([], [], None)
        if gap is None:
            why = NOT_PAIRED if common else "no seed of it is finished in both, or it has several settings in one"
            rows.append((name, *[""] * 6, f"not compared: {why}"))
            continue
        means = (f"{mean([run.test.accuracy for run in runs if run.test]):.4f}" for runs in (first, second))
        count = first[0].test.num_samples if first[0].test else 0
        figures = (f"{gap.center:+.4f}", f"{gap.low:+.4f} to {gap.high:+.4f}", verdict_of(gap, b.id, a.id))
        rows.append((name, f"{len(first)}", f"{count:,}", *means, *figures))
    return rows


def command_of_best(results: SuiteResults) -> str:
    """Trains the recipe of a search's best trial, and tests it."""
    assert results.best is not None
    words = ["python", "-m", "jobs.train", "--recipe", SuiteFolder(results.url).recipe_url, "--data", results.data]
    start = ["--init-from", results.best.init.run] if results.best.init else []
    return shlex.join([*words, *flags_of(results.best), *start])


def flags_of(run: RunResult) -> list[str]:
    """Seed and placement of a command that trains this run, where they are not those of a command without flags."""
    usual = {"seed": 0, "num_workers": 1, "cpus_per_worker": 1, "gpus_per_worker": int("gpu" in run.hardware)}
    asked = {"seed": run.seed, **dict(run.placement or ())}
    flags = [(f"--{name.replace('_', '-')}", f"{n:.12g}") for name, n in asked.items() if n != usual[name]]
    return [word for flag in flags for word in flag]


def _in_words(gap: Difference, first: str) -> str:
    p = gap.probability
    sure = f"{p:.3f}" if 0.001 <= p <= 0.999 else "over 0.999" if gap.center > 0 else "under 0.001"
    findable = f"A true difference of {100 * gap.detectable:.1f} points would be found in about four of five cases."
    findable = findable if gap.detectable < 1 else "No difference could be found by so few."
    return (
        f"{100 * gap.center:+.1f} points, 95% interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f} (it covers {gap.of}). "
        f"{'This run of ' if gap.num_seeds == 1 else ''}{first} is the better one with a probability of {sure}. {findable}"
    )


def _minutes(results: SuiteResults, runs: Sequence[RunResult]) -> str:
    """Mean over these seeds of one recipe, with the sources of their weights, and theirs."""
    finished = {run.name: run for run in results.finished}
    own, of_sources, all_known = 0.0, 0.0, True
    for run in runs:
        own += run.seconds.get("fit", 0.0)
        source: RunResult | None = run
        while source and source.init:
            source = finished.get(source.init.run)
            of_sources += source.seconds.get("fit", 0.0) if source else 0.0
        all_known &= source is not None
    own, of_sources = own / 60 / len(runs), of_sources / 60 / len(runs)
    of_source = f", of which its source took {of_sources:.1f}" if of_sources else ""
    unknown = "" if all_known else " (without a source that is not here)"
    return f"{runs[0].recipe.name} {own + of_sources:.1f}{of_source}{unknown}"


def _other_differences(a: RunResult, b: RunResult, question: Question) -> str:
    """Other fields in which the two recipes differ: they too may have caused the difference."""
    first, second = asdict(a.recipe), asdict(b.recipe)
    return ", ".join(name for name in first if first[name] != second[name] and name not in question.asks | {"name"})


MEASURED = ("test accuracy", "95%", "test n", "test loss", "val accuracy", "epochs", "images/s", "min")
HEADER = ("run", "status", *MEASURED, "published")


def table_row(run: RunResult) -> tuple[str, ...]:
    """The cells of one run under HEADER. The interval is its test set's; `min` are the minutes from its start to its end."""
    cells, published = {"run": run.name, "status": run.status}, published_beside(run)
    if run.test:
        interval = of_scores(run.test)
        cells |= {"test accuracy": f"{run.test.accuracy:.4f}", "95%": f"{interval.low:.3f}-{interval.high:.3f}"}
        cells |= {"test n": f"{run.test.num_samples:,}", "test loss": f"{run.test.loss:.4f}"}
    if run.val:
        cells |= {"val accuracy": f"{run.val.accuracy:.4f}", "epochs": f"{run.epochs}"}
        cells["min"] = f"{run.seconds.get('fit', 0) / 60:.1f}"
    if run.images_per_s:
        cells["images/s"] = f"{run.images_per_s:,.0f}"
    if published:
        cells["published"] = f"{published.accuracy:.4f}"
    return tuple(cells.get(name, "") for name in HEADER)
